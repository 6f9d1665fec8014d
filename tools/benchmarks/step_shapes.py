"""Shapes of the step benchmark, and packs of them: visual tokens and text of fixed amounts, without files.

Letters: B packs, S tokens of a pack, T tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from laver_megatron.data.batch.packing import EncodedSample, PackBatch, PackedSample, build_packs
from laver_megatron.objective.language import IGNORE_LABEL

PATCH_SIZE = 2  # pixels on a side of a visual token: an encoder-free model whose connector has almost no input


@dataclass(frozen=True)
class StepShape:
    """A Qwen2 decoder and the packs of a step.

    Attributes:
        num_images, grid_side: images of a pack, each of grid_side^2 visual tokens; all in one document.
        vision_head_hidden_size: about hidden_size / 2, as 2048 is in a 7B model, so that the head costs as little.
        tied: whether the LM head is the token embedding.
    """

    name: str
    hidden_size: int
    num_layers: int
    seq_length: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    num_images: int
    grid_side: int
    vision_head_hidden_size: int
    tied: bool = False
    micro_batch_size: int = 1
    num_micro_batches: int = 1

    @property
    def image_tokens(self) -> int:
        return self.grid_side**2

    @property
    def visual_seq_length(self) -> int:
        """Visual slots of a pack; as many as it has visual tokens, but a multiple of 8."""
        return max(-(-self.num_images * self.image_tokens // 8) * 8, 8)

    @property
    def num_packs(self) -> int:
        return self.micro_batch_size * self.num_micro_batches

    @property
    def num_tokens(self) -> int:
        """LM tokens of a step."""
        return self.num_packs * self.seq_length

    @property
    def visual_share(self) -> float:
        return self.num_images * self.image_tokens / self.seq_length

    def with_images(self, num_images: int) -> StepShape:
        """The same decoder with other packs."""
        return replace(self, num_images=num_images)


def _small(hidden_size: int, num_layers: int, seq_length: int, vocab_size: int) -> StepShape:
    # 5.5 h: Qwen2.5's ratio. The vocabulary makes the decoder 0.9 of the LM's FLOPs, as in the 7B model. 81 visual
    # tokens an image and 4 images in every 512 tokens are 0.63 of them.
    return StepShape(
        name=f"h{hidden_size} L{num_layers} S{seq_length}",
        hidden_size=hidden_size,
        num_layers=num_layers,
        seq_length=seq_length,
        ffn_hidden_size=11 * hidden_size // 2,
        num_attention_heads=hidden_size // 64,
        num_query_groups=2,
        vocab_size=vocab_size,
        num_images=seq_length // 128,
        grid_side=9,
        vision_head_hidden_size=hidden_size // 2,
    )


def _large(
    name: str, hidden: int, layers: int, ffn: int, heads: int, groups: int, vocab: int, tied: bool = False
) -> StepShape:
    # Four images of 729 tokens (SigLIP's at 384 pixels) in 4096: 0.71 of them.
    return StepShape(name, hidden, layers, 4096, ffn, heads, groups, vocab, 4, 27, 2048, tied)


# CPU shapes first. The large ones are Qwen2.5's widths; of 7B and 72B a few layers.
SHAPES: Mapping[str, StepShape] = {
    "h512-l4-s512": _small(512, 4, 512, 4096),
    "h512-l8-s1024": _small(512, 8, 1024, 8192),
    "h256-l4-s2048": _small(256, 4, 2048, 2048),
    "tiny": replace(_small(128, 2, 128, 512), num_images=2, grid_side=6),
    "0.5b": _large("0.5B", 896, 24, 4864, 14, 2, 151936, tied=True),
    "1.5b": _large("1.5B", 1536, 28, 8960, 12, 2, 151936, tied=True),
    "7b-width": _large("7B width, 4 layers", 3584, 4, 18944, 28, 4, 152064),
    "72b-width": _large("72B width, 2 layers", 8192, 2, 29568, 64, 8, 32768),
}


def make_packs(shape: StepShape, num_packs: int, seed: int = 0) -> PackBatch:
    """Packs of one document each: text and images in turns, text last, no padding, a label at every text token whose
    next token is text."""
    packs = [[_sample(shape, seed + number)] for number in range(num_packs)]
    return build_packs(packs, seq_length=shape.seq_length, padding_token=0)


def _sample(shape: StepShape, sample_id: int) -> PackedSample:
    generator = torch.Generator().manual_seed(sample_id)
    length, side = shape.seq_length, shape.grid_side
    num_text = length - shape.num_images * shape.image_tokens
    assert num_text > shape.num_images, f"{shape.num_images} images leave {num_text} of {length} tokens for text"
    gap = num_text // (shape.num_images + 1)
    tokens_T = torch.randint(0, shape.vocab_size, (length,), generator=generator)
    image_number_T = torch.full((length,), -1)
    row_T, col_T = torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.int64)
    place_N = torch.arange(shape.image_tokens)
    pixels = []
    for image in range(shape.num_images):
        start = gap + image * (shape.image_tokens + gap)
        slots = slice(start, start + shape.image_tokens)
        image_number_T[slots], row_T[slots], col_T[slots] = image, place_N // side, place_N % side
        pixels.append(torch.randn(3, side * PATCH_SIZE, side * PATCH_SIZE, generator=generator))
    text_T = image_number_T < 0
    labels_T = torch.full((length,), IGNORE_LABEL)
    labelled_T = text_T[:-1] & text_T[1:]
    labels_T[:-1][labelled_T] = tokens_T[1:][labelled_T]
    grids = ((side, side),) * shape.num_images
    encoded = EncodedSample(f"sample-{sample_id}", tokens_T, labels_T, image_number_T, row_T, col_T, grids)
    return PackedSample(sample_id, length, encoded, tuple(pixels))
