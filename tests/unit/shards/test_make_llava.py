import json
import os
from pathlib import Path

import pytest

from laver_megatron.data.index.faults import Fault, SampleFault
from laver_megatron.data.index.opening import open_indexes
from laver_megatron.shards.llava import picture_names, read_picture
from tests.unit.shards.form import jpeg, turns, write_llava


def write(folder, *records, lines=False):
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "a.jpg").write_bytes(jpeg())
    (folder / "images" / "b.jpg").write_bytes(jpeg((11, 12)))
    path = folder / ("data.jsonl" if lines else "data.json")
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    return path


def test_array_and_lines_give_the_same_samples(tmp_path, make):
    source = write_llava(tmp_path, 7)
    lines = tmp_path / "data.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in json.loads(source.read_text())))
    samples = make(source, images=tmp_path / "images")
    assert samples == make(lines, images=tmp_path / "images", output="lines")
    assert list(samples) == [f"{number:09d}" for number in range(7)]
    assert [sorted(sample) for sample in samples.values()][:3] == [
        ["json"],
        ["jpg", "json"],
        ["0.jpg", "1.jpg", "json"],
    ]
    assert samples["000000005"]["json"] == {"id": "sample/5", "conversations": turns("<image><image>Question 5?")}
    assert samples["000000005"]["1.jpg"] == (tmp_path / "images" / "5-1.jpg").read_bytes()


def test_forms_of_a_record(tmp_path, make):
    messages = [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}]
    parts = [{"type": "image", "image": "b.jpg"}, {"type": "text", "text": "Q"}]
    urls = [{"type": "image_url", "image_url": {"url": "b.jpg"}}, {"type": "text", "text": "Q"}]
    source = write(
        tmp_path,
        {"image": "b.jpg", "messages": messages},
        {"images": ["b.jpg"], "conversations": messages, "source": "somewhere"},
        {"messages": [{"role": "user", "content": parts}, messages[1]]},
        {"messages": [{"role": "user", "content": urls}, messages[1]]},
        [{"role": "user", "content": parts}, messages[1]],
        {"image": ["b.jpg"], "messages": [{"role": "user", "content": [{"type": "image"}, parts[1]]}, messages[1]]},
    )
    samples = list(make(source, images=tmp_path / "images").values())
    expected = [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]
    for sample in samples:
        assert sample["json"]["conversations"] == expected
        assert sample["jpg"] == (tmp_path / "images" / "b.jpg").read_bytes()
    assert len(samples) == 6
    assert samples[1]["json"]["source"] == "somewhere"
    assert samples[0]["json"]["id"] == "000000000"


def test_pictures_without_a_place_come_before_the_first_question(tmp_path, make):
    source = write(
        tmp_path,
        {"image": ["a.jpg", "b.jpg"], "conversations": turns("Which?")},
        {"image": ["a.jpg", "b.jpg"], "conversations": turns("Which? <image>")},
    )
    samples = make(source, images=tmp_path / "images", max_bad_fraction=1)
    assert [sample["json"]["conversations"][0]["value"] for sample in samples.values()] == ["<image>\n<image>\nWhich?"]
    assert make.report.faults == {"image_count": 1}
    assert make.report.num_placed == 1
    assert "put before the first question" in make.report.summary(has_tokenizer=False)


def test_faults_of_records(tmp_path, make):
    source = write(
        tmp_path,
        {"id": 0, "conversations": turns("Fine?")},
        {"id": 1, "conversations": []},
        {"id": 2},
        {"id": 3, "conversations": [{"from": "robot", "value": "x"}]},
        {"id": 4, "conversations": turns("Q", " \n")},
        {"id": 5, "conversations": turns("Q")[:1]},
        {"id": 6, "conversations": turns("Q", 7)},
        {"id": 7, "image": "gone.jpg", "conversations": turns()},
        {"id": 8, "image": {"a": 1}, "conversations": turns()},
        {"id": 9, "image": "https://example.com/a.jpg", "conversations": turns()},
        {"id": 10, "image": "data:image/png;base64,AAAA", "conversations": turns()},
        {"id": 11, "image": "a\0.jpg", "conversations": turns()},
        {"id": 12, "conversations": turns()},
        {"id": 13, "conversations": turns("half \ud800 a pair")},
        {"id": {"odd": 1}, "conversations": turns("Fine?")},
        12,
        "text",
        None,
    )
    samples = make(source, images=tmp_path / "images", max_bad_fraction=1)
    assert list(samples) == ["000000000", "000000014"]
    assert samples["000000014"]["json"]["id"] == "000000014"
    assert make.report.faults == {
        "no_turns": 5,
        "unknown_role": 1,
        "empty_answer": 1,
        "no_answer": 1,
        "text_not_string": 1,
        "unreadable_image": 5,
        "image_count": 1,
        "invalid_json": 1,
    }


def test_absurd_json(tmp_path, make):
    deep = "[" * 200_000 + "]" * 200_000
    source = tmp_path / "data.json"
    source.write_text(
        f'[{{"id": 0, "conversations": {json.dumps(turns("Q"))}}}, {deep}, {{"a": {deep}}}, {{"n": {"9" * 10_000}}}, '
        f'{{"image": {deep}, "conversations": 1}}, {{"id": 1, "id": 2, "conversations": {json.dumps(turns("Q"))}}}]'
    )
    assert [sample["json"]["id"] for sample in make(source, max_bad_fraction=1).values()] == [0, 2]
    assert make.report.faults == {"invalid_json": 4}


def test_the_same_id_twice_is_two_samples(tmp_path, make):
    source = write(tmp_path, *[{"id": "../same", "conversations": turns("Q", answer)} for answer in "AB"])
    samples = make(source)
    assert list(samples) == ["000000000", "000000001"]
    assert {sample["json"]["id"] for sample in samples.values()} == {"../same"}


@pytest.fixture
def folder(tmp_path):
    """images/ with a.jpg, sub/b.jpg, links of all kinds, and a secret beside it."""
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    for path in (images / "a.jpg", images / "sub" / "b.jpg", tmp_path / "secret" / "s.jpg"):
        path.write_bytes(jpeg())
    (tmp_path / "images-too").mkdir()
    (tmp_path / "images-too" / "s.jpg").write_bytes(jpeg())
    (images / "inside.jpg").symlink_to("sub/b.jpg")
    (images / "outside.jpg").symlink_to("../secret/s.jpg")
    (images / "around.jpg").symlink_to("outside.jpg")
    (images / "absolute.jpg").symlink_to(tmp_path / "secret" / "s.jpg")
    (images / "away").symlink_to("../secret")
    (images / "here").symlink_to("sub")
    (images / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(images / "pipe.jpg")
    return images


@pytest.mark.parametrize("name", ["a.jpg", "./a.jpg", "sub/b.jpg", "sub/../a.jpg", "inside.jpg", "here/b.jpg", "ABS"])
def test_names_within_the_folder(folder, name):
    name = str(folder / "a.jpg") if name == "ABS" else name
    assert read_picture(folder, name, "x") == (folder / name).read_bytes()


@pytest.mark.parametrize(
    "name",
    ["../secret/s.jpg", "sub/../../secret/s.jpg", "/etc/passwd", "outside.jpg", "around.jpg", "absolute.jpg"]
    + ["away/s.jpg", "..", "sub/..", "../images-too/s.jpg", "here/../../secret/s.jpg"],
)
def test_names_that_leave_the_folder(folder, name):
    with pytest.raises(ValueError, match="outside") as caught:
        read_picture(folder, name, "x")
    assert caught.value.fault == "unsafe_key"


@pytest.mark.parametrize("name", ["pipe.jpg", "sub", "loop.jpg", "gone.jpg", "a.jpg/b", "a" * 5000])
def test_names_of_what_is_no_file(folder, name):
    with pytest.raises(ValueError) as caught:
        read_picture(folder, name, "x")
    assert caught.value.fault == "unreadable_image"


def test_a_relative_folder_and_one_that_is_a_link_itself(folder, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to("images")
    monkeypatch.chdir(tmp_path)
    for relative in ("images", "link"):
        assert read_picture(Path(relative), "a.jpg", "x") == (folder / "a.jpg").read_bytes()


def test_pictures_need_a_folder(tmp_path, make, caplog):
    source = write(tmp_path, *[{"image": "a.jpg", "conversations": turns()}] * 30)
    with pytest.raises(
        ValueError,
        match="30 of 30 samples .*; say in which folder .* lie with --images .and start anew with --overwrite.\n",
    ) as caught:
        make(source)
    assert "30  no_image_folder" in str(caught.value)
    assert len(caplog.messages) == 1 and "say in which folder it lies with --images" in caplog.messages[0]
    with pytest.raises(ValueError, match="--images .* is not a folder"):
        make(source, images=tmp_path / "gone")


RECORDS = [
    {"id": "b", "system_prompt": "Explain.", "video": "a.mp4", "conversations": turns("<video>\nWhat?", "Sample")},
    {"id": "c", "system": "Be terse.", "conversations": turns("A", "B"), "model": "m"},
    {"id": "d", "messages": [
        {"role": "user", "content": "A"}, {"role": "assistant", "content": "WRONG", "loss": False},
        {"role": "user", "content": "C"}, {"role": "assistant", "content": "D", "name": "Bo"}]},
    {"id": "e", "conversations": None, "messages": [{"from": None, "value": None, "role": "user", "content": "What is "
     "<image> in HTML?"}, {"from": "gpt", "value": "A tag: <image>.", "role": None, "content": None}]},
    {"id": "f", "image": "a.jpg", "conversations": turns("What is it?", "![fig](<image>)")},
]  # fmt: skip


def test_what_a_record_says_is_what_the_shard_says(tmp_path, make):
    samples = make(write(tmp_path, *RECORDS), images=tmp_path / "images", max_bad_fraction=1)
    assert make.report.faults == {"video_or_audio": 1}
    said = {sample["json"]["id"]: sample["json"] for sample in samples.values()}
    assert said["c"] == {"id": "c", "conversations": [{"from": "system", "value": "Be terse."}, *turns("A", "B")]}
    assert said["d"]["conversations"][:2] == [turns("A")[0], {"from": "gpt", "value": "WRONG", "loss": False}]
    assert said["d"]["conversations"][2:] == turns("C", "D")
    assert said["e"]["conversations"] == turns("What is <image> in HTML?", "A tag: <image>.")
    assert said["f"]["conversations"] == turns("<image>\nWhat is it?", "![fig](<image>)")
    summary = make.report.summary(has_tokenizer=False)
    assert "answers marked as not to be trained, which carry no labels: 1" in summary
    assert "unused keys of records: model (1), turns.name (1)" in summary
    assert "1  video_or_audio    video or audio, which this trainer cannot learn from" in summary
    assert "1 samples had pictures but no <image>: put before the first question" in summary


def test_pictures_in_answers_are_asked_for(tmp_path, make):
    source, images = write(tmp_path, RECORDS[-1]), tmp_path / "images"
    [plain] = make(source, images=images).values()
    [asked] = make(source, images=images, images_in_answers=True, output="asked").values()
    assert "images_in_answers" not in plain["json"]
    assert asked["json"]["images_in_answers"] is True
    assert asked["json"]["conversations"] == turns("What is it?", "![fig](<image>)")
    (index,) = open_indexes(tmp_path / "asked")
    assert index.fault_I.tolist() == [0]


def test_names_in_order():
    document = {"messages": [{"content": [{"type": "image", "path": "1"}, {"type": "text", "text": ""}]}] * 2}
    assert picture_names(document, "x") == ["1", "1"]
    assert picture_names({"image": "a", "images": ["a"]}, "x") == ["a"]
    for other in ({"image": "a", "images": ["a", "b"]}, {"image": "a", **document}, {"images": ["1", "2"], **document}):
        with pytest.raises(SampleFault, match="other pictures|different pictures") as caught:
            picture_names(other, "x")
        assert caught.value.fault is Fault.image_count
    assert picture_names({"images": ["1", "1"], **document}, "x") == ["1", "1"]
    assert picture_names({"image": [None], "images": None}, "x") == []
    assert picture_names({"image": None, "images": ["b", "c"]}, "x") == ["b", "c"]
    assert picture_names({"image": ""}, "x") == []
