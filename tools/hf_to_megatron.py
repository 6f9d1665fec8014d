"""The same as `laver convert`; also `torchrun --nproc-per-node 8 tools/hf_to_megatron.py ...`."""

from laver_megatron.convert.import_command import main

if __name__ == "__main__":
    main()
