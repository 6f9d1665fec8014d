"""The same as `laver curves`."""

from laver_megatron.studies.curves_command import main

if __name__ == "__main__":
    main()
