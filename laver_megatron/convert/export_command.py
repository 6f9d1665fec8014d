"""`laver export`: a Megatron checkpoint to Hugging Face weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from laver_megatron.convert.command import conversion_parser, run_conversion
from laver_megatron.convert.export import FORMATS, MAX_FILE_BYTES
from laver_megatron.program import program

DESCRIPTION = """
Converts a Megatron checkpoint, written at any layout, into a Hugging Face directory.

A text-only checkpoint becomes a stock Qwen2ForCausalLM. One with images becomes a directory with its own modelling code
(--format laver), or a stock LlavaForConditionalGeneration (--format llava; for runs trained with --positions 1d).
"""


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Converts what the command line names."""
    examples = [
        "--megatron runs/mine/checkpoints --hf exports/mine",
        "--megatron runs/mine/checkpoints/iter_0006250 --hf exports/teacher --weights teacher",
    ]
    parser, places = conversion_parser("export", DESCRIPTION, examples)
    places.add_argument(
        "--megatron", type=Path, required=True, metavar="DIR",
        help="checkpoint to read: an iter_* folder, or a checkpoints/ folder (then its newest)",
    )  # fmt: skip
    places.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face directory to write")
    export = parser.add_argument_group("export")
    export.add_argument(
        "--weights", choices=("student", "teacher"), default="student",
        help="teacher: its decoder layers and final norm, the student's everything else",
    )  # fmt: skip
    export.add_argument("--format", choices=FORMATS, help="of a checkpoint with images (default: laver)")
    export.add_argument(
        "--training-state", action="store_true",
        help="add [MASK], vision head and teacher in files of their own, so that training can continue from the export",
    )  # fmt: skip
    export.add_argument(
        "--max-file-bytes", type=float, default=MAX_FILE_BYTES, metavar="N",
        help="largest safetensors file, if no single tensor is larger",
    )  # fmt: skip
    options = vars(parser.parse_args(argv))

    from laver_megatron.convert.megatron_to_hf import megatron_to_hf  # torch, too slow for --help

    run_conversion(lambda: megatron_to_hf(options.pop("megatron"), options.pop("hf"), **options))
