"""What the iterations of a run will hold, counted exactly from the plan of its packs before it starts.

Packs are a pure function of the data, so tokens, images and mask areas of every iteration are known without reading a
picture. The run's own counts differ only where samples turn out to be unreadable.

Letters: I samples, P packs, K pictures of all samples, C counts of COUNTS.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from laver_megatron.config.fields import Config
from laver_megatron.data.batch.pack_reader import PackReader
from laver_megatron.data.index.shard_index import ShardIndex
from laver_megatron.data.plan.sizes import SampleSizes
from laver_megatron.encoders import ImagePreprocessor
from laver_megatron.flops.encoder import window_area
from laver_megatron.flops.step import ModelFlops, StepFlops, step_flops

# What `step_flops` asks for.
COUNTS = (
    "num_tokens", "lm_span_area", "num_visual_tokens", "reconstruction_span_area", "num_images", "image_window_area",
)  # fmt: skip


class IterationCounts:
    """Sums of COUNTS over the first iterations of a run.

    Args:
        config: of any run on these data; only its batch and attention matter.
        window_tokens: side of the encoder's windows, None if it has none.
    """

    def __init__(self, reader: PackReader, config: Config, window_tokens: int | None = None) -> None:
        self.plan, self.global_batch_size = reader.plan, config.data.global_batch_size
        self._counts_IC = np.concatenate([
            _sample_counts(index, source, reader.maker.preprocessor, config.model.attention, window_tokens)
            for index, source in zip(reader.maker.indexes, self.plan.sources, strict=True)
        ])  # fmt: skip
        self._sums_PC = np.zeros((1, len(COUNTS)), np.int64)  # of the packs before each one, as far as they are known
        self._next_window = 0

    @property
    def epoch_tokens(self) -> int:
        """Tokens of the first epoch."""
        return self._sums_before(self.plan.num_packs())["num_tokens"]

    def iterations_in(self, epochs: float) -> int:
        """Whole iterations of so many epochs, all as long as the first."""
        return int(epochs * self.plan.num_packs() / self.global_batch_size)

    def epochs(self, num_iterations: int) -> float:
        """How often these iterations go through the data."""
        return num_iterations * self.global_batch_size / self.plan.num_packs()

    def counts(self, num_iterations: int) -> dict[str, int]:
        """The sums over the first iterations, by the names of COUNTS."""
        return self._sums_before(num_iterations * self.global_batch_size)

    def flops(self, model: ModelFlops, config: Config, num_iterations: int) -> StepFlops:
        """Of the first iterations, by the convention of `flops/`: what the run's summary will say."""
        return step_flops(
            model,
            **self.counts(num_iterations),
            laver=config.objective.laver,
            gram=config.objective.gram_loss != "none",
            frozen=config.model.freeze,
        )

    def _sums_before(self, pack: int) -> dict[str, int]:
        while len(self._sums_PC) <= pack:
            packs = self.plan.window_packs(self._next_window)
            self._next_window += 1
            counts_PC = np.add.reduceat(self._counts_IC[packs.sample_id_I], packs.begin_P[:-1], axis=0)
            self._sums_PC = np.concatenate([self._sums_PC, self._sums_PC[-1] + np.cumsum(counts_PC, axis=0)])
        return dict(zip(COUNTS, self._sums_PC[pack].tolist(), strict=True))


def _sample_counts(
    index: ShardIndex, source: SampleSizes, preprocessor: ImagePreprocessor, attention: str, window_tokens: int | None
) -> NDArray[np.int64]:
    """COUNTS of every sample as a separate document, int64 `[I, C]`; meaningless for unusable samples."""
    sizes, size_K = np.unique(
        np.stack([index.image_width_P, index.image_height_P], axis=1), axis=0, return_inverse=True
    )
    # 0 x 0 is a picture whose size could not be read; its sample is never planned.
    grids = [preprocessor.grid(width, height) if width else (0, 0) for width, height in sizes.tolist()]
    tokens_K, windows_K = (
        np.array([count(grid) for grid in grids], np.int64)[size_K.reshape(-1)]
        for count in (lambda grid: grid[0] * grid[1], lambda grid: window_area([grid], window_tokens))
    )
    tokens_I, visual_I = source.tokens_I.astype(np.int64), source.visual_I.astype(np.int64)
    # A sample that was shortened has lost its last pictures.
    sample_K = np.repeat(np.arange(len(index)), index.num_images_I)
    before_K = np.cumsum(tokens_K) - tokens_K
    first_I = np.append(before_K, 0)[index.image_start_I[:-1]]
    kept_K = before_K + tokens_K - first_I[sample_K] <= visual_I[sample_K]

    def sums(values_K: NDArray[np.int64]) -> NDArray[np.int64]:
        sums_I = np.zeros(len(index), np.int64)
        np.add.at(sums_I, sample_K[kept_K], values_K[kept_K])
        return sums_I

    area_I = tokens_I * (tokens_I + 1) // 2  # as `flops.document_area`
    if attention == "mixed":
        area_I += sums(tokens_K * (tokens_K - 1) // 2)
    images_I = sums(np.ones_like(tokens_K))
    return np.stack([tokens_I, area_I, visual_I, sums(tokens_K**2), images_I, sums(windows_K)], axis=1)
