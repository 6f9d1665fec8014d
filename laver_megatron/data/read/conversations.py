"""What a sample's JSON says: its turns, where images belong in them, and which answers are trained.

An `<image>` in the text of a user or the system is the place of an image, and so is a message part of type `image`. If
there is no such place, images go before the first question, as in LLaVA. In an answer `<image>` is plain text unless
the record says `images_in_answers: true`. In a record without images it is plain text too (a question about the HTML
tag) if it stands inside a line or in a code block; at the start or end of a line it is taken for the place of a missing
image, and the record is refused.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from laver_megatron.data.index.faults import Fault, SampleFault
from laver_megatron.data.read.record_keys import (
    IMAGE_PARTS,
    allows_images_in_answers,
    check_part,
    check_record,
    check_role,
    check_turn,
    family_of,
    first_present,
    is_to_train,
    named_pictures,
    other_keys,
    shown,
    system_texts,
)

IMAGE_PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# At the start or end of a line, where records place what they show.
_PLACED = re.compile(r"^[ \t]*<(image|video|audio)>|<(image|video|audio)>[ \t]*$", re.MULTILINE)
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: system, user or assistant.
        texts: with a picture between each two of them.
        is_trained: whether this is an answer that is not excluded from training.
    """

    role: str
    texts: tuple[str, ...]
    is_trained: bool = False

    @property
    def num_images(self) -> int:
        return len(self.texts) - 1

    @property
    def content(self) -> str:
        """The text with IMAGE_PLACEHOLDER for each picture."""
        return IMAGE_PLACEHOLDER.join(self.texts)


@dataclass(frozen=True)
class Conversation:
    """What a record says.

    Attributes:
        is_placed: its pictures were put before the first question, because no text says where they belong.
        images_in_answers: whether the record says that `<image>` in an answer is a picture.
        other_keys: unused keys, with counts.
        family: the kind of question; empty if the record names none.
    """

    messages: tuple[Message, ...]
    is_placed: bool
    images_in_answers: bool
    other_keys: Counter[str]
    family: str = ""


def parse_conversation(content: bytes | str, num_images: int, name: str) -> Conversation:
    """`read_conversation` of a sample's JSON.

    Raises:
        SampleFault: not JSON, and what `read_conversation` refuses.
    """
    return read_conversation(parse_json(content, name), num_images, name)


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


def read_conversation(document: object, num_images: int, name: str, *, images_in_answers: bool = False) -> Conversation:
    """The conversation of a parsed document that comes with `num_images` pictures.

    Accepts a bare list of turns or an object with `conversations` or `messages`; turns as {"from", "value"} or {"role",
    "content"}; human/gpt for user/assistant; a text, or a list of parts {"type": "text", "text"} and {"type": "image" |
    "image_url"}. Null counts as absent. docs/data.md has the table of keys.

    Args:
        name: shard and key, for messages.
        images_in_answers: treat the record as if it said so.

    Raises:
        SampleFault: no turns, an unknown role, text that is not a string, what this trainer cannot learn from (video,
            audio, tools, fractional weights), different numbers of places and images, an empty answer, no answer to
            train.
    """
    record = document if isinstance(document, dict) else {"conversations": document}
    turns = turns_of(record)
    if not isinstance(turns, list) or not turns:
        expected = "expected a list of turns, or an object with `conversations` or `messages`"
        raise SampleFault(Fault.no_turns, f"{name}: {expected}, not {_kind(turns, record)}")
    check_record(record, name)
    named = named_pictures(record, name)
    if named and len(named) != num_images:
        raise SampleFault(Fault.image_count, f"{name}: it names {_pictures(len(named))} but has {num_images}")
    images_in_answers = allows_images_in_answers(record, name) or images_in_answers
    messages = _with_system(system_texts(record, name), [_message(turn, i, name) for i, turn in enumerate(turns)])
    messages, is_placed = _place_images(messages, num_images, images_in_answers, name)
    _check_answers(messages, name)
    return Conversation(tuple(messages), is_placed, images_in_answers, other_keys(record, turns), family_of(record))


def turns_of(document: object) -> object:
    """What stands where the list of turns should be."""
    return first_present(document, "conversations", "messages") if isinstance(document, dict) else document


def image_parts(turns: object) -> Iterator[dict]:
    """The parts of messages that are pictures, wherever a document has any."""
    for turn in turns if isinstance(turns, list) else []:
        content = first_present(turn, "value", "content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") in IMAGE_PARTS:
                yield part


def _message(turn: object, number: int, name: str) -> Message:
    if not isinstance(turn, dict):
        raise SampleFault(Fault.no_turns, f"{name}: turn {number} is not an object")
    role = first_present(turn, "from", "role")
    check_role(role, number, name)
    check_turn(turn, number, name)
    if not isinstance(role, str) or role not in _ROLES:
        raise SampleFault(
            Fault.unknown_role, f"{name}: turn {number} has the role {role!r:.40}; known are {', '.join(_ROLES)}"
        )
    texts = _texts(first_present(turn, "value", "content"), number, name)
    return Message(_ROLES[role], texts, is_to_train(turn, number, name) and _ROLES[role] == "assistant")


def _texts(content: object, number: int, name: str) -> tuple[str, ...]:
    """The texts of a turn, cut where a part is a picture."""
    texts = [""]
    for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind in IMAGE_PARTS:
            texts.append("")
            continue
        check_part(kind, number, name)
        if kind != "text":
            raise SampleFault(
                Fault.text_not_string,
                f"{name}: turn {number} has a part of the type {kind!r:.40}; known are text and image",
            )
        if not isinstance(text, str):
            message = f"{name}: the text of turn {number} is {type(text).__name__}, not a string"
            raise SampleFault(Fault.text_not_string, message)
        texts[-1] += text
    return tuple(texts)


def _with_system(texts: Sequence[str], messages: list[Message]) -> list[Message]:
    """The record's own system texts before those of its system turn; the same text once."""
    if messages and messages[0].role == "system":
        first, *others = messages
        before = [text for text in texts if text != first.content]
        return [replace(first, texts=("\n".join([*before, first.texts[0]]), *first.texts[1:])), *others]
    return [Message("system", ("\n".join(texts),)), *messages] if texts else messages


def _split(messages: Sequence[Message], images_in_answers: bool) -> list[Message]:
    """Every `<image>` as the place of a picture, in answers if they may show some."""
    return [
        replace(message, texts=tuple(piece for text in message.texts for piece in text.split(IMAGE_PLACEHOLDER)))
        if message.role != "assistant" or images_in_answers
        else message
        for message in messages
    ]


def _place_images(
    messages: list[Message], num_images: int, images_in_answers: bool, name: str
) -> tuple[list[Message], bool]:
    """The conversation with a place for each picture, and whether these places were added.

    Raises:
        SampleFault: the place of a video or audio; an image part in an answer; different numbers of places and images.
    """
    asking = [message for message in messages if message.role != "assistant" or images_in_answers]
    kinds = {kind for message in asking for text in message.texts for kind in _placed_kinds(text)}
    if other := kinds - {"image"}:
        raise SampleFault(
            Fault.video_or_audio,
            f"{name}: <{min(other)}> stands for {min(other)}, which this trainer cannot learn from",
        )
    if not images_in_answers and any(message.num_images for message in messages if message.role == "assistant"):
        raise SampleFault(
            Fault.image_count, f"{name}: an image in an answer; make_shards allows it with --images-in-answers"
        )
    split = _split(messages, images_in_answers)
    found = sum(message.num_images for message in split)
    if found == num_images:
        return split, False
    first = next((place for place, message in enumerate(messages) if message.role == "user"), None)
    if found == 0 and first is not None:
        question = split[first]
        texts = ("", *["\n"] * (num_images - 1), "\n" + question.texts[0])
        return [*split[:first], replace(question, texts=texts), *split[first + 1 :]], True
    if num_images == 0 and not kinds and not any(message.num_images for message in messages):
        return messages, False  # a text about the word
    where = "text" if images_in_answers else "questions"
    raise SampleFault(
        Fault.image_count, f"{name}: {found} {IMAGE_PLACEHOLDER} in the {where} but {_pictures(num_images)}"
    )


def _pictures(number: int) -> str:
    return f"{number} picture" if number == 1 else f"{number} pictures"


def _kind(turns: object, record: Mapping[str, object]) -> str:
    """What stands where the list of turns should be, or instead of it."""
    if isinstance(turns, str) and turns.strip():
        return "text (if that is JSON, parse it first)"
    if turns is not None:
        return "an empty one" if turns in ([], "") else type(turns).__name__
    return f"one with {', '.join(map(shown, list(record)[:8])) or 'no keys'}"


def _placed_kinds(text: str) -> Iterator[str]:
    """What a text has a place for: image, video, audio."""
    for match in _PLACED.finditer(_CODE.sub("", text)) if "<" in text else ():
        yield match[1] or match[2]


def _check_answers(messages: Sequence[Message], name: str) -> None:
    """Raises SampleFault: an answer without words, or none to learn from."""
    if not any(message.role == "assistant" for message in messages):
        raise SampleFault(Fault.no_answer, f"{name}: no turn of an assistant")
    trained = [message for message in messages if message.is_trained]
    if not trained:
        raise SampleFault(Fault.no_answer, f"{name}: every answer is marked as not to be trained")
    if not all(message.content.strip() for message in trained):
        raise SampleFault(Fault.empty_answer, f"{name}: an answer without words")
