"""Bytes of pictures and conversations for shards made to order."""

import io
import json

from PIL import Image

from laver_megatron.data.read.conversations import Message


def picture_bytes(size: tuple[int, int] = (40, 30), extension: str = "jpeg", **options) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(buffer, extension, **options)
    return buffer.getvalue()


def question(text: str = "<image>\nWhat is it?", answer: str = "Noise.") -> bytes:
    return json.dumps([{"role": "user", "content": text}, {"role": "assistant", "content": answer}]).encode()


def messages_of(turns: list[str]) -> list[Message]:
    """messages_of(["user: <image> Q", "assistant: A"]): every `<image>` is the place of a picture."""
    parts = [turn.split(": ", 1) for turn in turns]
    return [Message(role, tuple(text.split("<image>")), role == "assistant") for role, text in parts]


def read_member(sample, member) -> bytes:
    """The bytes of a member of an indexed sample, from its local shard."""
    with open(sample.shard, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)
