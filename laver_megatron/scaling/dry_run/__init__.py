"""Every rank of a run built without memory, and its shards checked (--dry-run, docs/planning.md)."""
