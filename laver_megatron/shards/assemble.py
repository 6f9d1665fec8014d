"""From a sample of a source to the files of one key in a shard: KEY.json with KEY.jpg, or KEY.0.png, KEY.1.jpg, ...

JPEG, PNG and WebP keep their bytes; GIF, BMP and TIFF become PNG, of an animation its first frame.
"""

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from laver_megatron.data.index.faults import SampleFault
from laver_megatron.data.read.conversations import Conversation, Message, read_conversation
from laver_megatron.data.read.images import decode_image, image_size
from laver_megatron.data.read.record_keys import FAMILY, IMAGES_IN_ANSWERS, add_keys
from laver_megatron.shards.record_source import FoundSample
from laver_megatron.shards.report import MakeReport

_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_RIFF_HEADER_BYTES = 8
_SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}


@dataclass(frozen=True, slots=True)
class Picture:
    """A file for a shard. extension: `jpg`, `png` or `webp`; width, height: in pixels, upright."""

    extension: str
    content: bytes
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Sample:
    """What a shard holds of a sample. text: of KEY.json."""

    key: str
    text: bytes
    pictures: tuple[Picture, ...]

    @property
    def extensions(self) -> list[str]:
        """Of the pictures: `jpg`, or `0.jpg`, `1.png`, ... if there are several."""
        several = len(self.pictures) > 1
        return [f"{n}.{image.extension}" if several else image.extension for n, image in enumerate(self.pictures)]


@dataclass(frozen=True)
class SampleMaker:
    """Makes samples for shards, and counts them.

    Args:
        decode: whether every picture is decoded to its end.
        tokenizer: counts the text's tokens, if there is one.
        images_in_answers: whether `<image>` in an answer stands for a picture, in every record.
    """

    decode: bool = False
    tokenizer: Tokenizer | None = None
    images_in_answers: bool = False

    def make(self, found: FoundSample, key: str, report: MakeReport) -> Sample:
        """The sample under its new key.

        Raises:
            SampleFault: why the sample is unusable; the report is then unchanged.
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

    def _count_text(self, messages: Sequence[Message], report: MakeReport) -> None:
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
    if conversation.family:
        document[FAMILY] = conversation.family
    if conversation.images_in_answers:
        document[IMAGES_IN_ANSWERS] = True
    document["conversations"] = [_turn(message) for message in conversation.messages]
    return json.dumps(document, ensure_ascii=False).encode()


def _turn(message: Message) -> dict[str, str | bool]:
    turn: dict[str, str | bool] = {"from": _SPEAKERS[message.role], "value": message.content}
    return {**turn, "loss": False} if message.role == "assistant" and not message.is_trained else turn


def prepare_picture(content: bytes, name: str, decode: bool) -> Picture:
    """A picture for a shard, with its original bytes wherever training can read them.

    Args:
        decode: whether to decode it to its end. Otherwise its header is read, and only a file that does not end as its
            format requires is decoded, which finds truncated files but not garbled ones.

    Raises:
        SampleFault: unreadable_image, image_too_large or image_shape.
    """
    try:
        width, height = image_size(content)
        extension = _extension(content)
        if extension is None:
            content = _to_png(content)
            return Picture("png", content, *image_size(content))
        if decode or not _ends_well(content, extension):
            decode_image(content)
        return Picture(extension, content, width, height)
    except SampleFault as fault:
        raise SampleFault(fault.fault, f"{name}: {fault}") from fault


def _extension(content: bytes) -> str | None:
    if content.startswith(_JPEG_START):
        return "jpg"
    if content.startswith(_PNG_START):
        return "png"
    return "webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


def _ends_well(content: bytes, extension: str) -> bool:
    if extension == "webp":
        return int.from_bytes(content[4:8], "little") + _RIFF_HEADER_BYTES <= len(content)
    return content.endswith(_JPEG_END if extension == "jpg" else _PNG_END)


def _to_png(content: bytes) -> bytes:
    """The picture as training sees it, upright and opaque, without loss."""
    buffer = io.BytesIO()
    decode_image(content).save(buffer, "PNG")
    return buffer.getvalue()
