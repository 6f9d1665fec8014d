"""What a pack of a planned run holds: how many tokens, how many of them visual, in images of which size."""

from __future__ import annotations

import math
from dataclasses import dataclass

from laver_megatron.encoders.interface import EncoderShape
from laver_megatron.flops.encoder import window_area
from laver_megatron.flops.step import document_area


@dataclass(frozen=True)
class Workload:
    """One pack, taken to be full. num_documents: among which tokens and images are divided as evenly as they go.
    encoder: of the images; None for a model without any."""

    seq_length: int
    num_images: int
    image_tokens: int
    num_documents: int
    attention: str
    encoder: EncoderShape | None

    @property
    def num_visual_tokens(self) -> int:
        return self.num_images * self.image_tokens

    @property
    def visual_share(self) -> float:
        return self.num_visual_tokens / self.seq_length

    def largest_share_of_images(self, num_packs: int, num_ranks: int) -> float:
        """What the rank that encodes most of a micro-batch's images has of them."""
        num_images = num_packs * self.num_images
        return -(-num_images // num_ranks) / num_images if num_images else 0.0

    @property
    def image_area(self) -> int:
        """Pairs within images."""
        return self.num_images * self.image_tokens**2

    @property
    def image_window_area(self) -> int:
        """Pairs that share a window of the encoder's, of square images; in proportion where no square has as many."""
        if self.encoder is None:
            return 0
        side = math.isqrt(self.image_tokens)
        return self.num_visual_tokens * window_area([(side, side)], self.encoder.window_tokens) // side**2

    @property
    def lm_area(self) -> int:
        """(query, key) pairs of the language stream: the sum of its span lengths, exactly."""
        lengths = _evenly(self.seq_length, self.num_documents)
        images = _evenly(self.num_images, self.num_documents)
        return sum(
            document_area(length, [self.image_tokens] * number, self.attention)
            for length, number in zip(lengths, images, strict=True)
        )


def workload_of(
    *,
    seq_length: int,
    visual_share: float,
    image_tokens: int,
    num_documents: int | None,
    attention: str,
    encoder: EncoderShape | None,
) -> Workload:
    """The most whole images within a share of a pack. num_documents: None for one an image, or one without any.

    Raises:
        ValueError: a share that is not from 0 to below 1, documents that do not fit, or not one image within a share
            that is not 0.
    """
    if not 0 <= visual_share < 1:
        raise ValueError(f"the visual share is {visual_share}, but must be at least 0 and below 1")
    num_images = int(visual_share * seq_length / image_tokens)
    if num_documents is None:
        num_documents = max(num_images, 1)
    if not 1 <= num_documents <= seq_length:
        raise ValueError(f"{num_documents} documents do not fit a pack of {seq_length} tokens")
    if visual_share and not num_images:
        larger = f"a visual share of at least {image_tokens / seq_length:.3f}, " if image_tokens < seq_length else ""
        raise ValueError(
            f"{visual_share} of {seq_length} tokens is less than one image of {image_tokens}; use {larger}"
            "longer packs, or smaller images"
        )
    if -(-num_images // num_documents) * image_tokens > seq_length // num_documents:
        raise ValueError(
            f"{num_images} images of {image_tokens} tokens do not fit {num_documents} documents of "
            f"{seq_length // num_documents} tokens; plan for fewer documents"
        )
    return Workload(seq_length, num_images, image_tokens, num_documents, attention, encoder)


def _evenly(number: int, parts: int) -> list[int]:
    return [number // parts + (i < number % parts) for i in range(parts)]
