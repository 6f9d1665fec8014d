"""From a pack's sample ids to its tensors: reads, checks, decodes and lays out; what runs in the reader processes.

Letters: F tensors of a pack, S tokens of a pack, 3 colours, height, width of an image's pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from laver_megatron.data.conversations import parse_conversation
from laver_megatron.data.counts import Limits
from laver_megatron.data.faults import Fault, SampleFault
from laver_megatron.data.images import decode_image
from laver_megatron.data.index import Shard, ShardIndex, ShardSample
from laver_megatron.data.packing import PackBatch, PackedSample, build_packs, check_features
from laver_megatron.data.reading import SampleFiles, open_local
from laver_megatron.data.samples import SampleEncoder
from laver_megatron.encoders import ImagePreprocessor

_TENSORS = tuple(field.name for field in fields(PackBatch) if field.name.endswith("_BS"))


@dataclass(frozen=True)
class BadSample:
    """A sample that turned out bad when it was read."""

    sample_id: int
    fault: Fault
    shard: str
    key: str
    detail: str


@dataclass(frozen=True)
class MadePack:
    """A pack on its own. table_FS: the tensors of PackBatch in their order; images: float32 `[3, height, width]`; keys:
    of its documents; bad: what is missing in it."""

    table_FS: Tensor
    images: list[Tensor]
    keys: list[str]
    bad: list[BadSample]


@dataclass(frozen=True)
class SharedPack:
    """A pack in two tensors in shared memory, so that it passes between processes at little cost. pixels: all images
    one after the other, flat; sizes: (height, width) of each."""

    table_FS: Tensor
    pixels: Tensor
    sizes: list[tuple[int, int]]
    keys: list[str]
    bad: list[BadSample]

    @classmethod
    def of(cls, pack: MadePack) -> SharedPack:
        """A copy of a pack; its pixels are copied once, right to where the other process finds them."""
        sizes = [(image.shape[1], image.shape[2]) for image in pack.images]
        # As torch's own collation does it: share_memory_() would first make the tensor elsewhere and then copy it.
        num_values = sum(image.numel() for image in pack.images)
        try:
            storage = torch.UntypedStorage._new_shared(max(4 * num_values, 4))
        except RuntimeError as error:
            raise OSError(
                f"no shared memory for the {4 * num_values / 1e6:.0f} MB of a pack's images ({error}); use fewer "
                "--num-workers, or give the job more of it (docker run --shm-size)"
            ) from error
        pixels = torch.empty(0).set_(storage)[:num_values]
        parts = pixels.split([image.numel() for image in pack.images])
        for part, image in zip(parts, pack.images, strict=True):
            part.view(image.shape).copy_(image)
        return cls(pack.table_FS.share_memory_(), pixels, sizes, pack.keys, pack.bad)

    def unpack(self) -> MadePack:
        """The pack; its images are views."""
        parts = self.pixels.split([3 * height * width for height, width in self.sizes])
        images = [part.view(3, *size) for part, size in zip(parts, self.sizes, strict=True)]
        return MadePack(self.table_FS, images, self.keys, self.bad)


class PackMaker:
    """Makes packs of samples of several indexes; a global sample id counts through the indexes in their order."""

    def __init__(
        self,
        indexes: Sequence[ShardIndex],
        encoder: SampleEncoder,
        preprocessor: ImagePreprocessor,
        seq_length: int,
        limits: Limits = None,
        open_shard: Callable[[Shard], int] = open_local,
    ) -> None:
        self.indexes, self.encoder, self.preprocessor = indexes, encoder, preprocessor
        self.seq_length, self.limits = seq_length, limits
        self._starts = np.cumsum([0] + [len(index) for index in indexes])
        self._files = SampleFiles(open_shard)

    @property
    def num_samples(self) -> int:
        """All samples, those included that cannot be used and that are no row of an index."""
        return sum(len(index) + index.left_out.total() for index in self.indexes)

    def locate_sample(self, sample_id: int) -> tuple[ShardIndex, int]:
        """The index of a sample and its row there."""
        number = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        return self.indexes[number], sample_id - int(self._starts[number])

    def make(self, sample_ids: Sequence[int], num_tokens: Sequence[int]) -> MadePack:
        """num_tokens: what each sample was planned with. A bad sample's slots stay padding.

        Raises:
            ValueError: a sample's tokens or features are not as many as planned.
            OSError: a shard cannot be opened or read.
        """
        bad: list[BadSample] = []
        samples = []
        for sample_id, planned in zip(sample_ids, num_tokens, strict=True):
            index, row = self.locate_sample(sample_id)
            sample = index.sample(row)
            try:
                samples.append(self._make_sample(index, row, sample, sample_id, planned))
            except SampleFault as error:
                bad.append(BadSample(sample_id, error.fault, sample.shard, sample.key, str(error)))
                samples.append(PackedSample(sample_id, planned, None))
        batch = build_packs([samples], seq_length=self.seq_length, padding_token=self.encoder.padding)
        [images], [keys] = batch.pixels, batch.keys
        return MadePack(
            table_FS=torch.cat([getattr(batch, name) for name in _TENSORS]),
            images=images,
            keys=keys,
            bad=bad,
        )

    def make_shared(self, sample_ids: Sequence[int], num_tokens: Sequence[int]) -> SharedPack:
        """`make` for another process."""
        return SharedPack.of(self.make(sample_ids, num_tokens))

    def _make_sample(
        self, index: ShardIndex, row: int, sample: ShardSample, sample_id: int, planned: int
    ) -> PackedSample:
        text, *contents = self._files.read(index.shards[index.shard_I[row]], sample)
        messages = parse_conversation(text, sample.name)
        sizes = index.image_sizes(row)
        encoded = self.encoder.encode(
            messages, [self.preprocessor.grid(*size) for size in sizes], sample.key, self.limits
        )
        num_images = len(encoded.grids)  # turns that were dropped take their images with them
        pixels = tuple(map(self._pixels, contents[:num_images], sizes[:num_images]))
        check_features(encoded, [self.preprocessor.num_features(pixels_3HW) for pixels_3HW in pixels])
        return PackedSample(sample_id, planned, encoded, pixels)

    def _pixels(self, content: bytes, size: tuple[int, int]) -> Tensor:
        image = decode_image(content)
        if image.size != size:
            raise SampleFault(Fault.unreadable_image, f"the picture is {image.size}, but its header says {size}")
        return self.preprocessor(image)


def join_packs(packs: Sequence[MadePack]) -> PackBatch:
    """Packs as one micro-batch."""
    tables = torch.stack([pack.table_FS for pack in packs], dim=1).unbind(0)
    return PackBatch(
        **dict(zip(_TENSORS, tables, strict=True)),
        pixels=[pack.images for pack in packs],
        keys=[pack.keys for pack in packs],
    )
