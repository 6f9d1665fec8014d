"""`laver make-tasks`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from laver_megatron.program import program, program_parser
from laver_megatron.runtime.files import check_place
from laver_megatron.tasks.families import FAMILIES
from laver_megatron.tasks.question import TRAIN, VALID
from laver_megatron.tasks.sample import TaskSettings

DESCRIPTION = """
Makes a set of questions that only a picture answers, as WebDataset shards with an index.

Training and validation share no text and no layout. text/ holds the same questions and answers without pictures, from
which a language model can learn what is likely. tasks.json names the share of right answers that guessing gets.
"""


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Makes a set."""
    examples = [
        "--output runs/tasks --train 20000 --valid 800",
        "--output runs/reading --train 9000 --valid 900 --families text digits --difficulty 3 4 5 --image-size 96",
    ]
    parser = program_parser("make-tasks", DESCRIPTION, examples)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="the directory to make")
    add("--seed", type=int, default=1, metavar="S", help="another seed makes other samples")
    add("--train", dest="num_train", type=int, required=True, metavar="N", help="training samples")
    add("--valid", dest="num_valid", type=int, required=True, metavar="M", help="validation samples")
    add(
        "--families", nargs="+", default=list(FAMILIES), metavar="NAME",
        help="which skills, equally frequent; default: all",
    )  # fmt: skip
    add("--difficulty", dest="levels", type=int, nargs="+", default=[1, 2, 3], metavar="LEVEL", help="1 to 5, mixed")
    add("--image-size", type=int, default=64, metavar="PIXELS", help="side of a picture")
    add("--sheet", type=Path, metavar="FILE", help="also draws an example of each family and difficulty, as a PNG")
    options = parser.parse_args(argv)
    families, levels = tuple(options.families), tuple(options.levels)
    settings = TaskSettings(
        options.seed, options.num_train, options.num_valid, families, levels, options.image_size
    )  # before the slow import below
    if options.sheet is not None:
        check_place(options.sheet, "--sheet")

    from laver_megatron.tasks.make import make_tasks
    from laver_megatron.tasks.sheet import write_sheet

    description = make_tasks(settings, options.output)
    if options.sheet is not None:
        write_sheet(settings, options.sheet)
    print(f"{options.output}: {settings.num_train} + {settings.num_valid} samples")
    print(f"{'family':12} {'train':>7} {'valid':>7} {'chance':>7}")
    for family in settings.families:
        train, valid = (description[split].get(family, {}) for split in (TRAIN, VALID))
        chance = f"{valid['chance']:7.3f}" if valid else f"{'-':>7}"
        print(f"{family:12} {train.get('num_samples', 0):7} {valid.get('num_samples', 0):7} {chance}")
