"""The same as `laver shards make`."""

from laver_megatron.shards.commands import make_main

if __name__ == "__main__":
    make_main()
