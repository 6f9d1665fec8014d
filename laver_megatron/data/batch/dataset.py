"""From a configuration to readers of packs, on the ranks that read."""

import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from laver_megatron.config.fields import Config
from laver_megatron.data.batch.broadcast import is_reader
from laver_megatron.data.batch.loader import PackReader, open_dataset
from laver_megatron.data.read.remote import ShardCache
from laver_megatron.encoders import open_preprocessor
from laver_megatron.hf.tokenizer import load_tokenizer

Result = TypeVar("Result")

# Indexing and counting the tokens of many million samples takes hours, longer than any collective may.
_LONGEST_OPENING = timedelta(days=2)


def open_data(
    config: Config, model_dir: Path, encoder_dir: Path
) -> tuple[Config, PackReader | None, PackReader | None]:
    """The readers of the training and the validation data (on ranks that do not read, and without validation data,
    None), and the configuration with the visual_seq_length that the training data propose, if it is 0. Collective.

    Raises:
        ValueError: see `open_dataset`.
    """
    reader = _after_rank_0(lambda: open_reader(config, config.data.data_path, model_dir, encoder_dir, training=True))
    if config.data.visual_seq_length == 0:
        proposed = [reader.visual_seq_length if reader else 0]
        dist.broadcast_object_list(proposed, src=0)
        config = config.replace(visual_seq_length=proposed[0])
    validation = None
    if config.data.valid_data_path:
        paths = config.data.valid_data_path
        validation = _after_rank_0(lambda: open_reader(config, paths, model_dir, encoder_dir))
    return config, reader, validation


def open_reader(
    config: Config, paths: Sequence[str], model_dir: Path, encoder_dir: Path, *, training: bool = False
) -> PackReader:
    """The reader of some data of a run. training: they are its training data, which have weights, and images with
    LaVer. Raises as `open_dataset` does."""
    data = config.data
    return open_dataset(
        paths,
        load_tokenizer(model_dir),
        open_preprocessor(encoder_dir, data.max_image_tokens),
        seq_length=data.seq_length,
        visual_seq_length=data.visual_seq_length,
        seed=config.training.seed,
        num_workers=data.num_workers,
        needs_images=training and config.objective.laver,
        weights=data.data_weights if training else None,
        window=data.shuffle_window,
        long_samples=data.long_samples,
        max_bad_fraction=data.max_bad_fraction,
        # Sequence parallelism splits the visual slots between the ranks.
        visual_multiple_of=config.parallel.tensor_model_parallel_size,
        cache=_shard_cache(config),
    )


def _shard_cache(config: Config) -> ShardCache:
    data = config.data
    folder = Path(data.shard_cache) if data.shard_cache else Path(tempfile.gettempdir()) / "laver_shards"
    return ShardCache(folder, int(data.shard_cache_gb * 1e9), data.allow_pipe)


def _after_rank_0(work: Callable[[], Result]) -> Result | None:
    """Runs `work` on the ranks that read, on rank 0 first: the others find there what it has worked out. If it fails
    there, it fails everywhere for the same reason."""
    group = dist.new_group(backend="gloo", timeout=_LONGEST_OPENING)
    is_first = dist.get_rank() == 0
    result, problem = None, [""]
    if is_first:
        try:
            result = work()
        except (ValueError, OSError) as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0, group=group, device=torch.device("cpu"))
    dist.destroy_process_group(group)
    if problem[0]:
        raise ValueError(problem[0])
    return work() if is_reader() and not is_first else result
