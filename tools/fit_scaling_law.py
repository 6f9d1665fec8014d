"""The same as `laver fit`."""

from laver_megatron.studies.fit_command import main

if __name__ == "__main__":
    main()
