"""The samples of a source that a plan uses, found by their number without a list of them.

Letters: I samples asked for, B blocks: the usable samples of one shard, N rows of a chunk.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from laver_megatron.data.plan.sizes import SampleSizes

_NO_LIMIT = (1 << 31) - 1
_CHUNK = 1 << 14  # rows: what is looked at for one sample, and 8 bytes are kept for


class UsableRows:
    """Rows of a source within both budgets, in the order of their shards. A row's *place* is its number among them.

    Keeps one number for each chunk of 16,384 rows and one for each shard. Only where the source's rows are not in the
    order of their shards, which no index written by this package is, it keeps 8 bytes a row.

    Args:
        by_shard: False: in the order of the source, and `block_ends_B` means nothing.

    Attributes:
        block_ends_B: places at which the next shard begins, without the first one's begin and the last one's end.
        num_too_long, num_too_visual: samples left out for their tokens, and for their visual tokens.
    """

    def __init__(
        self, source: SampleSizes, seq_length: int, visual_seq_length: int = _NO_LIMIT, *, by_shard: bool = True
    ) -> None:
        self._source, self._seq_length, self._visual_seq_length = source, seq_length, visual_seq_length
        in_order = not by_shard or _is_sorted(source.shard_I)
        self._row_by_shard = None if in_order else np.argsort(source.shard_I, kind="stable")
        self.num_too_long = self.num_too_visual = 0
        nums, block_ends, num_so_far, last_shard = [], [np.empty(0, np.int64)], 0, np.empty(0, np.int32)
        for begin in range(0, len(source), _CHUNK):
            rows_N = self._rows(begin)
            shard_N = np.concatenate([last_shard, source.shard_I[rows_N]])
            new_N = np.flatnonzero(shard_N[1:] != shard_N[:-1]) + 1 - len(last_shard)
            block_ends.append(num_so_far + new_N)
            nums.append(len(rows_N))
            num_so_far, last_shard = num_so_far + len(rows_N), shard_N[-1:]
            too_long_N = source.tokens_I[begin : begin + _CHUNK] > seq_length
            self.num_too_long += int(too_long_N.sum())
            too_visual_N = source.visual_I[begin : begin + _CHUNK] > visual_seq_length
            self.num_too_visual += int((~too_long_N & too_visual_N).sum())
        self._chunk_ends = np.cumsum(nums, dtype=np.int64)
        self.block_ends_B = np.concatenate(block_ends)

    def __len__(self) -> int:
        return int(self._chunk_ends[-1]) if len(self._chunk_ends) else 0

    def at(self, places_I: NDArray[np.integer]) -> NDArray[np.int64]:
        """The rows at some places, in any order."""
        chunk_I = np.searchsorted(self._chunk_ends, places_I, side="right")
        order_I = np.argsort(chunk_I, kind="stable")
        chunks, begins = np.unique(chunk_I[order_I], return_index=True)
        rows_I = np.empty(len(places_I), np.int64)
        for chunk, asked in zip(chunks.tolist(), np.split(order_I, begins)[1:], strict=True):
            first = int(self._chunk_ends[chunk - 1]) if chunk else 0
            rows_I[asked] = self._rows(chunk * _CHUNK)[places_I[asked] - first]
        return rows_I

    def chunks(self) -> Iterator[NDArray[np.int64]]:
        """All rows, part by part."""
        return (self._rows(begin) for begin in range(0, len(self._source), _CHUNK))

    def _rows(self, begin: int) -> NDArray[np.int64]:
        """The usable rows among `begin` to `begin + _CHUNK`, counted by shard."""
        if self._row_by_shard is None:
            part: slice | NDArray[np.int64] = slice(begin, begin + _CHUNK)
        else:
            part = self._row_by_shard[begin : begin + _CHUNK]
        tokens_N, visual_N = self._source.tokens_I[part], self._source.visual_I[part]
        found_N = np.flatnonzero(
            (tokens_N > 0) & (tokens_N <= self._seq_length) & (visual_N <= self._visual_seq_length)
        )
        return found_N + begin if isinstance(part, slice) else part[found_N]


def _is_sorted(values_I: NDArray[np.int32]) -> bool:
    parts = (values_I[begin : begin + _CHUNK + 1] for begin in range(0, len(values_I), _CHUNK))
    return all(bool(np.all(part[1:] >= part[:-1])) for part in parts)
