"""The same as `laver shards index`."""

from laver_megatron.shards.commands import index_main

if __name__ == "__main__":
    index_main()
