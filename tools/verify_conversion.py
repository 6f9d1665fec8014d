"""The same as `laver verify`."""

from laver_megatron.convert.verify_command import main

if __name__ == "__main__":
    main()
