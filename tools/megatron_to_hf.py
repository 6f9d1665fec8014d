"""Converts a Megatron checkpoint, written at any layout, into a Hugging Face directory.

    python tools/megatron_to_hf.py --megatron runs/mine/checkpoints --hf exports/mine
    python tools/megatron_to_hf.py --megatron runs/mine/checkpoints/iter_0006250 --hf exports/teacher --weights teacher

A text-only checkpoint becomes a stock Qwen2ForCausalLM. One with images becomes a directory with its own modelling code
(--format laver), or a stock LlavaForConditionalGeneration (--format llava; for runs trained with --positions 1d).
"""

import signal
from pathlib import Path


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports take seconds, and there is nothing to tidy yet
    from laver_megatron.convert.command import run_conversion, start_parser
    from laver_megatron.convert.export.description import FORMATS
    from laver_megatron.convert.megatron_to_hf import MAX_FILE_BYTES, megatron_to_hf

    parser = start_parser(__doc__)
    parser.add_argument(
        "--megatron", type=Path, required=True, metavar="DIR",
        help="checkpoint to read: an iter_* folder, or a checkpoints/ folder (then its newest)",
    )  # fmt: skip
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face directory to write")
    parser.add_argument(
        "--weights", choices=("student", "teacher"), default="student",
        help="teacher: its decoder layers and final norm, the student's everything else (default: student)",
    )  # fmt: skip
    parser.add_argument("--format", choices=FORMATS, help="of a checkpoint with images (default: laver)")
    parser.add_argument(
        "--training-state", action="store_true",
        help="add [MASK], vision head and teacher in files of their own, so that training can go on from the export",
    )  # fmt: skip
    parser.add_argument(
        "--max-file-bytes", type=float, default=MAX_FILE_BYTES, metavar="N",
        help=f"largest safetensors file, if no single tensor is larger (default: {MAX_FILE_BYTES:.0e})",
    )  # fmt: skip
    options = vars(parser.parse_args())
    run_conversion(lambda: megatron_to_hf(options.pop("megatron"), options.pop("hf"), **options))


if __name__ == "__main__":
    main()
