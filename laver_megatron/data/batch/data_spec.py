"""What a reader of packs is opened with."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from laver_megatron.config.fields import Config
from laver_megatron.data.index.counts import Limits
from laver_megatron.data.read.shard_cache import ShardCache


@dataclass(frozen=True)
class DataSpec:
    """The data of a reader, and how packs are made of them.

    Attributes:
        paths: folders of shards, indexes, tars, globs or URLs.
        seq_length: tokens of a pack.
        visual_seq_length: visual tokens that a pack can hold; 0: proposed from the data.
        seed: of the order of the samples.
        num_workers: processes that index, count and make packs; 0: the caller does.
        weights: repeats of each of `paths` in an epoch; None: one.
        window: samples that are shuffled and packed together.
        long_samples: "skip", or "drop_turns" to shorten samples that do not fit.
        needs_images: whether data without a single image that fits are an error, as with LaVer.
        max_bad_fraction: share of the samples that may be unusable.
        visual_multiple_of: what a proposed `visual_seq_length` is a multiple of.
        pixel_dtype: in which workers make pixels.
        cache: of remote shards; without it there can be none.
    """

    paths: Sequence[str | Path]
    seq_length: int
    visual_seq_length: int
    seed: int
    num_workers: int = 0
    weights: Sequence[float] | None = None
    window: int = 10_000
    long_samples: str = "skip"
    needs_images: bool = False
    max_bad_fraction: float = 0.01
    visual_multiple_of: int = 1
    pixel_dtype: torch.dtype = torch.float32
    cache: ShardCache | None = None

    def __post_init__(self) -> None:
        assert self.long_samples in ("skip", "drop_turns"), self.long_samples

    @classmethod
    def of(cls, config: Config, paths: Sequence[str | Path], *, training: bool = False) -> "DataSpec":
        """Of some data of a run. training: they are its training data, which have weights, and images with LaVer."""
        data = config.data
        folder = Path(data.shard_cache) if data.shard_cache else Path(tempfile.gettempdir()) / "laver_shards"
        return cls(
            paths,
            seq_length=data.seq_length,
            visual_seq_length=data.visual_seq_length,
            seed=config.training.seed,
            num_workers=data.num_workers,
            weights=data.data_weights if training else None,
            window=data.shuffle_window,
            long_samples=data.long_samples,
            needs_images=training and config.objective.laver,
            max_bad_fraction=data.max_bad_fraction,
            # Sequence parallelism splits the visual slots between the ranks.
            visual_multiple_of=config.parallel.tensor_model_parallel_size,
            pixel_dtype=torch.bfloat16 if config.training.bf16 else torch.float32,
            cache=ShardCache(folder, int(data.shard_cache_gb * 1e9), data.allow_pipe),
        )

    @property
    def limits(self) -> Limits:
        """(tokens, visual tokens) to which longer samples are shortened, if they are."""
        if self.long_samples == "skip":
            return None
        return self.seq_length, self.visual_seq_length or self.seq_length
