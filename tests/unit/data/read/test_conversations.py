import json
import string
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laver_megatron.data.index.faults import Fault, SampleFault
from laver_megatron.data.read import record_keys
from laver_megatron.data.read.conversations import Message, parse_conversation, parse_json, read_conversation
from laver_megatron.data.read.record_keys import add_keys, keys_line
from laver_megatron.shards.assemble import SampleMaker
from laver_megatron.shards.record_source import FoundSample
from laver_megatron.shards.report import MakeReport
from tests.content import messages_of, picture_bytes


def said(*turns):
    """said("user: Q", "assistant: A") -> turns of a record"""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


def messages(document, num_images=0, **options):
    return list(read_conversation(document, num_images, "x", **options).messages)


def fault_of(document, num_images=0, **options):
    with pytest.raises(SampleFault) as caught:
        read_conversation(document, num_images, "x", **options)
    return caught.value.fault


def test_forms_of_a_conversation():
    expected = said("user: Q", "assistant: A")
    llava = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    for document in (llava, expected, {"conversations": llava, "id": 1}, {"messages": expected}):
        for content in (json.dumps(document), json.dumps(document).encode()):
            found = parse_conversation(content, 0, "name")
            assert list(found.messages) == messages_of(["user: Q", "assistant: A"]) and not found.other_keys


def test_null_is_absent():
    """As Arrow writes it: every key of the schema in every record."""
    expected = messages_of(["user: Q", "assistant: A"])
    turns = [
        {"from": None, "value": None, "role": "user", "content": "Q", "loss": None, "weight": None, "tool_calls": None},
        {"from": "gpt", "value": "A", "role": None, "content": None, "video": []},
    ]
    record = {
        "conversations": None,
        "messages": turns,
        "system": None,
        "system_prompt": "",
        "tools": "[]",
        "note": None,
    }
    media = {"video": None, "videos": [None], "audio": {"bytes": None, "path": None}, "audios": []}
    for document in ({**record, **media}, {"conversations": turns, "messages": None}, {**record, "conversations": []}):
        found = read_conversation(document, 0, "x")
        assert list(found.messages) == expected and not found.other_keys


def test_an_empty_spelling_hides_nothing():
    turns = [
        {"from": "human", "value": "", "role": "user", "content": "Q"},
        {"from": "", "value": [], "role": "assistant", "content": "A"},
    ]
    expected = messages_of(["user: Q", "assistant: A"])
    for empty in ("", [], {}, "[]", None):
        record = {"conversations": empty, "messages": turns, "system": empty, "system_prompt": "null"}
        assert messages(record) == expected
    assert messages([{"from": "human", "value": ""}, *turns[1:]]) == messages_of(["user: ", "assistant: A"])
    assert messages([*turns[:1], {"from": "gpt", "value": "null"}])[1].content == "null"  # an answer like any other


def test_parts_of_a_message():
    image = {"type": "image", "image": "a.jpg"}
    url = {"type": "image_url", "image_url": {"url": "a.jpg"}}
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [image, {"type": "text", "text": "Which? "}, url, {"type": "text", "text": "!"}]},
        {"from": "gpt", "value": [{"type": "text", "text": "A"}]},
    ]
    expected = messages_of(["system: Be brief.", "user: <image>Which? <image>!", "assistant: A"])
    assert messages(turns, 2) == expected


# --- what a record says beside its turns ---------------------------------------------------------------

QA = said("user: A", "assistant: B")


@pytest.mark.parametrize(
    "record, system",
    [
        ({"system": "Be terse."}, "Be terse."),
        ({"system_prompt": "Explain."}, "Explain."),
        ({"system": "One.", "system_prompt": "Two."}, "One.\nTwo."),
        ({"system": "Same.", "system_prompt": "Same."}, "Same."),
        ({"system": "   ", "system_prompt": None}, None),
    ],
)
def test_system_texts_become_the_system_turn(record, system):
    expected = messages_of(["user: A", "assistant: B"])
    assert messages({**record, "messages": QA}) == [Message("system", (system,))] * (system is not None) + expected


def test_a_system_turn_comes_after_the_records_own_text():
    turns = said("system: <image> Look.", *("user: A", "assistant: B"))
    [first, *_] = messages({"system": "Be terse.", "messages": turns}, 1)
    assert first == Message("system", ("Be terse.\n", " Look."))
    assert messages({"system": "Same.", "messages": said("system: Same.") + QA})[0] == Message("system", ("Same.",))
    assert fault_of({"system": 3, "messages": QA}) is Fault.text_not_string


@pytest.mark.parametrize(
    "mark", [{"loss": False}, {"loss": 0}, {"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": Decimal(0)}]
)
def test_marked_turns_are_not_trained(mark):
    turns = [*said("user: A", "assistant: WRONG", "user: C", "assistant: D")]
    turns[1] |= mark
    assert [m.is_trained for m in messages(turns)] == [False, False, False, True]
    turns[3] |= mark
    assert fault_of(turns) is Fault.no_answer
    turns[1] = {"role": "assistant", "content": "", **mark}  # nothing is lost with it
    turns[3] |= dict.fromkeys(mark, 1)
    assert [m.is_trained for m in messages(turns)] == [False, False, False, True]


@pytest.mark.parametrize("value", [True, 1, 1.0, None])
def test_marks_that_ask_for_training(value):
    assert messages([QA[0], {**QA[1], "loss": value, "weight": value, "train": value}])[1].is_trained


@pytest.mark.parametrize("value", [0.5, 2, -1, "false", "0", [], float("nan"), Decimal("0.5")])
def test_weights_that_training_would_not_keep_to(value):
    assert fault_of([QA[0], {**QA[1], "weight": value}]) is Fault.loss_weight


@pytest.mark.parametrize(
    "document, fault",
    [
        ({"video": "a.mp4", "conversations": QA}, "video_or_audio"),
        ({"videos": ["a.mp4"], "conversations": QA}, "video_or_audio"),
        ({"audio": {"path": "a.wav"}, "conversations": QA}, "video_or_audio"),
        ({"audios": ["a.wav"], "conversations": QA}, "video_or_audio"),
        ([{**QA[0], "video": "a.mp4"}, QA[1]], "video_or_audio"),
        (said("user: <video>\nWhat?", "assistant: B"), "video_or_audio"),
        (said("user: What? <audio>", "assistant: B"), "video_or_audio"),
        (said("system: <video>", "user: What?", "assistant: B"), "video_or_audio"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, QA[1]], "video_or_audio"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}, QA[1]], "video_or_audio"),
        ({"tools": [{"name": "search"}], "messages": QA}, "tool_use"),
        ({"tools": '[{"name": "search"}]', "messages": QA}, "tool_use"),
        ([QA[0], {**QA[1], "tool_calls": [{"id": 1}]}], "tool_use"),
        ([QA[0], {"role": "assistant", "function_call": {"name": "f"}, "content": None}], "tool_use"),
        ([*QA, {"role": "tool", "content": "42"}], "tool_use"),
        ([QA[0], {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "42"}, QA[1]], "tool_use"),
        ([QA[0], {"role": "assistant", "content": [{"type": "tool_use"}]}], "tool_use"),
    ],
)
def test_what_this_trainer_cannot_learn_from(document, fault):
    assert fault_of(document) == fault


def test_the_documents_table_names_every_key():
    text = (Path(__file__).parents[4] / "docs" / "data.md").read_text()
    tables = text[text.index("### What of a record is used") : text.index("### What a picture's pixels are")]
    for key in (*record_keys.USED_KEYS, *record_keys.REFUSED_KEYS, *record_keys._USED_IN_TURNS):
        assert f"`{key}`" in tables or f"`{key}: true`" in tables, key
    for key in record_keys._TOOL_KEYS_IN_TURNS:
        assert f"`{key}`" in tables, key


@pytest.mark.parametrize("value", [False, 0, "", [""], [{"path": None}], b"", {"bytes": b"", "path": None}])
def test_no_video_is_no_fault(value):
    assert len(messages({"video": value, "audios": value, "tools": value, "messages": QA})) == 2


def test_pictures_that_a_record_names_must_be_there():
    """Learnt without them, an answer is about something that nobody sees."""
    for named in ({"image": "a.jpg"}, {"images": ["a.jpg"]}, {"image": "a.jpg", "images": ["a.jpg"]}):
        assert fault_of({**named, "messages": QA}) is Fault.image_count
        assert read_conversation({**named, "messages": QA}, 1, "x").is_placed
    assert fault_of({"images": ["a.jpg", "b.jpg"], "messages": QA}, 1) is Fault.image_count
    assert fault_of({"image": "a.jpg", "images": ["b.jpg"], "messages": QA}, 1) is Fault.image_count
    for absent in (None, "", [], [None], {"bytes": None, "path": None}):
        assert len(messages({"image": absent, "images": absent, "messages": QA})) == 2
    assert fault_of([{**QA[0], "images": ["a.jpg"]}, QA[1]]) is Fault.image_count
    assert fault_of([{**QA[0], "image": "a.jpg"}, QA[1]], 1) is Fault.image_count


def test_what_stands_where_turns_should_be_is_named():
    for document, found in (({"data": []}, "one with data"), ({"messages": "[]x"}, "text .if that is JSON, parse it"),
                            ([], "an empty one"), (3, "int"), ({}, "one with no keys")):  # fmt: skip
        with pytest.raises(SampleFault, match=f"expected a list of turns.*, not {found}"):
            read_conversation(document, 0, "x")


def test_unused_keys_are_counted():
    turns = [{**QA[0], "id": 3, "weight": 1}, {**QA[1], "id": 4, "name": "Bo"}, *QA]
    record = {"conversations": turns, "messages": QA, "id": 1, "source": "s", "score": 0, "model": "m", "note": None}
    found = read_conversation(record, 0, "x").other_keys
    assert found == {
        "score": 1, "model": 1, "messages beside conversations": 1, "turns.id": 2, "turns.name": 1,
        "turns.weight of questions": 1,
    }  # fmt: skip
    total = found.copy()
    add_keys(total, found)
    assert keys_line(total).startswith("turns.id (4), messages beside conversations (2), model (2), ")


def test_unused_keys_of_turns_and_their_parts():
    parts = [{"type": "image", "url": "a.jpg", "text": "lost", "detail": "high"}, {"type": "text", "text": "Q", "n": 1}]
    turns = [
        {"from": "human", "role": "user", "value": parts, "content": None},
        {"from": "gpt", "role": "user", "value": "A", "content": "B"},
    ]
    assert read_conversation(turns, 1, "x").other_keys == {
        "turns.content.text": 1, "turns.content.detail": 1, "turns.content.n": 1, "turns.role beside from": 1,
        "turns.content beside value": 1,
    }  # fmt: skip


def test_names_of_unused_keys_are_those_of_strangers():
    total = read_conversation({"messages": QA}, 0, "x").other_keys
    for number in range(1000):
        add_keys(total, {f"key{number}": 1})
    add_keys(total, {"\x1b[31mred\n": 1, "k" * 1000: 1})
    assert len(total) <= 101 and total["(further keys)"] == 902
    assert len(keys_line(total)) < 5000 and keys_line(total).isprintable()
    add_keys(odd := total.__class__(), {"\x1b[31m\n": 1, "k" * 1000: 1})
    assert set(odd) == {"'\\x1b[31m\\n'", "k" * 60 + "..."}


# --- where pictures belong -----------------------------------------------------------------------------


def test_an_answers_image_is_a_word():
    found = read_conversation(said("user: Q", "assistant: ![fig](<image>)"), 1, "x")
    assert list(found.messages) == [Message("user", ("", "\nQ")), Message("assistant", ("![fig](<image>)",), True)]
    assert found.is_placed
    found = read_conversation(said("user: <image>Q", "assistant: <image>"), 1, "x")
    assert list(found.messages) == [Message("user", ("", "Q")), Message("assistant", ("<image>",), True)]
    assert not found.is_placed


def test_answers_that_show_pictures_are_asked_for():
    turns = said("user: Draw.", "assistant: Here: <image> so.")
    expected = messages_of(["user: Draw.", "assistant: Here: <image> so."])
    assert messages(turns, 1, images_in_answers=True) == expected
    for value in (True, 1):
        assert messages({"messages": turns, "images_in_answers": value}, 1) == expected
    for value in (False, 0, None, ""):
        assert messages({"messages": turns, "images_in_answers": value}, 1) != expected
    assert fault_of({"messages": turns, "images_in_answers": "true"}, 1) is Fault.image_count
    shown = [turns[0], {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "so"}]}]
    assert messages(shown, 1, images_in_answers=True)[1] == Message("assistant", ("", "so"), True)
    assert fault_of(shown, 1) is Fault.image_count
    assert fault_of(turns, 2, images_in_answers=True) is Fault.image_count


@pytest.mark.parametrize(
    "text",
    ["What is the <image> tag of HTML?", "Explain `<image>`, please.", "Is it <image>? Or <video>?",
     "Mend this:\n```html\n<image>\n<video>\n```", "```\n<image>"],
)  # fmt: skip
def test_a_text_about_the_tag_is_text(text):
    assert messages(said(f"user: {text}", "assistant: B"))[0] == Message("user", (text,))


@pytest.mark.parametrize(
    "text", ["<image>\nQ", "Q\n<image>", "<image>Q", "Q <image>", "  <image>  \nQ", "a: <image>\nb"]
)
def test_a_place_without_its_picture_is_a_fault(text):
    """It was lost, and nothing can be learnt about what is not there."""
    assert fault_of(said(f"user: {text}", "assistant: B")) is Fault.image_count


def test_pictures_go_before_the_first_question_where_no_text_says_where():
    plain = said("system: S", "user: Q", "assistant: A", "user: R")
    expected = messages_of(["system: S", "user: <image>\n<image>\nQ", "assistant: A", "user: R"])
    assert messages(plain, 2) == expected
    assert plain[1]["content"] == "Q"  # what was handed in is as it was
    assert fault_of(said("assistant: A"), 1) is Fault.image_count


words = st.text(st.sampled_from(string.ascii_letters + " \n`.?<>"), max_size=12)
pieces = st.lists(st.one_of(words, st.sampled_from(["<image>", "<video>", "</image>", "```"])), max_size=5).map("".join)
spoken = st.lists(st.tuples(pieces, pieces.filter(str.strip), st.booleans()), min_size=1, max_size=3)


@given(spoken, st.integers(0, 3), st.booleans(), st.none() | pieces)
def test_what_is_read_is_what_the_record_says(turns, num_images, interleaved, system):
    """Whatever is not refused: as many places as pictures, none in an answer unless asked for, every text as it was,
    and the same again from the shard that is made of it."""
    record = {"messages": [], "system": system}
    for question, answer, is_trained in turns:
        record["messages"].append({"role": "user", "content": question})
        record["messages"].append({"role": "assistant", "content": answer, **({} if is_trained else {"loss": False})})
    picture = picture_bytes((8, 8))
    found_sample = FoundSample("x", None, record, (picture,) * num_images)
    try:
        found = read_conversation(record, num_images, "x", images_in_answers=interleaved)
    except SampleFault as fault:
        assert fault.fault in (Fault.image_count, Fault.video_or_audio, Fault.no_answer)
        with pytest.raises(SampleFault):
            SampleMaker(images_in_answers=interleaved).make(found_sample, "key", MakeReport())
        return
    assert sum(message.num_images for message in found.messages) == num_images
    spoken = [m for m in found.messages if m.role != "system"]
    assert (len(spoken) < len(found.messages)) == bool(system and system.strip())
    for message, turn in zip(spoken, record["messages"], strict=True):
        if not found.is_placed or message.role == "assistant":
            assert message.content == turn["content"]
        if message.role == "assistant":
            assert message.num_images == (turn["content"].count("<image>") if interleaved and num_images else 0)
            assert message.is_trained == ("loss" not in turn)
    sample = SampleMaker(images_in_answers=interleaved).make(found_sample, "key", MakeReport())
    again = parse_conversation(sample.text, num_images, "x")
    assert again.messages == found.messages and not again.other_keys


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
        (b'[{"role": "user", "content": [{"type": "video"}]}]', "video_or_audio", "a part of the type 'video'"),
        (b'[{"role": "user", "content": [{"type": "table"}]}]', "text_not_string", "a part of the type 'table'"),
        (
            b'[{"role": "user", "content": [{"type": "text", "text": 3}]}]',
            "text_not_string",
            "the text of turn 0 is int",
        ),
        (b'[{"role": "user", "content": [[]]}]', "text_not_string", "a part of the type None"),
    ],
)
def test_bad_conversations(content, fault, what):
    with pytest.raises(SampleFault, match=f"shard: 'k'.*{what}") as caught:
        parse_conversation(content, 0, "shard: 'k'")
    assert caught.value.fault == fault
    assert len(str(caught.value)) < 300


def test_whole_surrogate_pairs_are_text():
    assert parse_json(b'["\\ud83d\\ude00"]', "x") == ["\U0001f600"]


@pytest.mark.parametrize(
    "turns, num_images, fault",
    [
        (["user: <image>Q", "assistant: A"], 0, "image_count"),
        (["user: <image>Q", "assistant: A"], 2, "image_count"),
        (["user: Q", "assistant: \n\t "], 0, "empty_answer"),
        (["user: Q", "assistant: A", "user: R", "assistant: "], 0, "empty_answer"),
        (["user: Q"], 0, "no_answer"),
    ],
)
def test_what_turns_and_pictures_do_not_add_up_to(turns, num_images, fault):
    assert fault_of(said(*turns), num_images) == fault
