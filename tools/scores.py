"""The same as `laver scores`."""

from laver_megatron.scores.command import main

if __name__ == "__main__":
    main()
