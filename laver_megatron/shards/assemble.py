"""A sample as it was found to the files of one key in a shard: KEY.json with KEY.jpg, or KEY.0.png, KEY.1.jpg, ..."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from laver_megatron.data.read.conversations import Conversation, Message, read_conversation
from laver_megatron.data.read.record_keys import IMAGES_IN_ANSWERS, add_keys
from laver_megatron.shards.found import FoundSample
from laver_megatron.shards.pictures import Picture, prepare_picture
from laver_megatron.shards.report import Report

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
    images_in_answers: whether `<image>` in an answer stands for a picture, in every record.
    """

    decode: bool = False
    tokenizer: Tokenizer | None = None
    images_in_answers: bool = False

    def make(self, found: FoundSample, key: str, report: Report) -> Sample:
        """The sample under its new key.

        Raises:
            SampleFault: what makes the sample unusable; the report then stays as it was.
        """
        conversation = read_conversation(
            found.conversation, len(found.pictures), found.name, images_in_answers=self.images_in_answers
        )
        pictures = tuple(prepare_picture(content, found.name, self.decode) for content in found.pictures)
        text = _text(found, conversation, key)
        report.num_samples += 1
        report.num_images += len(pictures)
        report.num_image_bytes += sum(len(picture.content) for picture in pictures)
        report.num_text_bytes += len(text)
        report.num_placed += conversation.is_placed
        report.num_converted += sum(p.content is not old for p, old in zip(pictures, found.pictures, strict=True))
        report.num_dropped_turns += found.num_dropped_turns
        report.num_untrained += sum(m.role == "assistant" and not m.is_trained for m in conversation.messages)
        add_keys(report.other_keys, conversation.other_keys + Counter(found.unread_keys))
        add_keys(report.ignored, Counter(found.ignored))
        self._count_text(conversation.messages, report)
        return Sample(key, text, pictures)

    def _count_text(self, messages: Sequence[Message], report: Report) -> None:
        texts = ["".join(message.texts) for message in messages]
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


def _text(found: FoundSample, conversation: Conversation, key: str) -> bytes:
    document: dict[str, object] = {"id": key if found.sample_id is None else found.sample_id}
    if found.origin is not None:
        document["source"] = found.origin
    if conversation.images_in_answers:
        document[IMAGES_IN_ANSWERS] = True
    document["conversations"] = [_turn(message) for message in conversation.messages]
    return json.dumps(document, ensure_ascii=False).encode()


def _turn(message: Message) -> dict[str, str | bool]:
    turn: dict[str, str | bool] = {"from": _SPEAKERS[message.role], "value": message.content}
    return {**turn, "loss": False} if message.role == "assistant" and not message.is_trained else turn
