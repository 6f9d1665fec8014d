"""Fits a scaling law to the runs of a study: `python tools/fit_scaling_law.py --help`."""

from laver_megatron.studies.fit_command import main

if __name__ == "__main__":
    main()
