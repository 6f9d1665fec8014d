"""The same as `laver shards subset`."""

from laver_megatron.shards.commands import subset_main

if __name__ == "__main__":
    subset_main()
