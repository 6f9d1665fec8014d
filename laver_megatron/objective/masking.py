"""Which visual tokens are masked for the student.

Letters: B packs, S tokens per pack, N visual tokens of one image.

Each image has its own generator, keyed by (seed, step, sample, image number) and not by where the image lies. So a
mask is the same in every pack, micro-batch and rank and after a resume, and the global random state is neither read
nor changed.
"""

import hashlib
import math
import struct

import torch
from torch import Tensor

SAMPLINGS = ("bernoulli", "fixed")

# r * N in floating point may fall just below the integer that is meant: 0.29 * 100 is 28.999999999999996. The
# error is below 1e-11 for any image (N < 1e5); a product this close below an integer is meant to be that integer.
_FLOOR_TOLERANCE = 1e-9


def num_masked_tokens(num_tokens: int, mask_ratio: float) -> int:
    """Tokens that `fixed` sampling hides in an image of `num_tokens`: floor(mask_ratio * num_tokens), as
    meant in decimal.

    It is 0 for num_tokens < 1 / mask_ratio: a ratio of 0.05 hides nothing in an image of 19 tokens.

    >>> num_masked_tokens(100, 0.29), num_masked_tokens(19, 0.05), num_masked_tokens(729, 0.05)
    (29, 0, 36)
    """
    _check_ratio(mask_ratio)
    return min(num_tokens, math.floor(mask_ratio * num_tokens + _FLOOR_TOLERANCE))


def mask_visual_tokens(
    image_BS: Tensor,
    sample_id_BS: Tensor,
    image_number_BS: Tensor,
    *,
    mask_ratio: float,
    sampling: str,
    seed: int,
    step: int,
) -> Tensor:
    """The mask M of the paper: True where a visual token is replaced by the [MASK] embedding.

    `bernoulli` (the paper) hides each token by itself with probability `mask_ratio`; `fixed` (the official
    code) hides exactly floor(mask_ratio * N) of an image's N tokens, all subsets being equally likely.

    Args:
        image_BS: int64, index of the image in its pack at visual tokens, -1 elsewhere.
        sample_id_BS: int64, global id of the sample, read at visual tokens only.
        image_number_BS: int64, number of the image within its sample, read at visual tokens only.
        mask_ratio: in [0, 1]; 0 hides nothing.
        sampling: "bernoulli" or "fixed".
        seed: of the run.
        step: of the training, 0-based: every step draws anew.

    Returns:
        bool [B, S] on the device of image_BS, False outside images. A sample that is in the global batch
        twice gets the same mask twice.

    Raises:
        ValueError: an unknown `sampling`, or `mask_ratio` outside [0, 1].
    """
    _check_ratio(mask_ratio)
    if sampling not in SAMPLINGS:
        raise ValueError(f"mask_sampling is {sampling!r}; it must be one of {', '.join(SAMPLINGS)}")
    # Drawn on the CPU whatever the device: CUDA generators give other numbers for the same seed.
    images, samples, numbers = image_BS.cpu(), sample_id_BS.cpu(), image_number_BS.cpu()
    masked_BS = torch.zeros(images.shape, dtype=torch.bool)
    if mask_ratio > 0:
        for pack, image_S in enumerate(images):
            for image in image_S[image_S >= 0].unique().tolist():
                positions_N = (image_S == image).nonzero().flatten()
                first = int(positions_N[0])
                generator = _image_generator(seed, step, int(samples[pack, first]), int(numbers[pack, first]))
                masked_BS[pack, positions_N] = _draw(len(positions_N), mask_ratio, sampling, generator)
    return masked_BS.to(image_BS.device)


def _draw(num_tokens: int, mask_ratio: float, sampling: str, generator: torch.Generator) -> Tensor:
    if sampling == "bernoulli":
        return torch.rand(num_tokens, dtype=torch.float64, generator=generator) < mask_ratio
    masked_N = torch.zeros(num_tokens, dtype=torch.bool)
    order_N = torch.randperm(num_tokens, generator=generator)
    masked_N[order_N[: num_masked_tokens(num_tokens, mask_ratio)]] = True
    return masked_N


def _image_generator(seed: int, step: int, sample_id: int, image_number: int) -> torch.Generator:
    """A generator for one image at one step.

    The key is a hash, because neighbouring keys (step + 1, image + 1) must not give related numbers, and
    blake2b rather than Python's `hash` because it is the same in every process and version. Torch's CPU
    generator keeps the lower 32 bits of a seed: two images of a long run may so share their draws, which no
    statistic can see.
    """
    key = struct.pack("<4q", seed, step, sample_id, image_number)
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _check_ratio(mask_ratio: float) -> None:
    if not 0 <= mask_ratio <= 1:
        raise ValueError(
            f"mask_ratio is {mask_ratio}; it must lie between 0 (nothing hidden) and 1 (everything hidden)"
        )
