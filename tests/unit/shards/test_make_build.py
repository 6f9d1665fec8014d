import fcntl
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet as pq

from laver_megatron.data.index.build import index_tars
from laver_megatron.data.index.index_file import check_index, read_index
from laver_megatron.data.index.opening import open_indexes
from laver_megatron.data.read.images import decode_image
from laver_megatron.shards import MakeSettings, build, make_shards
from laver_megatron.shards.build import SliceMaker
from laver_megatron.shards.commands import make_main
from laver_megatron.shards.record_source import RecordSource
from laver_megatron.shards.report import MakeReport
from tests.content import read_member
from tests.programs import run_here
from tests.unit.shards.form import encoded, noise, turns, write_llava
from tests.unit.shards.test_make_pictures import CONVERTED, COPIED

TOOL = Path(__file__).parents[3] / "tools" / "make_shards.py"


@pytest.fixture
def source(tmp_path):
    return write_llava(tmp_path, 11)


@pytest.fixture
def settings(tmp_path, source):
    def settings(**changes):
        standard = {"output": tmp_path / "out", "images": tmp_path / "images", "samples_per_shard": 3}
        return MakeSettings((source,), **{**standard, **changes})

    return settings


def content_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".tar", ".parquet")}


@pytest.mark.processes
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, settings):
    report = make_shards(settings())
    first = content_of(tmp_path / "out")
    assert list(first) == ["index.parquet", *(f"shard-00000{number}-00.tar" for number in range(4))]
    for num_workers in (1, 3):
        again = make_shards(settings(output=tmp_path / str(num_workers), num_workers=num_workers))
        assert content_of(tmp_path / str(num_workers)) == first
        assert again.to_json() == report.to_json()


def test_the_index_is_that_of_the_tars(tmp_path, settings):
    make_shards(settings())
    index = read_index(tmp_path / "out" / "index.parquet")
    check_index(index)
    indexed = index_tars(sorted((tmp_path / "out").glob("*.tar")))
    assert index.fingerprint == indexed.fingerprint
    assert [index.sample(row) for row in range(11)] == [indexed.sample(row) for row in range(11)]


@pytest.mark.parametrize("change", [{"samples_per_shard": 4}, {"max_shard_bytes": 5_000}])
def test_where_shards_end(tmp_path, settings, change):
    make_shards(settings())
    before = read_index(tmp_path / "out" / "index.parquet")
    make_shards(settings(output=tmp_path / "other", **change))
    index = read_index(tmp_path / "other" / "index.parquet")
    assert [shard.num_samples for shard in index.shards] != [shard.num_samples for shard in before.shards]
    assert index.keys == before.keys
    assert all(shard.num_samples <= change.get("samples_per_shard", 3) for shard in index.shards)
    if "max_shard_bytes" in change:
        assert {shard.num_samples for shard in index.shards} == {1}, "no tar is so small"


def test_work_that_was_interrupted_goes_on(tmp_path, settings, monkeypatch):
    make_shards(settings(output=tmp_path / "whole"))
    made = []

    def fail_third(self, piece, progress, _make=SliceMaker.make):
        if len(made) == 2:
            (tmp_path / "out" / "shard-000002-00.tar.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        made.append(piece.number)
        return _make(self, piece, progress)

    monkeypatch.setattr(SliceMaker, "make", fail_third)
    with pytest.raises(KeyboardInterrupt):
        make_shards(settings())
    assert not (tmp_path / "out" / "index.parquet").exists()
    (tmp_path / "out" / "shard-000001-00.tar").write_bytes(b"changed")  # made again
    made[:] = [-1, -1, -1]
    with pytest.raises(ValueError, match="go on with --resume, or start anew with --overwrite"):
        make_shards(settings())
    with pytest.raises(ValueError, match="begun with other sources or settings"):
        make_shards(settings(mode="resume", samples_per_shard=2))
    make_shards(settings(mode="resume"))
    assert made[3:] == [1, 2, 3]
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".partial") == []


@pytest.mark.parametrize("change", ["other", "gone", "new"])
def test_pictures_that_have_changed_since_are_taken_anew(tmp_path, settings, source, monkeypatch, change):
    picture = tmp_path / "images" / "4-0.jpg"  # of the second slice, which is finished
    if change == "new":
        content = picture.read_bytes()
        picture.unlink()
    made = []

    def fail_third(self, piece, progress, _make=SliceMaker.make):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(piece.number)
        return _make(self, piece, progress)

    # A sample a shard, so that the slice has fewer shards when a picture is gone.
    common = {"max_bad_fraction": 1, "max_shard_bytes": 1}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SliceMaker, "make", fail_third)
        make_shards(settings(**common))
    if change == "gone":
        picture.unlink()
    else:
        picture.write_bytes(encoded(noise((30, 30)), "JPEG") if change == "other" else content)
    make_shards(settings(mode="resume", **common))
    make_shards(settings(output=tmp_path / "anew", **common))
    assert content_of(tmp_path / "out") == content_of(tmp_path / "anew")
    assert len(read_index(tmp_path / "out" / "index.parquet")) == (10 if change == "gone" else 11)

    os.utime(picture.with_name("10-0.jpg"), (1, 1))
    with pytest.raises(ValueError, match="pictures that it was made from have changed since; .*--overwrite"):
        make_shards(settings(mode="resume", **common))


def test_finished_work_is_not_done_again(tmp_path, settings, monkeypatch):
    report = make_shards(settings())
    monkeypatch.setattr(SliceMaker, "make", None)
    assert make_shards(settings(mode="resume")).to_json() == report.to_json()
    (settings().output / "shard-000001-00.tar").unlink()
    with pytest.raises(ValueError, match="was finished, but has changed; start anew with --overwrite.*shard-000001"):
        make_shards(settings(mode="resume"))


def test_folders_of_sources_are_read_in_the_order_of_their_names(tmp_path):
    folder = tmp_path / "sources"
    for name in ("b.jsonl", "a.json", "sub/c.json", ".hidden/d.json", "dataset_infos.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"id": name, "conversations": turns("Q")}))
    make_shards(MakeSettings((folder / "sub" / "c.json", folder), tmp_path / "out", max_bad_fraction=0))
    [index] = open_indexes(tmp_path / "out")
    samples = [index.sample(row) for row in range(len(index))]
    assert [json.loads(read_member(sample, sample.text))["id"] for sample in samples] == [
        "sub/c.json",
        "a.json",
        "b.jsonl",
    ]


@pytest.mark.parametrize("change", ["source", "max_shard_bytes", "decode_images"])
def test_other_work_is_not_gone_on_with(settings, source, change):
    make_shards(settings())
    if change == "source":
        source.write_text(source.read_text() + "\n")
        os.utime(source, (1, 1))
    with pytest.raises(ValueError, match="begun with other sources or settings"):
        make_shards(settings(mode="resume", **({} if change == "source" else {change: 7})))


def test_overwrite_removes_what_was_made_and_nothing_else(tmp_path, settings):
    make_shards(settings())
    (tmp_path / "out" / "mine.txt").write_text("mine")
    (tmp_path / "out" / "counts-0.parquet").write_text("stale")
    make_shards(settings(mode="overwrite", samples_per_shard=100))
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name[0] != ".") == [
        "index.parquet", "made.json", "mine.txt", "shard-000000-00.tar"]  # fmt: skip


def spoil(source, numbers):
    records = json.loads(source.read_text())
    for number in numbers:
        records[number]["conversations"] = []
    source.write_text(json.dumps(records))


def test_too_many_faults_end_the_work(tmp_path, settings, source):
    spoil(source, [2, 5])
    with pytest.raises(ValueError, match=r"2 of 11 samples cannot be used(.|\n)*no_turns"):
        make_shards(settings(max_bad_fraction=0.1))
    assert not (tmp_path / "out" / "index.parquet").exists()
    report = make_shards(settings(max_bad_fraction=0.2, mode="resume"))
    assert report.num_samples == 9 and report.faults == {"no_turns": 2}
    keys = read_index(tmp_path / "out" / "index.parquet").keys.to_pylist()
    assert keys == [f"{number:09d}" for number in range(11) if number not in (2, 5)]
    assert "skipped: 2 (18.18%)" in report.summary(has_tokenizer=False)


def test_faults_end_the_work_early_when_there_are_too_many_already(tmp_path, settings, source, monkeypatch):
    monkeypatch.setattr(build, "_EARLY_SAMPLES", 6)
    spoil(source, [0, 1, 2, 3])
    with pytest.raises(ValueError, match="of 6 samples cannot be used"):
        make_shards(settings(max_bad_fraction=0.5))
    assert not list((tmp_path / "out").glob("shard-000002*"))


def test_faults_are_logged_with_keys_but_not_all(settings, source, caplog):
    spoil(source, range(10))
    make_shards(settings(max_bad_fraction=1))
    assert "'000000000' cannot be used (no_turns" in caplog.text
    assert 5 <= caplog.text.count("cannot be used") <= 7


@pytest.mark.processes
def test_counts_of_the_report(tmp_path, settings, source, demo_dir):
    report = make_shards(settings())
    images = list((tmp_path / "images").iterdir())
    assert (report.num_samples, report.num_images) == (11, len(images))
    assert report.num_image_bytes == sum(path.stat().st_size for path in images)
    texts = [turn["value"] for record in json.loads(source.read_text()) for turn in record["conversations"]]
    assert report.num_words == sum(len(text.replace("<image>", "").split()) for text in texts)
    assert f"{report.num_words} words (no --tokenizer)" in report.summary(has_tokenizer=False)
    counted = make_shards(settings(output=tmp_path / "counted", tokenizer=demo_dir / "model", num_workers=1))
    assert counted.num_tokens > report.num_words and counted.num_words == 0
    assert f"{counted.num_tokens} text tokens" in counted.summary(has_tokenizer=True)
    with pytest.raises(ValueError, match="--tokenizer .*cannot read its tokenizer.json"):
        make_shards(settings(output=tmp_path / "none", tokenizer=tmp_path))


def test_decoding_finds_what_a_look_at_headers_does_not(tmp_path, settings):
    content = encoded(noise((200, 200)), "PNG")
    (tmp_path / "images" / "1-0.jpg").write_bytes(content[:5000] + bytes(1000) + content[6000:])
    assert make_shards(settings()).num_samples == 11
    report = make_shards(settings(output=tmp_path / "decoded", decode_images=True, max_bad_fraction=1))
    assert report.faults == {"unreadable_image": 1}


def test_two_do_not_work_in_one_folder(tmp_path, settings):
    make_shards(settings())
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is making shards"):
            make_shards(settings(mode="resume"))
    make_shards(settings(mode="resume"))


class Deadly(RecordSource):
    """One record, which kills who loads it."""

    paths = ()

    def references(self):
        yield 0

    def load(self, references):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.processes
def test_a_killed_worker_ends_the_work(settings, monkeypatch):
    monkeypatch.setattr(build, "open_source", lambda *_: Deadly())
    with pytest.raises(ValueError, match="one of 1 worker processes was killed"):
        make_shards(settings(num_workers=1))


def test_pictures_of_all_kinds(tmp_path):
    (tmp_path / "images").mkdir()
    records = []
    for number, content in enumerate([*(file for _, file in COPIED.values()), *CONVERTED.values()]):
        (tmp_path / "images" / f"{number}").write_bytes(content)
        records.append({"image": f"{number}", "conversations": turns()})
    (tmp_path / "images" / "thin.png").write_bytes(encoded(noise((1, 150)), "PNG"))
    records.append({"image": "thin.png", "conversations": turns()})
    (tmp_path / "data.json").write_text(json.dumps(records))
    sources = (tmp_path / "data.json",)
    make_shards(MakeSettings(sources, tmp_path / "out", images=tmp_path / "images", max_bad_fraction=0))
    [index] = open_indexes(tmp_path / "out")
    assert len(index) == len(records) and not index.fault_I.any()
    for row in range(len(index)):
        sample = index.sample(row)
        [image] = [decode_image(read_member(sample, member)) for member in sample.images]
        assert image.mode == "RGB" and index.image_sizes(row) == [image.size]
    assert {index.sample(row).images[0].extension for row in range(len(index))} == {"jpg", "png", "webp"}


def test_wrong_settings(tmp_path, settings, source):
    for change in ({"samples_per_shard": 0}, {"max_shard_bytes": 0}, {"num_workers": -1}, {"max_bad_fraction": 2}):
        with pytest.raises(ValueError, match="--"):
            settings(**change)
    with pytest.raises(ValueError, match="is where the sources lie"):
        make_shards(settings(output=tmp_path))
    with pytest.raises(ValueError, match="lies within --source"):
        make_shards(MakeSettings((tmp_path,), tmp_path / "below" / "out", images=tmp_path / "images"))
    with pytest.raises(ValueError, match="does not exist"):
        make_shards(MakeSettings((tmp_path / "gone",), tmp_path / "out"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="name it with --format"):
        make_shards(MakeSettings((tmp_path / "a.txt",), tmp_path / "out"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="found no .json, .jsonl, .parquet or .tar"):
        make_shards(MakeSettings((tmp_path / "folder",), tmp_path / "out"))
    (tmp_path / "folder" / "a.tar").write_bytes(bytes(1024))
    (tmp_path / "folder" / "a.json").write_text("[]")
    with pytest.raises(ValueError, match="found 1 llava, 1 tars; name files of one format"):
        make_shards(MakeSettings((tmp_path / "folder",), tmp_path / "out"))
    with pytest.raises(ValueError, match="--images belongs to the format llava"):
        make_shards(MakeSettings((tmp_path / "folder" / "a.tar",), tmp_path / "out", images=tmp_path))
    with pytest.raises(ValueError, match="filter by the ratings of Parquet"):
        make_shards(settings(min_ratings={"relevance": 1}))


def test_reports_add_up():
    first, second = MakeReport(num_samples=1, faults=Counter({"no_json": 2})), MakeReport(num_samples=3, num_words=4)
    first.add(second)
    first.add(MakeReport(faults=Counter({"no_json": 1})))
    assert (first.num_samples, first.num_words, first.faults, first.num_seen) == (4, 4, {"no_json": 3}, 7)
    assert MakeReport.from_json(json.loads(json.dumps(first.to_json()))).to_json() == first.to_json()


@pytest.mark.processes
def test_the_command_line(tmp_path, source):
    lines = tmp_path / "more.jsonl"
    lines.write_text(json.dumps({"conversations": turns("Q")}) + "\n" + json.dumps({"conversations": []}))
    command = [sys.executable, str(TOOL), "--source", str(source), str(lines), "--images", str(tmp_path / "images")]
    command += ["--output", str(tmp_path / "out"), "--num-workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "1 of 13 samples cannot be used" in done.stderr
    done = run_here(*command[1:], "--resume", "--max-bad-fraction", "0.5")
    assert done.returncode == 0, done.stderr
    assert "12 samples, 10 images" in done.stdout and "skipped: 1 (7.69%)" in done.stdout


def test_options_of_the_command_line(tmp_path):
    path = tmp_path / "a.parquet"
    rows = {
        "texts": [[{"user": "Q", "assistant": "A"}, {"user": "R", "assistant": "B"}]],
        "formatting_ratings": [[4, 5]],
    }
    pq.write_table(pyarrow.table({**rows, "images": [[]]}), path)
    common = ["--output", str(tmp_path / "out"), "--num-workers", "0", "--overwrite"]
    make_main(["--source", str(path), *common])
    make_main(["--source", str(path), "--min-formatting", "5", *common])
    [index] = open_indexes(tmp_path / "out")
    sample = index.sample(0)
    assert b'"R"' in read_member(sample, sample.text) and sample.text.size < 130
    for wrong, status in ((["--min-relevance", "5"], 2), (["--format", "llava"], 1)):
        with pytest.raises(SystemExit) as ended:
            make_main(["--source", str(path), *wrong, *common])
        assert ended.value.code == status
