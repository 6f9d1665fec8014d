"""The same as `laver demo`."""

from laver_megatron.demo.demo_command import main

if __name__ == "__main__":
    main()
