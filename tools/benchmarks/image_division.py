"""Measures how evenly the image encoder's work is divided over tensor-parallel ranks.

    python tools/benchmarks/image_division.py
    python tools/benchmarks/image_division.py --tensor-model-parallel-size 2 --most-tokens 16384

The measure is how far the rank farthest from the mean is from it, in forward FLOPs (linear layers and attention), on
random batches of 16 to 48 images, none of more than a quarter of all tokens. Images are divided as in a run: by
`image_cost`, which is FLOPs except for the shape of small windows.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator, Sequence

from laver_megatron.data.batch.division import divide_images
from laver_megatron.encoders.interface import EncoderShape
from laver_megatron.flops.encoder import EncoderWork, encoder_flops, image_cost

Grid = tuple[int, int]
MOST = 0.15  # what a rank may be from the mean, as a share of it

# Published sizes: AIMv2 large, and the vision model of Qwen2.5-VL.
ENCODERS = {
    "AIMv2-L native": EncoderShape(
        model_type="aimv2_vision_model", feature_size=1024, num_layers=24, hidden_size=1024, intermediate_size=2816,
        num_mlp_matrices=3, patch_size=14, image_size=None, default_feature_layer=-1,
    ),
    "Qwen2.5-VL": EncoderShape(
        model_type="qwen2_5_vl_vision", feature_size=3584, num_layers=32, hidden_size=1280, intermediate_size=3420,
        num_mlp_matrices=3, patch_size=14, merge_size=2, temporal_patch_size=2, image_size=None, window_size=112,
        full_attention_layers=(7, 15, 23, 31), default_feature_layer=None,
    ),
}  # fmt: skip


def image_work(grid: Grid, shape: EncoderShape) -> int:
    """Forward FLOPs of one image of (rows, columns) visual tokens."""
    return sum(encoder_flops(shape).forward(EncoderWork.of_grids([grid], shape)))


def work_per_rank(grids: Sequence[Grid], shape: EncoderShape, num_ranks: int) -> list[int]:
    """Forward FLOPs of each rank on a batch of images."""
    work = [image_work(grid, shape) for grid in grids]
    division = divide_images([rows * columns for rows, columns in grids], num_ranks, image_cost(shape))
    return [sum(work[image] for image in images) for images in division]


def unevenness(loads: Sequence[int]) -> float:
    """How far the rank that is farthest from the mean is from it, as a share of the mean."""
    mean = sum(loads) / len(loads)
    return max(abs(load - mean) for load in loads) / mean if mean else 0.0


def can_be_even(grids: Sequence[Grid], shape: EncoderShape, num_ranks: int) -> bool:
    """Whether no single image is more than a rank should have at most; an image is never cut."""
    work = [image_work(grid, shape) for grid in grids]
    return max(work) * num_ranks <= (1 + MOST) * sum(work)


def random_batches(num_batches: int, most_tokens: int, seed: int) -> Iterator[list[Grid]]:
    """Batches of 16 to 48 images of 16 to `most_tokens` visual tokens (small ones are as frequent as large ones, by
    their logarithm) and of sides up to 4 : 1, none of more than a quarter of all tokens."""
    rng = random.Random(seed)
    while num_batches:
        grids = [_grid(rng, most_tokens) for _ in range(rng.randint(16, 48))]
        sizes = [rows * columns for rows, columns in grids]
        if 4 * max(sizes) <= sum(sizes):
            num_batches -= 1
            yield grids


def _grid(rng: random.Random, most_tokens: int) -> Grid:
    size, aspect = math.exp(rng.uniform(math.log(16), math.log(most_tokens))), 4 ** rng.uniform(-1, 1)
    rows = max(1, int(math.sqrt(size * aspect)))
    return rows, max(1, int(size / rows))


def benchmark(ranks: Sequence[int], num_batches: int, most_tokens: Sequence[int], seed: int) -> str:
    """A Markdown table over `num_batches` batches a line."""
    lines = [
        "| encoder | tokens of an image | TP | mean | 99% of batches | worst | above 15% | one image alone is |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, shape in ENCODERS.items():
        for most in most_tokens:
            batches = list(random_batches(num_batches, most, seed))
            for num_ranks in ranks:
                found = sorted(unevenness(work_per_rank(grids, shape, num_ranks)) for grids in batches)
                above = sum(value > MOST for value in found) / len(found)
                alone = sum(not can_be_even(grids, shape, num_ranks) for grids in batches) / len(found)
                lines.append(
                    f"| {name} | 16 to {most} | {num_ranks} | {sum(found) / len(found):.1%} | "
                    f"{found[int(0.99 * (len(found) - 1))]:.1%} | {found[-1]:.1%} | {above:.1%} | {alone:.1%} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tensor-model-parallel-size", type=int, nargs="+", default=[2, 4, 8], help="ranks (default: 2 4 8)")
    add("--most-tokens", type=int, nargs="+", default=[2048, 8192], help="of one image (default: 2048 8192)")
    add("--batches", type=int, default=1000, help="for each line (default: 1000)")
    add("--seed", type=int, default=0)
    options = parser.parse_args()
    print(benchmark(options.tensor_model_parallel_size, options.batches, options.most_tokens, options.seed))


if __name__ == "__main__":
    main()
