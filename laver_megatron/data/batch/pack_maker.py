"""From a pack's sample ids to its tensors: reads, checks, decodes and places samples. Runs in the reader processes.

Letters: F tensors of a pack, S tokens of a pack, 3 colours, height, width of an image's pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from laver_megatron.data.batch.packing import (
    PACK_TENSORS,
    EncodedSample,
    PackBatch,
    PackedSample,
    build_packs,
    check_features,
)
from laver_megatron.data.index.counts import Limits
from laver_megatron.data.index.faults import Fault, SampleFault
from laver_megatron.data.index.shard_index import ShardIndex
from laver_megatron.data.read.conversations import parse_conversation
from laver_megatron.data.read.images import decode_image
from laver_megatron.data.read.sample_encoder import SampleEncoder
from laver_megatron.data.read.sample_files import OpenShard, SampleFiles, open_local
from laver_megatron.encoders import ImagePreprocessor

Result = TypeVar("Result")


@dataclass(frozen=True)
class BadSample:
    """A sample that proved bad when it was read."""

    sample_id: int
    fault: Fault
    shard: str
    key: str
    detail: str


@dataclass(frozen=True)
class PackContent:
    """What a `PackBuffer` holds.

    Attributes:
        image_sizes: (height, width) of each image.
        keys: of its documents.
        bad: samples that are missing.
        families: of its documents, see `PackBatch`.
    """

    image_sizes: list[tuple[int, int]]
    keys: list[str]
    bad: list[BadSample]
    families: list[str]


class PackBuffer:
    """A pack's tensors as views of a block of memory, which processes may share.

    Attributes:
        table_FS: PACK_TENSORS in their order, int64.
        pixels: flat, of all images one after the other.
    """

    def __init__(self, memory: Tensor, seq_length: int, pixel_dtype: torch.dtype) -> None:
        """memory: uint8, `num_bytes` of it at least."""
        table_bytes = self.num_bytes(seq_length, 0, pixel_dtype)
        self.table_FS = memory[:table_bytes].view(torch.int64).view(len(PACK_TENSORS), seq_length)
        self.pixels = memory[table_bytes:].view(pixel_dtype)

    @staticmethod
    def num_bytes(seq_length: int, num_pixels: int, pixel_dtype: torch.dtype) -> int:
        """The size of a pack of so many tokens and so many pixels of three colours."""
        return 8 * len(PACK_TENSORS) * seq_length + pixel_dtype.itemsize * 3 * num_pixels

    def images(self, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Its images, `[3, height, width]`."""
        parts = self.pixels.split([*(3 * height * width for height, width in sizes), self._unused(sizes)])
        return [part.view(3, *size) for part, size in zip(parts, sizes, strict=False)]

    def _unused(self, sizes: Sequence[tuple[int, int]]) -> int:
        return len(self.pixels) - sum(3 * height * width for height, width in sizes)


class _Text(NamedTuple):
    """A sample before its pictures (the bytes of their files, and their sizes in pixels) are decoded."""

    encoded: EncodedSample
    pictures: list[bytes]
    sizes: list[tuple[int, int]]
    family: str


class PackMaker:
    """Makes packs of samples of several indexes; a global sample id counts through the indexes in their order."""

    def __init__(
        self,
        indexes: Sequence[ShardIndex],
        encoder: SampleEncoder,
        preprocessor: ImagePreprocessor,
        seq_length: int,
        limits: Limits = None,
        open_shard: OpenShard = open_local,
    ) -> None:
        self.indexes, self.encoder, self.preprocessor = indexes, encoder, preprocessor
        self.seq_length, self.limits = seq_length, limits
        self._starts = np.cumsum([0] + [len(index) for index in indexes])
        self._files = SampleFiles(open_shard)

    @property
    def num_samples(self) -> int:
        """All samples, including those that cannot be used and those that have no row in an index."""
        return sum(len(index) + index.left_out.total() for index in self.indexes)

    def locate_sample(self, sample_id: int) -> tuple[ShardIndex, int]:
        """The index of a sample, and its row there."""
        number = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        return self.indexes[number], sample_id - int(self._starts[number])

    def make(self, sample_ids: Sequence[int], num_tokens: Sequence[int], buffer: PackBuffer) -> PackContent:
        """Makes a pack in `buffer`. num_tokens: planned for each sample. A bad sample's slots stay padding.

        Raises:
            ValueError: a sample has other numbers of tokens or features than planned.
            OSError: a shard cannot be opened or read.
        """
        bad: list[BadSample] = []

        def try_(sample_id: int, work: Callable[[], Result]) -> Result | None:
            try:
                return work()
            except SampleFault as error:
                index, row = self.locate_sample(sample_id)
                sample = index.sample(row)
                bad.append(BadSample(sample_id, error.fault, sample.shard, sample.key, str(error)))
                return None

        # All texts before all pictures: pictures drive everything else out of the caches.
        texts = [try_(sample_id, partial(self._read_text, sample_id)) for sample_id in sample_ids]
        samples, families = [], []
        end = 0  # of the pixels so far
        for sample_id, planned, text in zip(sample_ids, num_tokens, texts, strict=True):
            pixels = text and try_(sample_id, partial(self._make_pixels, text, buffer.pixels[end:]))
            if text is None or pixels is None:
                samples.append(PackedSample(sample_id, planned, None))
            else:
                samples.append(PackedSample(sample_id, planned, text.encoded, pixels))
                families.append(text.family)
                end += sum(map(torch.numel, pixels))
        batch = build_packs([samples], seq_length=self.seq_length, padding_token=self.encoder.padding)
        torch.cat([getattr(batch, name) for name in PACK_TENSORS], out=buffer.table_FS)
        [images], [keys] = batch.pixels, batch.keys
        return PackContent([(image.shape[1], image.shape[2]) for image in images], keys, bad, families)

    def _read_text(self, sample_id: int) -> _Text:
        index, row = self.locate_sample(sample_id)
        sample = index.sample(row)
        text, *contents = self._files.read(index.shards[index.shard_I[row]], sample)
        conversation = parse_conversation(text, len(contents), sample.name)
        sizes = index.image_sizes(row)
        encoded = self.encoder.encode(
            conversation.messages, [self.preprocessor.grid(*size) for size in sizes], sample.key, self.limits
        )
        num_images = len(encoded.grids)  # turns that were dropped take their images with them
        return _Text(encoded, contents[:num_images], sizes[:num_images], conversation.family)

    def _make_pixels(self, text: _Text, memory: Tensor) -> tuple[Tensor, ...]:
        """The pixels of a sample's pictures, `[3, height, width]`, one after the other in `memory`."""
        pixels: list[Tensor] = []
        for content, size in zip(text.pictures, text.sizes, strict=True):
            image = decode_image(content)
            if image.size != size:
                raise SampleFault(Fault.unreadable_image, f"the picture is {image.size}, but its header says {size}")
            pixels.append(self.preprocessor(image, memory))
            memory = memory[pixels[-1].numel() :]
        check_features(text.encoded, [self.preprocessor.num_features(pixels_3HW) for pixels_3HW in pixels])
        return tuple(pixels)


def join_packs(buffers: Sequence[PackBuffer], contents: Sequence[PackContent]) -> PackBatch:
    """Packs as one micro-batch, whose pixels are views of the buffers."""
    tables = torch.stack([buffer.table_FS for buffer in buffers], dim=1).unbind(0)
    return PackBatch(
        **dict(zip(PACK_TENSORS, tables, strict=True)),
        pixels=[buffer.images(content.image_sizes) for buffer, content in zip(buffers, contents, strict=True)],
        keys=[content.keys for content in contents],
        families=[content.families for content in contents],
    )
