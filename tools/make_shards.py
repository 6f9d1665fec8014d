#!/usr/bin/env python
"""Makes shards of published data; see --help."""

import sys

from laver_megatron.shards.commands import make_main

if __name__ == "__main__":
    sys.exit(make_main())
