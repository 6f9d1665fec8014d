"""`laver demo` and `laver examples`: what a first run needs, made or copied into a directory."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from laver_megatron.program import EXAMPLES, program, program_parser

DEMO = """
Makes the demo's model, encoder and shards in a directory. No download; parts that are there are kept.
"""
COPY = """
Copies the examples of this version into a new directory: configurations, the launcher, chat.py, evaluation adapters.
"""


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Makes the demo."""
    parser = program_parser("demo", DEMO, ["", "--dir runs/mine --encoders clip dinov2 --models 64x3 96x4"])
    add = parser.add_argument
    add("--dir", default="runs/demo", help="where to make model/, encoder/ and shards/")
    add(
        "--encoders", nargs="+", default=[], metavar="KIND",
        help="make encoder_KIND/ as well: siglip, clip, dinov2, dinov2_with_registers, aimv2, aimv2_fixed, qwen2_5_vl "
        "or patches",
    )  # fmt: skip
    add(
        "--models", nargs="+", default=[], metavar="SIZE",
        help="make model_SIZE/ as well: WIDTHxLAYERS, such as 64x3; a ladder for scaling studies",
    )  # fmt: skip
    add("--num-train-samples", type=int, default=384, metavar="N", help="training samples")
    options = parser.parse_args(argv)

    from laver_megatron.demo.make import make_demo  # torch and transformers: too slow for --help

    make_demo(
        options.dir, num_train_samples=options.num_train_samples, encoders=options.encoders, models=options.models
    )


@program
def copy_examples(argv: Sequence[str] | None = None) -> None:
    """Copies examples/ of the package."""
    parser = program_parser("examples", COPY, ["my_examples", "/data/laver/examples"])
    parser.add_argument("directory", type=Path, metavar="DIR", help="the directory to make")
    target = parser.parse_args(argv).directory
    if target.exists():
        raise ValueError(f"{target} is there already; name a directory that is not")
    shutil.copytree(EXAMPLES, target, ignore=shutil.ignore_patterns("__pycache__"))
    print(f"{target}: {sum(path.is_file() for path in target.rglob('*'))} files")
