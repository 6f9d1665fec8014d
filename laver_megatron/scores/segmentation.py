"""Scores of predicted masks, as LISA (Lai et al. 2024) reports them for reasoning segmentation.

gIoU is the mean over masks of intersection over union, 1 where both are empty; cIoU the sum of all intersections over
that of all unions, in which large objects count most. Pixels that the target marks as ignored count in neither.

Letters: H, W pixels.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from laver_megatron.program import program, program_parser

IGNORED = 255

DESCRIPTION = """
Scores predicted masks against targets: gIoU and cIoU, as LISA reports them, in percent. Both folders hold a PNG of the
same name and size for each mask. Of a prediction every pixel but 0 belongs to the object; of a target 1 is the object,
0 is not, and 255 is ignored.
"""
EXAMPLES = ["--predicted masks/laver --target ReasonSeg/val_masks", "--predicted p --target t --json"]


@dataclass(frozen=True)
class MaskScores:
    """gIoU and cIoU from 0 to 1. num_empty: targets without an object, for which only an empty mask is right."""

    giou: float
    ciou: float
    num_masks: int
    num_empty: int


def intersection_and_union(predicted_HW: NDArray[np.bool_], target_HW: NDArray[np.uint8]) -> tuple[int, int]:
    """Pixels in both and in either. target_HW: 1 object, 0 none, `IGNORED`.

    Raises:
        ValueError: their sizes differ.
    """
    _check_sizes(predicted_HW, target_HW, "the mask")
    counted_HW, object_HW = target_HW != IGNORED, target_HW == 1
    chosen_HW = predicted_HW & counted_HW
    return int((chosen_HW & object_HW).sum()), int((chosen_HW | object_HW).sum())


def _check_sizes(predicted_HW: NDArray[np.bool_], target_HW: NDArray[np.uint8], name: str) -> None:
    """A mask is not resized here, which would give it another outline."""
    if predicted_HW.shape != target_HW.shape:
        raise ValueError(f"{name} has {predicted_HW.shape} pixels, its target {target_HW.shape}; predict at that size")


def score_masks(pairs: Iterable[tuple[NDArray[np.bool_], NDArray[np.uint8]]]) -> MaskScores:
    """The scores of predicted masks and their targets.

    Raises:
        ValueError: sizes differ, or there are none.
    """
    ratios, intersections, unions, num_empty = [], 0, 0, 0
    for predicted_HW, target_HW in pairs:
        intersection, union = intersection_and_union(predicted_HW, target_HW)
        ratios.append(intersection / union if union else 1.0)
        intersections, unions = intersections + intersection, unions + union
        num_empty += not (target_HW == 1).any()
    if not ratios:
        raise ValueError("there are no masks to score")
    return MaskScores(float(np.mean(ratios)), intersections / unions if unions else 1.0, len(ratios), num_empty)


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Reads both folders and prints the scores."""
    parser = program_parser("score-masks", DESCRIPTION, EXAMPLES)
    parser.add_argument("--predicted", type=Path, required=True, metavar="DIR", help="predicted masks")
    parser.add_argument("--target", type=Path, required=True, metavar="DIR", help="targets")
    parser.add_argument("--json", action="store_true", help="print JSON, from 0 to 1")
    options = parser.parse_args(argv)
    scores = score_masks(_read_pairs(options))
    if options.json:
        print(json.dumps(asdict(scores)))
    else:
        print(f"gIoU {100 * scores.giou:.2f}  cIoU {100 * scores.ciou:.2f}  {scores.num_masks} masks, "
              f"{scores.num_empty} of them without an object")  # fmt: skip


def _read_pairs(options: argparse.Namespace) -> Iterable[tuple[NDArray[np.bool_], NDArray[np.uint8]]]:
    """One pair at a time. Every target needs its mask: what was left out would be neither right nor wrong."""
    predicted, target = ({path.name for path in folder.iterdir() if path.suffix == ".png"} for folder in
                         (options.predicted, options.target))  # fmt: skip
    if not target:
        raise ValueError(f"{options.target} holds no .png")
    for names, where in ((target - predicted, options.predicted), (predicted - target, options.target)):
        if names:
            raise ValueError(
                f"{len(names)} masks, such as {min(names)}, are missing in {where}; an empty one is a mask, too"
            )
    for name in sorted(target):
        target_HW = _pixels(options.target / name)
        if others := sorted(set(np.unique(target_HW).tolist()) - {0, 1, IGNORED}):
            raise ValueError(f"{options.target / name} holds {others[0]}; a target's pixels are 0, 1 and {IGNORED}")
        if (target_HW == IGNORED).any() and not (target_HW == 1).any():
            raise ValueError(f"{options.target / name}: {IGNORED} is ignored, and no pixel is 1, the object's value")
        predicted_HW = _pixels(options.predicted / name) != 0
        _check_sizes(predicted_HW, target_HW, str(options.predicted / name))
        yield predicted_HW, target_HW


def _pixels(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            if image.mode not in ("1", "L", "P"):
                raise ValueError(f"{path} has the mode {image.mode}; masks have one channel of 8 bits")
            return np.asarray(image, dtype=np.uint8)  # of a palette the numbers, not their colours; of mode 1: 0 and 1
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no picture") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, which do not name the file
        raise ValueError(f"{path} cannot be read: {error}") from error
