"""The same as `laver sweep`."""

from laver_megatron.studies.sweep_command import main

if __name__ == "__main__":
    main()
