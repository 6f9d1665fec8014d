"""How full packs get, how full they could be, and how long planning takes, on data sets drawn from stated sizes.

Letters: I samples, M images of a sample, up to four.

Text: tokens log-normal as in conversations about pictures (median 220, the longest 3,000), 30 tokens of template and
2 around every image.

- native: 15% of the samples have no image, 70% one, 8% two, 4% three, 3% four. Images keep their shape in patches of
  28 pixels, at most 1024 of them. 35% are photographs of 640 x 480, 45% pictures from the web (long side log-normal,
  median 700; the short side half of it to all of it), 20% pages (long side median 1400; short side 65 to 80%).
- 729, 576: every image is that many tokens, as with an encoder of a fixed resolution; 15% of the samples have no
  image, 75% one, 6% two, 3% three, 1% four.
- many 729, many 576: the same with as many images in a sample as in native.
- captions 729, 576: one image in each sample and a caption of a sentence (median 30 tokens), as in alignment data.
"""

import resource
import time
from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from laver_megatron.data.plan.fill import measure_fill, propose_visual_budget
from laver_megatron.data.plan.mixture import Source
from laver_megatron.data.plan.plan import PackPlan

DATA_SETS = ("native", "729", "576", "many 729", "many 576", "captions 729", "captions 576")
_NATIVE_SHARES, _FIXED_SHARES = (0.15, 0.70, 0.08, 0.04, 0.03), (0.15, 0.75, 0.06, 0.03, 0.01)
_SAMPLES_A_SHARD, _PATCH, _MOST_PATCHES = 2_000, 28, 1_024


def benchmark(data_sets: Sequence[str], num_samples: int, seq_length: int, window: int, multiple_of: int) -> str:
    """Plans one epoch of each, in this process, and returns a Markdown table. The budget is the proposed one."""
    lines = [
        f"{num_samples:,} samples, seq_length {seq_length}, windows of {window:,} samples.",
        "",
        "| data | visual budget | left out | packs | tokens: fill / bound | visual: fill / bound | of bound | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in data_sets:
        source = draw_source(name, num_samples, seed=0)
        started = time.process_time()
        budget = propose_visual_budget([source], seq_length, multiple_of)
        plan = PackPlan([source], seq_length, budget, seed=0, window=window)
        num_packs = plan.num_packs()
        seconds = time.process_time() - started
        fill = measure_fill(plan, num_windows=plan.num_windows)
        lines.append(
            f"| {name} | {budget} | {sum(plan.skipped.values()) / num_samples:.2%} | {num_packs} "
            f"| {fill.token_fill:.2%} / {fill.token_bound:.2%} | {fill.visual_fill:.2%} / {fill.visual_bound:.2%} "
            f"| {fill.share_of_bound:.2%} | {seconds:.1f} |"
        )
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    note = f"Most memory of the process: {peak_mib:.0f} MiB. The CPU's seconds include proposing the budget."
    return "\n".join([*lines, "", note])


def draw_source(name: str, num_samples: int, seed: int) -> Source:
    """A data set of this module's list, in shards of 2,000 samples."""
    assert name in DATA_SETS, name
    rng = np.random.default_rng(seed)
    if name.startswith("captions"):
        num_images_I = np.ones(num_samples, np.int64)
        text_I = _log_normal(rng, 30, 0.5, num_samples, 8, 200)
    else:
        shares = _NATIVE_SHARES if name.startswith(("native", "many")) else _FIXED_SHARES
        num_images_I = rng.choice(5, num_samples, p=shares)
        text_I = _log_normal(rng, 220, 0.9, num_samples, 12, 3_000)
    if name == "native":
        used_IM = np.arange(4) < num_images_I[:, None]
        visual_I = np.where(used_IM, _native_patches(rng, used_IM.shape), 0).sum(axis=1)
    else:
        visual_I = num_images_I * int(name.split()[-1])
    tokens_I = text_I.astype(np.int64) + 30 + 2 * num_images_I + visual_I
    return Source(tokens_I, visual_I, np.arange(num_samples) // _SAMPLES_A_SHARD)


def _native_patches(rng: Generator, shape: tuple[int, ...]) -> NDArray[np.int64]:
    kind = rng.random(shape)
    photograph, page = kind < 0.35, kind >= 0.80
    web_side, page_side = _log_normal(rng, 700, 0.5, shape, 100, 3_000), _log_normal(rng, 1400, 0.3, shape, 400, 4_000)
    long_side = np.where(photograph, 640, np.where(page, page_side, web_side))
    web_ratio, page_ratio = rng.uniform(0.5, 1, shape), rng.uniform(0.65, 0.8, shape)
    short_side = long_side * np.where(photograph, 0.75, np.where(page, page_ratio, web_ratio))
    scale = np.minimum(1, np.sqrt(_MOST_PATCHES * _PATCH**2 / (long_side * short_side)))
    sides = (np.maximum(1, side * scale // _PATCH).astype(np.int64) for side in (long_side, short_side))
    return np.multiply(*sides)


def _log_normal(
    rng: Generator, median: float, sigma: float, shape: int | tuple[int, ...], low: float, high: float
) -> NDArray[np.float64]:
    return np.clip(rng.lognormal(np.log(median), sigma, shape), low, high)
