"""`laver convert`: Hugging Face weights to a Megatron checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from laver_megatron.convert.command import conversion_parser, run_conversion
from laver_megatron.program import program

DESCRIPTION = """
Converts Hugging Face weights into a Megatron checkpoint that loads at any TP x PP.

The source is a text-only Qwen2.5 or a LaVer export of `laver export`. Only a few blocks of rows are in memory at a
time, whatever the model's size; under torchrun (tools/hf_to_megatron.py) the ranks divide the files between them.
Training can also start from the Hugging Face directory itself: --load hf:DIR.
"""


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Converts what the command line names."""
    examples = [
        "--hf Qwen2.5-7B-Instruct --megatron checkpoints/qwen7b",
        "--hf Qwen2.5-72B --megatron checkpoints/qwen72b --dry-run",
    ]
    parser, places = conversion_parser("convert", DESCRIPTION, examples)
    places.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face directory to read")
    places.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="checkpoint directory to write")
    options = vars(parser.parse_args(argv))

    from laver_megatron.convert.hf_to_megatron import hf_to_megatron  # torch, too slow for --help

    run_conversion(lambda: hf_to_megatron(options.pop("hf"), options.pop("megatron"), **options))
