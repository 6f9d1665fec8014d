"""Which samples go into which pack: a pure function of index, seed and epoch."""
