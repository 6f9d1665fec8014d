"""Converts Hugging Face weights into a Megatron checkpoint that loads at any TP x PP.

    python tools/hf_to_megatron.py --hf Qwen2.5-7B-Instruct --megatron checkpoints/qwen7b
    torchrun --nproc-per-node 8 tools/hf_to_megatron.py --hf Qwen2.5-72B --megatron checkpoints/qwen72b

The source is a text-only Qwen2.5 or a LaVer export of megatron_to_hf.py. Only a few blocks of rows are in memory at
a time, whatever the model's size. (Training can also start from the Hugging Face directory: --load hf:DIR.)
"""

import signal
from pathlib import Path


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports take seconds, and there is nothing to tidy yet
    from laver_megatron.convert.command import run_conversion, start_parser
    from laver_megatron.convert.hf_to_megatron import hf_to_megatron

    parser = start_parser(__doc__)
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face directory to read")
    parser.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="checkpoint directory to write")
    options = vars(parser.parse_args())
    run_conversion(lambda: hf_to_megatron(options.pop("hf"), options.pop("megatron"), **options))


if __name__ == "__main__":
    main()
