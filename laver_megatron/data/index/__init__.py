"""What lies in shards: members of tars, the index and its file, token counts."""
