"""The same as `laver score-masks`."""

from laver_megatron.scores.segmentation import main

if __name__ == "__main__":
    main()
