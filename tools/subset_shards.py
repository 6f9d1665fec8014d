#!/usr/bin/env python
"""Selects a seeded subset of shards; see --help."""

import sys

from laver_megatron.shards.commands import subset_main

if __name__ == "__main__":
    sys.exit(subset_main())
