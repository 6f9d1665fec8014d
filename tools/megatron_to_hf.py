"""The same as `laver export`."""

from laver_megatron.convert.export_command import main

if __name__ == "__main__":
    main()
