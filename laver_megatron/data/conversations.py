"""What a sample's JSON says: its turns, where pictures belong in them, and whether there is something to learn from.

A conversation is a list of {"role": "system" | "user" | "assistant", "content": text}, with IMAGE_PLACEHOLDER in the
text where a picture belongs.
"""

import json
from collections.abc import Sequence

from laver_megatron.data.faults import Fault, SampleFault

IMAGE_PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_IMAGE_PARTS = ("image", "image_url")

Message = dict[str, str]


def parse_conversation(content: bytes | str, name: str) -> list[Message]:
    """The messages of a sample's JSON; see `read_conversation` for the accepted forms.

    name: shard and key, for messages.

    Raises:
        SampleFault: not JSON, no turns, an unknown role, text that is not text.
    """
    return read_conversation(parse_json(content, name), name)


def parse_json(content: bytes | str, name: str) -> object:
    """The parsed document.

    Raises:
        SampleFault: not JSON, brackets nested too deep, or half a surrogate pair, which no UTF-8 file can hold.
    """
    try:
        document = json.loads(content)
        if ("\\ud" if isinstance(content, str) else b"\\ud") in content.lower():  # type: ignore[operator]
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise SampleFault(Fault.invalid_json, f"{name}: not valid JSON ({error})") from error
    return document


def read_conversation(document: object, name: str) -> list[Message]:
    """The messages of a parsed document as [{"role": system|user|assistant, "content": text}, ...].

    Accepts a bare list of turns or an object with `conversations` or `messages`; turns as {"from", "value"} or
    {"role", "content"}; human/gpt for user/assistant; a text, or a list of parts {"type": "text", "text"} and
    {"type": "image" | "image_url"}, of which the pictures become IMAGE_PLACEHOLDER.

    Raises:
        SampleFault: no turns, an unknown role, text that is not text.
    """
    turns = turns_of(document)
    if not isinstance(turns, list) or not turns:
        raise SampleFault(
            Fault.no_turns, f"{name}: expected a list of turns, or an object with `conversations` or `messages`"
        )
    return [_message(turn, number, name) for number, turn in enumerate(turns)]


def turns_of(document: object) -> object:
    """What stands where the list of turns should be."""
    if isinstance(document, dict):
        return document.get("conversations", document.get("messages"))
    return document


def check_conversation(messages: Sequence[Message], num_images: int, name: str) -> None:
    """Holds a conversation against its images and asks for answers.

    Raises:
        SampleFault: more or fewer `<image>` than images, an answer without words, no answer at all.
    """
    found = count_placeholders(messages)
    if found != num_images:
        raise SampleFault(
            Fault.image_count, f"{name}: {found} {IMAGE_PLACEHOLDER} in the text but {num_images} pictures"
        )
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise SampleFault(Fault.no_answer, f"{name}: no turn of an assistant")
    if not all(answer.strip() for answer in answers):
        raise SampleFault(Fault.empty_answer, f"{name}: an answer without words")


def count_placeholders(messages: Sequence[Message]) -> int:
    """`<image>` in all turns."""
    return sum(message["content"].count(IMAGE_PLACEHOLDER) for message in messages)


def place_images(messages: Sequence[Message], num_images: int) -> list[Message]:
    """The conversation with its pictures before the first user's text if no text says where they belong, as LLaVA
    does it. A conversation with any `<image>`, or without a user, stays as it is."""
    first = next((place for place, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None or not num_images or count_placeholders(messages):
        return list(messages)
    text = f"{IMAGE_PLACEHOLDER}\n" * num_images + messages[first]["content"]
    return [*messages[:first], {"role": "user", "content": text}, *messages[first + 1 :]]


def _message(turn: object, number: int, name: str) -> Message:
    if not isinstance(turn, dict):
        raise SampleFault(Fault.no_turns, f"{name}: turn {number} is not an object")
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(role, str) or role not in _ROLES:
        raise SampleFault(
            Fault.unknown_role, f"{name}: turn {number} has the role {role!r:.40}; known are {', '.join(_ROLES)}"
        )
    if isinstance(text, list):
        text = "".join(_part(part, number, name) for part in text)
    if not isinstance(text, str):
        raise SampleFault(
            Fault.text_not_string, f"{name}: the text of turn {number} is {type(text).__name__}, not a string"
        )
    return {"role": _ROLES[role], "content": text}


def _part(part: object, number: int, name: str) -> str:
    """A part of a message as text."""
    kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
    if kind in _IMAGE_PARTS:
        return IMAGE_PLACEHOLDER
    if kind != "text" or not isinstance(text, str):
        raise SampleFault(
            Fault.text_not_string,
            f"{name}: turn {number} has a part of the type {kind!r:.40}; known are text and image",
        )
    return text
