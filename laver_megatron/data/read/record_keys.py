"""What a record may hold beside its turns: keys that are used, refused, or ignored and counted (table in docs/data.md).

A value that is null or empty counts as absent, because Arrow writes every column for every row.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from numbers import Number

from laver_megatron.data.index.faults import Fault, SampleFault

IMAGE_PARTS = ("image", "image_url")  # types of a part of a message
IMAGES_IN_ANSWERS = "images_in_answers"
FAMILY = "family"  # the kind of question, by which answers are counted in validation
_PICTURE_KEYS = ("image", "images")  # names of pictures in LLaVA's form, and the pictures themselves in Parquet
USED_KEYS = frozenset(
    ("conversations", "messages", "system", "system_prompt", IMAGES_IN_ANSWERS, FAMILY, "id", "source", "data_source")
    + _PICTURE_KEYS
)
_SYSTEM_KEYS = ("system", "system_prompt")
_USED_IN_TURNS = frozenset(("from", "value", "role", "content", "loss", "weight", "train"))
_SPEAKERS = {"human": "user", "gpt": "assistant"}
_USED_IN_IMAGES = ("type", "image", "path", "url", "image_url")  # under which a part names its picture
_MARKS = ("loss", "weight", "train")  # of a turn: whether it is learnt
_MEDIA_KEYS = ("video", "videos", "audio", "audios")
_MEDIA_PARTS = ("video", "video_url", "audio", "audio_url", "input_audio")
_TOOL_KEYS = ("tools", "functions")
_TOOL_KEYS_IN_TURNS = ("tool_calls", "function_call")
_TOOL_ROLES = ("tool", "function", "observation", "function_call", "tool_call", "tool_response")
_TOOL_PARTS = ("tool_use", "tool_result", "tool_call", "tool_response")
REFUSED_KEYS = frozenset(_MEDIA_KEYS + _TOOL_KEYS)
_NOTHING = ("", "[]", "{}", "null")  # some columns hold lists as text
_MOST_NAMES, _NAMES_A_LINE, _NAME_LENGTH = 100, 30, 60
_OTHER_NAMES = "(further keys)"


def first_present(document: Mapping[str, object], *keys: str) -> object:
    """The value of the first key that is not absent; if all are, the first value that is not null."""
    values = [value for key in keys if (value := document.get(key)) is not None]
    return next((value for value in values if not is_nothing(value)), values[0] if values else None)


def named_pictures(record: Mapping[str, object], name: str) -> list[object]:
    """The pictures in `image` and `images`, as names or as the pictures themselves.

    Raises:
        SampleFault: the two list different pictures.
    """
    values = [record.get(key) for key in _PICTURE_KEYS]
    lists = [value if isinstance(value, list) else [value] for value in values if not is_nothing(value)]
    if len(lists) == 2 and lists[0] != lists[1]:
        raise SampleFault(Fault.image_count, f"{name}: `image` and `images` name different pictures")
    return lists[0] if lists else []


def allows_images_in_answers(record: Mapping[str, object], name: str) -> bool:
    """Whether the record says that `<image>` in an answer is the place of a picture.

    Raises:
        SampleFault: it says neither true nor false.
    """
    value = record.get(IMAGES_IN_ANSWERS)
    if not is_nothing(value) and value not in (True, False):
        raise SampleFault(Fault.image_count, f"{name}: {IMAGES_IN_ANSWERS} is {value!r:.40}; it must be true or false")
    return value in (True,)


def family_of(record: Mapping[str, object]) -> str:
    """The kind of question that a record names; empty for none."""
    value = record.get(FAMILY)
    return value if isinstance(value, str) else ""


def check_record(record: Mapping[str, object], name: str) -> None:
    """Raises SampleFault: a record with video, audio or tools."""
    for keys, fault in ((_MEDIA_KEYS, Fault.video_or_audio), (_TOOL_KEYS, Fault.tool_use)):
        for key in keys:
            _refuse(record, key, fault, f"{name} has `{key}`, which this trainer cannot learn from")


def check_turn(turn: Mapping[str, object], number: int, name: str) -> None:
    """Raises SampleFault: a turn with video, audio or tool calls beside its text."""
    for keys, fault in ((_MEDIA_KEYS, Fault.video_or_audio), (_TOOL_KEYS_IN_TURNS, Fault.tool_use)):
        for key in keys:
            _refuse(turn, key, fault, f"{name}: turn {number} has `{key}`, which this trainer cannot learn from")
    for key in _PICTURE_KEYS:
        message = f"{name}: turn {number} has `{key}`; pictures are named in the record's `images` or in message parts"
        _refuse(turn, key, Fault.image_count, message)


def check_role(role: object, number: int, name: str) -> None:
    """Raises SampleFault: the turn of a tool, or a call of one."""
    if role in _TOOL_ROLES:
        raise SampleFault(
            Fault.tool_use, f"{name}: turn {number} has the role {role!r}, which this trainer cannot learn from"
        )


def check_part(kind: object, number: int, name: str) -> None:
    """Raises SampleFault: a message part that is video, audio or a tool call."""
    for kinds, fault in ((_MEDIA_PARTS, Fault.video_or_audio), (_TOOL_PARTS, Fault.tool_use)):
        if kind in kinds:
            message = f"{name}: turn {number} has a part of the type {kind!r}, which this trainer cannot learn from"
            raise SampleFault(fault, message)


def is_to_train(turn: Mapping[str, object], number: int, name: str) -> bool:
    """Whether a turn's `loss`, `weight` and `train` let it be trained: true, 1 or absent, not false or 0.

    Raises:
        SampleFault: any other value, which this trainer does not honour.
    """
    trained = True
    for key in _MARKS:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, Number) or value not in (0, 1):
            message = f"{name}: turn {number} has {key} {value!r:.40}; it must be true, 1, false or 0"
            raise SampleFault(Fault.loss_weight, message)
        trained = trained and bool(value)
    return trained


def system_texts(record: Mapping[str, object], name: str) -> list[str]:
    """The record's own system texts, each once.

    Raises:
        SampleFault: one that is not a text.
    """
    texts: dict[str, None] = {}
    for key in _SYSTEM_KEYS:
        value = record.get(key)
        if is_nothing(value):
            continue
        if not isinstance(value, str):
            raise SampleFault(Fault.text_not_string, f"{name}: `{key}` is {type(value).__name__}, not a string")
        texts[value] = None
    return list(texts)


def other_keys(record: Mapping[str, object], turns: Sequence[object]) -> Counter[str]:
    """Keys that have a value and are not used, with counts; those of turns as `turns.KEY`."""
    found = Counter(key for key, value in record.items() if key not in USED_KEYS and not is_nothing(value))
    found.update(_beside(record, "conversations", "messages"))
    for turn in turns:
        assert isinstance(turn, dict), "turns have been read"
        found.update(f"turns.{key}" for key in _others_of_turn(turn))
    return found


def _others_of_turn(turn: Mapping[str, object]) -> Iterator[str]:
    is_answer = first_present(turn, "from", "role") in ("gpt", "assistant")
    for key, value in turn.items():
        if key not in _USED_IN_TURNS and not is_nothing(value):
            yield key
        elif key in _MARKS and value and not is_answer:
            yield f"{key} of questions"  # which are never trained
    yield from _beside(turn, "from", "role")
    yield from _beside(turn, "value", "content")
    content = first_present(turn, "value", "content")
    for part in content if isinstance(content, list) else ():
        used = _USED_IN_IMAGES if part["type"] in IMAGE_PARTS else ("type", "text")
        yield from (f"content.{key}" for key, value in part.items() if key not in used and not is_nothing(value))


def _beside(document: Mapping[str, object], first: str, second: str) -> Iterator[str]:
    """The second of two spellings, if it differs from the first, which is used."""
    one, other = document.get(first), document.get(second)
    same = _SPEAKERS.get(one, one) if isinstance(one, str) else one
    if not is_nothing(one) and not is_nothing(other) and same != other:
        yield f"{second} beside {first}"


def add_keys(total: Counter[str], found: Mapping[str, int]) -> None:
    """Adds counts of names from unchecked files: limited in number, truncated and printable."""
    for key, count in found.items():
        name = shown(key)
        total[name if name in total or len(total) < _MOST_NAMES else _OTHER_NAMES] += count


def shown(name: str) -> str:
    """A name from a file, made printable."""
    name = name if name.isprintable() else ascii(name)
    return name if len(name) <= _NAME_LENGTH else f"{name[:_NAME_LENGTH]}..."


def keys_line(found: Counter[str]) -> str:
    """Keys with their counts on one line, the most frequent first."""
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    more = f", and {len(ordered) - _NAMES_A_LINE} more" if len(ordered) > _NAMES_A_LINE else ""
    return ", ".join(f"{key} ({count:,})" for key, count in ordered[:_NAMES_A_LINE]) + more


def is_nothing(value: object) -> bool:
    """Whether a value counts as absent: null, an empty text, list or object, or one that holds nothing else."""
    if value is None:  # most often, and at once
        return True
    if isinstance(value, str):
        return value.strip() in _NOTHING
    waiting = [value]  # no recursion, however deep a document is
    while waiting:
        item = waiting.pop()
        if isinstance(item, list | tuple):
            waiting += item
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, str):
            if item.strip() not in _NOTHING:
                return False
        elif item is not None and item != b"":
            return False
    return True


def _refuse(document: Mapping[str, object], key: str, fault: Fault, message: str) -> None:
    value = document.get(key)
    if value is not None and not is_nothing(value) and value not in (False, 0):
        raise SampleFault(fault, message)
