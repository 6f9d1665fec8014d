"""The same as `laver plan`."""

from laver_megatron.planning.plan_command import main

if __name__ == "__main__":
    main()
