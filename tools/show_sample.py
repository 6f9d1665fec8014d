#!/usr/bin/env python
"""Draws packs of a run; see --help."""

import sys

from laver_megatron.shards.commands import show_main

if __name__ == "__main__":
    sys.exit(show_main())
