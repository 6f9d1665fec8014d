"""`laver score`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from laver_megatron.program import find_device, positive_integer, program, program_parser
from laver_megatron.runtime.files import check_place, write_json

_KINDS = ("right", "blank", "swapped")
_MOST_CONTRAST = 100.0  # the paper takes 1; beyond this only the difference of the two logits counts

DESCRIPTION = """
Scores an export's answers to the questions of shards, by greedy generation and exact match, by family.

With blank and swapped pictures beside the right ones the table shows how far the answers follow the text alone. Case,
spaces and a full stop at the end do not count. An export brings code of its own, which is run: score those you trust.
"""


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Scores an export."""
    examples = [
        "--model exports/mine --data-path runs/tasks/valid-*.tar",
        "--model exports/mine --data-path runs/tasks/valid-*.tar --images right blank swapped --output bias.json",
        "--model exports/mine --data-path runs/tasks/valid-*.tar --contrast 1",
    ]
    parser = program_parser("score", DESCRIPTION, examples)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="EXPORT", help="a directory of laver export")
    add("--data-path", nargs="+", required=True, metavar="SHARDS", help="tars, folders or indexes")
    add("--samples", type=positive_integer, metavar="N", help="score so many, the same at each call; default: all")
    add("--images", nargs="+", choices=_KINDS, default=["right"], help="which pictures the questions come with")
    add("--contrast", type=_alpha, default=0.0, metavar="ALPHA",
        help="contrastive decoding against a blank picture: 0 (off) to 100; the paper takes 1")  # fmt: skip
    add("--max-new-tokens", type=positive_integer, default=32, metavar="N", help="longest answer")
    add("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    add("--output", type=Path, metavar="FILE", help="writes table and answers as JSON")
    options = vars(parser.parse_args(argv))
    options["images"] = list(dict.fromkeys(options["images"]))
    if options["output"] is not None:
        check_place(options["output"], "--output")

    from laver_megatron.tasks.exported import ExportedModel
    from laver_megatron.tasks.score import read_samples, score, table_lines, write_description

    options["device"] = find_device(options["device"])
    samples, num_unusable = read_samples(options["data_path"], options["samples"])
    if not any(sample.num_pictures for sample in samples):
        if options["images"] != ["right"]:
            raise ValueError("--images blank and swapped need samples with pictures; these have none")
        if options["contrast"]:
            raise ValueError("--contrast needs samples with pictures; these have none")
    model = ExportedModel(options["model"], options["device"])
    answers = score(
        model,
        samples,
        images=options["images"],
        contrast=options["contrast"],
        max_new_tokens=options["max_new_tokens"],
    )
    description = write_description(options, num_unusable, answers)
    print("\n".join(table_lines(description["table"])))
    if num_unusable:
        print(f"samples that could not be used: {num_unusable}")
    if options["output"] is not None:
        write_json(options["output"], description)


def _alpha(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= _MOST_CONTRAST:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 to {_MOST_CONTRAST:g}")
    return value
