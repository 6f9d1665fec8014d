"""The index of a shard while it is written: the same as reading it again would give, without reading it again."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import xxhash

from laver_megatron.data.index.shard_index import Shard, ShardIndex
from laver_megatron.shards.assemble import Sample


class IndexRows:
    """Rows of a ShardIndex, as they come."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._texts: list[tuple[int, int]] = []  # offset, size
        self._checksums: list[int] = []
        self._starts = [0]
        self._pictures: list[tuple[int, int, int, int, int]] = []  # offset, size, extension, width, height
        self._extensions: dict[str, int] = {}

    def add(self, sample: Sample, offsets: Sequence[int]) -> None:
        """A sample whose files, the text first, begin at `offsets` in the shard."""
        digest = xxhash.xxh3_64(sample.text)
        for extension, picture, offset in zip(sample.extensions, sample.pictures, offsets[1:], strict=True):
            digest.update(picture.content)
            number = self._extensions.setdefault(extension, len(self._extensions))
            self._pictures.append((offset, len(picture.content), number, picture.width, picture.height))
        self._keys.append(sample.key)
        self._texts.append((offsets[0], len(sample.text)))
        self._checksums.append(digest.intdigest())
        self._starts.append(len(self._pictures))

    def finish(self, path: Path, num_bytes: int) -> ShardIndex:
        """The index of the shard of this size."""
        texts = np.array(self._texts, np.int64).reshape(-1, 2)
        pictures = np.array(self._pictures, np.int64).reshape(-1, 5)
        return ShardIndex(
            shards=(Shard(str(path), num_bytes, len(texts)),),
            extensions=tuple(self._extensions),
            shard_I=np.zeros(len(texts), np.int32),
            keys=pyarrow.array(self._keys, pyarrow.large_string()),
            text_offset_I=texts[:, 0],
            text_size_I=texts[:, 1],
            image_start_I=np.array(self._starts, np.int64),
            image_offset_P=pictures[:, 0],
            image_size_P=pictures[:, 1].astype(np.int32),
            image_extension_P=pictures[:, 2].astype(np.int16),
            image_width_P=pictures[:, 3].astype(np.int32),
            image_height_P=pictures[:, 4].astype(np.int32),
            checksum_I=np.array(self._checksums, np.uint64),
            fault_I=np.zeros(len(texts), np.int8),
        )
