"""`laver verify`: whether a Hugging Face directory and a Megatron checkpoint hold the same model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from laver_megatron.program import program, program_parser
from laver_megatron.runtime.exit_status import FAILED

DESCRIPTION = """
Says whether a Hugging Face directory and a Megatron checkpoint hold the same model.

Compares the names and shapes of all tensors, and final hidden states and logits in fp32, on prompts and pictures: of
transformers (one process, CPU) and of Megatron at one layout or, with --grid, at all that fit. Exits with 0 if nothing
differs, 1 if something does, 2 if the two cannot be compared. A laver export runs the code that it brings.
"""


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Compares them and prints a table."""
    examples = [
        "--hf Qwen2.5-0.5B --megatron checkpoints/ --grid",
        "--hf export/ --megatron runs/mine/checkpoints --image cat.jpg",
    ]
    parser = program_parser("verify", DESCRIPTION, examples)
    models = parser.add_argument_group("the two models").add_argument
    models("--hf", type=Path, required=True, metavar="DIR", help="Qwen2.5, or an export in the laver format")
    models("--megatron", type=Path, required=True, metavar="DIR", help="a checkpoint, or a folder of iter_* ones")
    models("--weights", choices=("student", "teacher"), default="student", help="which of them --hf was exported with")
    layouts = parser.add_argument_group("layouts of Megatron").add_argument
    layouts("--tensor-model-parallel-size", type=int, metavar="N", help="(default: 1); not with --grid")
    layouts("--pipeline-model-parallel-size", type=int, metavar="N", help="(default: 1); not with --grid")
    layouts(
        "--grid",
        action="store_true",
        help="every TP of 1, 2, 4, 8 and PP of 1, 2, 4 that the model and processes allow",
    )
    layouts("--max-processes", type=int, default=4, metavar="N", help="largest TP x PP of --grid")
    probes = parser.add_argument_group("what both are shown").add_argument
    probes("--prompt", nargs="+", default=[], metavar="TEXT", help="instead of the built-in ones; <image>: a picture")
    probes("--image", type=Path, nargs="+", default=[], metavar="FILE", help="instead of scikit-image's photographs")
    probes("--tolerance", type=float, default=1e-4, metavar="X", help="largest absolute difference")
    options = parser.parse_args(argv)
    tp, pp = options.tensor_model_parallel_size, options.pipeline_model_parallel_size
    if options.grid and (tp, pp) != (None, None):
        parser.error("--grid tries all layouts: leave out the parallel sizes, or leave out --grid")

    from laver_megatron.convert.verification.verify import verify  # torch and transformers: too slow for --help

    layout = 1 if tp is None else tp, 1 if pp is None else pp
    report = verify(
        options.hf,
        options.megatron,
        layouts=None if options.grid else [layout],
        max_processes=options.max_processes,
        prompts=options.prompt,
        image_files=options.image,
        tolerance=options.tolerance,
        weights=options.weights,
    )
    print(report.table())
    if not report.is_same:
        sys.exit(FAILED)
