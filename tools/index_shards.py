#!/usr/bin/env python
"""Indexes tars; see --help."""

import sys

from laver_megatron.shards.commands import index_main

if __name__ == "__main__":
    sys.exit(index_main())
