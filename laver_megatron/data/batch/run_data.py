"""The training and validation data of a run: readers of packs, on the ranks that read."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from laver_megatron.config.fields import Config
from laver_megatron.data.batch.broadcast import is_reader
from laver_megatron.data.batch.data_spec import DataSpec
from laver_megatron.data.batch.pack_reader import PackReader, open_reader
from laver_megatron.encoders import open_preprocessor
from laver_megatron.hf.tokenizer import load_tokenizer

Result = TypeVar("Result")

# Indexing and counting the tokens of many million samples takes hours, longer than any collective may.
_LONGEST_OPENING = timedelta(days=2)


def open_data(
    config: Config, model_dir: Path, encoder_dir: Path
) -> tuple[Config, PackReader | None, PackReader | None]:
    """Opens the training and the validation data of a run. Collective.

    Returns:
        The configuration, with the visual_seq_length that the training data propose if it was 0; the reader of the
        training data and that of the validation data, each None on ranks that do not read or without such data.

    Raises:
        ValueError: see `open_reader`.
    """
    data = config.data

    def reader_of(paths: Sequence[str], *, training: bool = False) -> PackReader | None:
        spec = DataSpec.of(config, paths, training=training)
        return _after_rank_0(
            lambda: open_reader(spec, load_tokenizer(model_dir), open_preprocessor(encoder_dir, data.max_image_tokens))
        )

    reader = reader_of(data.data_path, training=True)
    if data.visual_seq_length == 0:
        proposed = [reader.visual_seq_length if reader else 0]
        dist.broadcast_object_list(proposed, src=0)
        config = config.replace(visual_seq_length=proposed[0])
    validation = reader_of(data.valid_data_path) if data.valid_data_path else None
    return config, reader, validation


def _after_rank_0(work: Callable[[], Result]) -> Result | None:
    """Runs `work` on the ranks that read, on rank 0 first, whose indexes and counts the others then find on the disk.
    If it fails on rank 0, it fails on all ranks with the same message."""
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
