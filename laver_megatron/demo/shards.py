"""Writes examples as WebDataset shards: KEY.json, and KEY.jpg, or KEY.0.png, KEY.1.png, ..."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

from webdataset import TarWriter

from laver_megatron.demo.questions import Example

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def write_shards(directory: Path, split: str, examples: Sequence[Example], samples_per_shard: int) -> None:
    """Writes `SPLIT-00000.tar`, ...: two samples in five with PNG, the others with JPEG; one in seven with a
    bare list of {"role", "content"}, the others with an object in LLaVA's form."""
    for start in range(0, len(examples), samples_per_shard):
        path = directory / f"{split}-{start // samples_per_shard:05d}.tar"
        with TarWriter(str(path), encoder=False, mtime=0) as tar:
            for number, example in enumerate(examples[start : start + samples_per_shard], start):
                tar.write(_files(f"{split}-{number:06d}", number, example))


def _files(key: str, number: int, example: Example) -> dict[str, str | bytes]:
    conversation: object = {"id": key, "conversations": example.conversation}
    if number % 7 == 3:
        conversation = [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in example.conversation]
    files: dict[str, str | bytes] = {"__key__": key, "json": json.dumps(conversation).encode()}
    extension = "png" if number % 5 < 2 else "jpg"
    for index, image in enumerate(example.images):
        prefix = f"{index}." if len(example.images) > 1 else ""
        buffer = io.BytesIO()
        image.save(buffer, "PNG" if extension == "png" else "JPEG", quality=88)  # PNG, which is exact, has none
        files[prefix + extension] = buffer.getvalue()
    return files
