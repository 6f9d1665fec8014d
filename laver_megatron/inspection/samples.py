"""What the models are shown: pictures with a question, from files or from shards."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from laver_megatron.data.index.opening import open_indexes, path_problems
from laver_megatron.data.read.conversations import Message, parse_conversation
from laver_megatron.data.read.images import decode_image
from laver_megatron.data.read.sample_files import SampleFiles

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
DEFAULT_QUESTION = "Describe this picture."


@dataclass(frozen=True)
class Sample:
    """One conversation up to its first answer.

    Attributes:
        name: of the file, or the key in the shard.
        messages: with the places of the pictures; the last is a question.
        answer: what follows; None: whatever the model answers.
    """

    name: str
    messages: tuple[Message, ...]
    answer: str | None
    pictures: tuple[Image.Image, ...]


def samples_of_files(paths: Sequence[Path], question: str, answer: str | None) -> list[Sample]:
    """Each picture with the same question. paths: files, and folders of files by PICTURE_ENDINGS.

    Raises:
        ValueError: no file, or one that is no picture, is too large (`data.read.images.MAX_PIXELS`) or cannot be read.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURE_ENDINGS)
            if not found:
                raise ValueError(f"--images {path}: no pictures in this folder ({', '.join(PICTURE_ENDINGS)})")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"--images {path}: no such file or folder")
    messages = (Message("user", ("", f"\n{question}")),)
    samples = []
    for file in files:
        try:
            picture = decode_image(file.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"--images {file}: {error}") from error
        samples.append(Sample(file.name, messages, answer, (picture,)))
    return samples


def samples_of_shards(paths: Sequence[str], num_samples: int) -> list[Sample]:
    """Usable samples with pictures, spread evenly over the shards, always the same ones.

    Raises:
        ValueError: shards that are not there or hold too few samples, or a sample that cannot be read.
    """
    if problems := path_problems(paths):
        raise ValueError(f"--data-path: {'; '.join(problems)}")
    indexes = open_indexes(paths)
    places = [
        (index, row)
        for index in indexes
        for row in np.flatnonzero((index.fault_I == 0) & (index.num_images_I > 0)).tolist()
    ]
    if len(places) < num_samples:
        raise ValueError(f"--samples {num_samples}, but {', '.join(paths)} holds {len(places)} usable ones with images")
    files = SampleFiles()
    samples = []
    for place in np.linspace(0, len(places) - 1, num_samples).round().astype(int):
        index, row = places[place]
        entry = index.sample(row)
        text, *contents = files.read(index.shards[index.shard_I[row]], entry)
        messages = parse_conversation(text, len(contents), entry.name).messages
        number = next((i for i, message in enumerate(messages) if message.role == "assistant"), len(messages))
        num_shown = sum(message.num_images for message in messages[:number])
        if num_shown == 0:
            raise ValueError(f"{entry.name}: no picture before the first answer; leave this sample out of the shards")
        answer = messages[number].content if number < len(messages) else None
        pictures = tuple(decode_image(content) for content in contents[:num_shown])
        samples.append(Sample(entry.key, tuple(messages[:number]), answer, pictures))
    files.close()
    return samples
