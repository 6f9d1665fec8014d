"""A sample as it was found to the files of one key in a shard: KEY.json with KEY.jpg, or KEY.0.png, KEY.1.jpg, ..."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from laver_megatron.data.conversations import (
    IMAGE_PLACEHOLDER,
    Message,
    check_conversation,
    place_images,
    read_conversation,
)
from laver_megatron.data.make.found import FoundSample
from laver_megatron.data.make.pictures import Picture, prepare_picture
from laver_megatron.data.make.report import Report

_SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}


@dataclass(frozen=True, slots=True)
class Sample:
    """What a shard holds of a sample. text: of KEY.json; members: (name, bytes) of all files, the text first."""

    key: str
    text: bytes
    pictures: tuple[Picture, ...]

    @property
    def extensions(self) -> list[str]:
        """Of the pictures: `jpg`, or `0.jpg`, `1.png`, ... if there are several."""
        several = len(self.pictures) > 1
        return [f"{n}.{image.extension}" if several else image.extension for n, image in enumerate(self.pictures)]

    @property
    def members(self) -> list[tuple[str, bytes]]:
        pictures = zip(self.extensions, self.pictures, strict=True)
        return [(f"{self.key}.json", self.text), *((f"{self.key}.{end}", image.content) for end, image in pictures)]


@dataclass(frozen=True)
class SampleMaker:
    """Makes samples for shards of found ones, and counts them.

    decode: whether every picture is decoded to its end. tokenizer: counts the text's tokens, if there is one.
    """

    decode: bool = False
    tokenizer: Tokenizer | None = None

    def make(self, found: FoundSample, key: str, report: Report) -> Sample:
        """The sample under its new key.

        Raises:
            SampleFault: what makes the sample unusable; the report then stays as it was.
        """
        as_found = read_conversation(found.conversation, found.name)
        messages = place_images(as_found, len(found.pictures))
        check_conversation(messages, len(found.pictures), found.name)
        pictures = tuple(prepare_picture(content, found.name, self.decode) for content in found.pictures)
        text = _text(found, messages, key)
        report.num_samples += 1
        report.num_images += len(pictures)
        report.num_image_bytes += sum(len(picture.content) for picture in pictures)
        report.num_text_bytes += len(text)
        report.num_placed += messages != as_found
        report.num_converted += sum(p.content is not old for p, old in zip(pictures, found.pictures, strict=True))
        report.num_dropped_turns += found.num_dropped_turns
        self._count_text(messages, report)
        return Sample(key, text, pictures)

    def _count_text(self, messages: Sequence[Message], report: Report) -> None:
        texts = [message["content"].replace(IMAGE_PLACEHOLDER, "") for message in messages]
        if self.tokenizer is None:
            report.num_words += sum(len(text.split()) for text in texts)
        else:
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            report.num_tokens += sum(len(encoding) for encoding in encodings)


def load_tokenizer(directory: Path | None) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory.

    Raises:
        ValueError: it has no readable tokenizer.json.
    """
    if directory is None:
        return None
    try:
        tokenizer = Tokenizer.from_str((directory / "tokenizer.json").read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"--tokenizer {directory}: cannot read its tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _text(found: FoundSample, messages: Sequence[Message], key: str) -> bytes:
    document: dict[str, object] = {"id": key if found.sample_id is None else found.sample_id}
    if found.origin is not None:
        document["source"] = found.origin
    document["conversations"] = [{"from": _SPEAKERS[m["role"]], "value": m["content"]} for m in messages]
    return json.dumps(document, ensure_ascii=False).encode()
