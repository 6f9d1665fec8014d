"""Checkpoints: their state, the layout of their directory, the checksums of their files."""
