"""From bytes of a shard to token ids and pixels."""
