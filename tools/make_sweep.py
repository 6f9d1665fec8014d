"""Makes the runs of a scaling study: `python tools/make_sweep.py --help`."""

from laver_megatron.studies.sweep_command import main

if __name__ == "__main__":
    main()
