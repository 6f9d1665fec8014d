import json

import pytest

from laver_megatron.data.conversations import (
    check_conversation,
    parse_conversation,
    parse_json,
    place_images,
    read_conversation,
)
from laver_megatron.data.faults import SampleFault


def said(*turns):
    """said("user: Q", "assistant: A")"""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


def test_forms_of_a_conversation():
    expected = said("user: Q", "assistant: A")
    llava = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    for document in (llava, expected, {"conversations": llava, "id": 1}, {"messages": expected}):
        assert parse_conversation(json.dumps(document), "name") == expected
        assert parse_conversation(json.dumps(document).encode(), "name") == expected


def test_parts_of_a_message():
    image = {"type": "image", "image": "a.jpg"}
    url = {"type": "image_url", "image_url": {"url": "a.jpg"}}
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [image, {"type": "text", "text": "Which? "}, url, {"type": "text", "text": "!"}]},
        {"from": "gpt", "value": []},
    ]
    assert read_conversation(turns, "x") == said("system: Be brief.", "user: <image>Which? <image>!", "assistant: ")


@pytest.mark.parametrize(
    "content, fault, what",
    [
        (b"{", "invalid_json", "not valid JSON"),
        (b"\xff\xfe\xfa", "invalid_json", "not valid JSON"),
        (b"[" * 100_000, "invalid_json", "not valid JSON"),
        (b'["\\ud800"]', "invalid_json", "surrogates not allowed"),
        (b'["\\uD800"]', "invalid_json", "surrogates not allowed"),
        (b"[]", "no_turns", "expected a list of turns"),
        (b'{"text": "a"}', "no_turns", "expected a list of turns"),
        (b'{"messages": {"role": "user"}}', "no_turns", "expected a list of turns"),
        (b'["a"]', "no_turns", "turn 0 is not an object"),
        (b'[{"from": "robot", "value": "a"}]', "unknown_role", "turn 0 has the role 'robot'"),
        (b'[{"role": ["user"], "content": "a"}]', "unknown_role", "turn 0 has the role"),
        (b'[{"role": "user", "content": 3}]', "text_not_string", "the text of turn 0 is int"),
        (b'[{"role": "user"}]', "text_not_string", "the text of turn 0 is NoneType"),
        (b'[{"role": "user", "content": [{"type": "video"}]}]', "text_not_string", "a part of the type 'video'"),
        (b'[{"role": "user", "content": [{"type": "text", "text": 3}]}]', "text_not_string", "a part of the type"),
        (b'[{"role": "user", "content": [[]]}]', "text_not_string", "a part of the type None"),
    ],
)
def test_bad_conversations(content, fault, what):
    with pytest.raises(SampleFault, match=f"shard: 'k'.*{what}") as caught:
        parse_conversation(content, "shard: 'k'")
    assert caught.value.fault == fault
    assert len(str(caught.value)) < 300


def test_whole_surrogate_pairs_are_text():
    assert parse_json(b'["\\ud83d\\ude00"]', "x") == ["\U0001f600"]


@pytest.mark.parametrize(
    "turns, num_images, fault",
    [
        (["user: <image>Q", "assistant: A"], 0, "image_count"),
        (["user: <image>Q", "assistant: <image>A"], 1, "image_count"),
        (["user: Q", "assistant: A"], 1, "image_count"),
        (["user: Q", "assistant: \n\t "], 0, "empty_answer"),
        (["user: Q", "assistant: A", "user: R", "assistant: "], 0, "empty_answer"),
        (["user: Q"], 0, "no_answer"),
        (["user: Q", "assistant: A"], 0, None),
        (["system: ", "user: <image>", "assistant: A<image>"], 2, None),
    ],
)
def test_check(turns, num_images, fault):
    if fault is None:
        check_conversation(said(*turns), num_images, "x")
        return
    with pytest.raises(SampleFault) as caught:
        check_conversation(said(*turns), num_images, "x")
    assert caught.value.fault == fault


def test_pictures_are_placed_only_where_no_text_says_where():
    plain = said("system: S", "user: Q", "assistant: A", "user: R")
    placed = place_images(plain, 2)
    assert placed == said("system: S", "user: <image>\n<image>\nQ", "assistant: A", "user: R")
    assert plain[1]["content"] == "Q"  # what was handed in is as it was
    for turns, num_images in ((["user: Q"], 0), (["assistant: A"], 1), (["user: Q", "assistant: <image>"], 2)):
        assert place_images(said(*turns), num_images) == said(*turns)
