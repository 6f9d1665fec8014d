"""Scores an exported model's answers to samples of shards: exact match, by family, with right and wrong pictures."""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from tqdm import tqdm

from laver_megatron.data.index.faults import SampleFault
from laver_megatron.data.index.opening import open_indexes
from laver_megatron.data.index.shard_index import Shard, ShardSample
from laver_megatron.data.read.conversations import Message, parse_json, read_conversation
from laver_megatron.data.read.images import decode_image
from laver_megatron.data.read.sample_files import SampleFiles
from laver_megatron.tasks.contrast import blank_like

RIGHT, BLANK, SWAPPED = KINDS = ("right", "blank", "swapped")
NO_FAMILY = "-"  # in tables
_SEED = 1  # of the choice of samples


class Answering(Protocol):
    """A model that says what comes next in a conversation."""

    def answer(
        self, asked: Sequence[Message], pictures: Sequence[Image.Image], *, contrast: float, max_new_tokens: int
    ) -> str: ...


@dataclass(frozen=True)
class Sample:
    """A sample to score.

    Attributes:
        chance: the share of right answers that guessing gets, None where the record names none.
        read_pictures: decodes them anew, so that only those in use take memory.
    """

    key: str
    family: str
    chance: float | None
    messages: tuple[Message, ...]
    num_pictures: int
    read_pictures: Callable[[], tuple[Image.Image, ...]]


def normalised(answer: str) -> str:
    """Lower case, single spaces, without a full stop at the end."""
    return " ".join(answer.lower().split()).rstrip(".").rstrip()


def read_samples(paths: Sequence[str], most: int | None) -> tuple[list[Sample], int]:
    """The usable samples of shards, at most so many, chosen at random but always the same; and how many were unusable.

    Raises:
        ValueError: no samples, or shards that cannot be opened.
    """
    indexes = open_indexes(paths)
    rows = [(index, row) for index in indexes for row in range(len(index))]
    if most is not None and most < len(rows):
        rows = [rows[number] for number in sorted(random.Random(_SEED).sample(range(len(rows)), most))]
    files, samples = SampleFiles(), []
    for index, row in rows:
        sample, shard = index.sample(row), index.shards[index.shard_I[row]]
        try:
            text, *contents = files.read(shard, sample)
            record = parse_json(text, sample.name)
            conversation = read_conversation(record, len(contents), sample.name)
            _decode(contents)
        except SampleFault:
            continue
        chance = record.get("chance") if isinstance(record, dict) else None
        family = conversation.family or NO_FAMILY
        known = float(chance) if isinstance(chance, int | float) and 0 <= chance <= 1 else None
        read = partial(_read_pictures, files, shard, sample)
        samples.append(Sample(sample.key, family, known, conversation.messages, len(contents), read))
    if not samples:
        raise ValueError(f"{', '.join(map(str, paths))}: none of {len(rows)} samples can be used")
    return samples, len(rows) - len(samples)


def _read_pictures(files: SampleFiles, shard: Shard, sample: ShardSample) -> tuple[Image.Image, ...]:
    return _decode(files.read(shard, sample)[1:])


def _decode(contents: Sequence[bytes]) -> tuple[Image.Image, ...]:
    return tuple(decode_image(content) for content in contents)


def swap_partners(samples: Sequence[Sample]) -> list[Sample]:
    """For each sample the next with as many pictures, of its family if there is another one.

    Raises:
        ValueError: a sample has no other to swap with.
    """
    of_family, of_number = defaultdict(list), defaultdict(list)
    for place, sample in enumerate(samples):
        of_family[sample.family, sample.num_pictures].append(place)
        of_number[sample.num_pictures].append(place)
    found = []
    for place, sample in enumerate(samples):
        number = sample.num_pictures
        group = of_family[sample.family, number]
        group = group if len(group) > 1 else of_number[number]
        if number and len(group) == 1:
            raise ValueError(
                f"sample {sample.key!r} is the only one with {number} pictures: none to swap with; take more samples, "
                "or --images without swapped"
            )
        found.append(samples[group[(group.index(place) + 1) % len(group)]])
    return found


def score(
    model: Answering,
    samples: Sequence[Sample],
    *,
    images: Sequence[str] = (RIGHT,),
    contrast: float = 0.0,
    max_new_tokens: int = 32,
) -> list[dict[str, Any]]:
    """Every answer that a sample asks for, one record each: key, family, chance, expected and, by kind of pictures,
    what the model said. Later turns see the expected answers to the earlier ones.

    Raises:
        ValueError: a sample that cannot be answered, by its key.
    """
    partners = swap_partners(samples) if SWAPPED in images else []
    answers = []
    for place, sample in enumerate(tqdm(samples, desc="scoring", unit="sample", disable=not sys.stderr.isatty())):
        try:
            right = sample.read_pictures()
            shown = {RIGHT: right, BLANK: tuple(map(blank_like, right))}
            if partners:
                shown[SWAPPED] = partners[place].read_pictures()
        except (SampleFault, OSError) as error:  # it could be read before
            raise ValueError(f"sample {sample.key!r}: its pictures have changed meanwhile: {error}") from error
        for asked, expected in _questions(sample.messages):
            said = {}
            for kind in images:
                num_before = sum(message.num_images for message in asked)
                pictures = shown[kind][:num_before]
                try:
                    said[kind] = model.answer(asked, pictures, contrast=contrast, max_new_tokens=max_new_tokens)
                except ValueError as error:
                    raise ValueError(f"sample {sample.key!r} with {kind} pictures: {error}") from error
            answers.append(
                {"key": sample.key, "family": sample.family, "chance": sample.chance, "expected": expected, **said}
            )
    return answers


def _questions(messages: Sequence[Message]) -> Iterator[tuple[Sequence[Message], str]]:
    for place, message in enumerate(messages):
        if message.is_trained:
            yield messages[:place], message.content


def by_family(answers: Sequence[dict[str, Any]], images: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each family and of `all`: num_answers, chance (None where unknown), and by kind of pictures the accuracy and,
    beside the right ones, how often the answer is the same as with those (`same_KIND`)."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for answer in answers:
        groups[answer["family"]].append(answer)
    table = {}
    for family, group in [*sorted(groups.items()), ("all", list(answers))]:
        chances = [answer["chance"] for answer in group]
        row: dict[str, Any] = {"num_answers": len(group)}
        row["chance"] = None if None in chances else sum(chances) / len(chances)
        for kind in images:
            row[kind] = _share(normalised(it[kind]) == normalised(it["expected"]) for it in group)
            if kind != RIGHT and RIGHT in images:
                row[f"same_{kind}"] = _share(normalised(it[kind]) == normalised(it[RIGHT]) for it in group)
        table[family] = row
    return table


def _share(are: Iterator[bool]) -> float:
    values = list(are)
    return sum(values) / len(values)


def table_lines(table: dict[str, dict[str, Any]]) -> list[str]:
    """The table in text."""
    columns = list(table["all"])
    width = max(map(len, table))
    lines = [f"{'family':{width}}" + "".join(f"  {name:>12}" for name in columns)]
    for family, row in table.items():
        cells = ("-" if row[it] is None else f"{row[it]:.4f}" if it != "num_answers" else row[it] for it in columns)
        lines.append(f"{family:{width}}" + "".join(f"  {cell:>12}" for cell in cells))
    return lines


def write_description(options: dict[str, Any], num_unusable: int, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of the JSON file."""
    images = options["images"]
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return {**plain, "num_unusable": num_unusable, "table": by_family(answers, images), "answers": list(answers)}
