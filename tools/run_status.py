"""The same as `laver status`."""

from laver_megatron.status_command import main

if __name__ == "__main__":
    main()
