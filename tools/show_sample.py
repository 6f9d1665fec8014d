"""The same as `laver show`."""

from laver_megatron.shards.commands import show_main

if __name__ == "__main__":
    show_main()
