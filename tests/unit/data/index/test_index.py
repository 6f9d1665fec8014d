import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from laver_megatron.data.index.build import index_tars
from laver_megatron.data.index.faults import FAULTS, Fault
from laver_megatron.data.index.index_file import check_index, read_index, write_index
from laver_megatron.data.index.opening import find_shards, find_shards_and_urls, open_indexes, path_problems
from laver_megatron.data.index.shard_index import concatenate, select
from laver_megatron.shards.commands import index_summary
from tests.content import picture_bytes, question, read_member
from tests.programs import run_here

TOOL = Path(__file__).parents[4] / "tools" / "index_shards.py"


@pytest.fixture(scope="module")
def demo_index(demo_dir):
    return index_tars(find_shards(demo_dir / "shards"))


@pytest.fixture
def shards(demo_dir, tmp_path):
    """A copy of the demo's shards, without their index, that a test may change."""
    others = shutil.ignore_patterns("*.parquet", ".*")
    return Path(shutil.copytree(demo_dir / "shards", tmp_path / "shards", ignore=others))


def rows(index):
    return [(index.sample(row), index.image_sizes(row)) for row in range(len(index))]


def faults_of(index):
    return {index.key(row): FAULTS[index.fault_I[row] - 1] if index.fault_I[row] else None for row in range(len(index))}


# --- building ------------------------------------------------------------------------------------------


def test_the_index_holds_what_webdataset_reads(demo_dir, demo_index):
    paths = find_shards(demo_dir / "shards")
    theirs = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
    assert [demo_index.key(row) for row in range(len(demo_index))] == [sample["__key__"] for sample in theirs]
    assert not demo_index.faults and not demo_index.left_out and not demo_index.ignored
    for row, other in enumerate(theirs):
        sample = demo_index.sample(row)
        for member in sample.members:
            assert read_member(sample, member) == other[member.extension]
        assert len(sample.images) == demo_index.num_images_I[row]
        assert len(sample.images) == len([name for name in other if name.endswith(("jpg", "png"))])
    assert [shard.path for shard in demo_index.shards] == [str(path) for path in paths]
    assert sum(shard.num_samples for shard in demo_index.shards) == len(demo_index)


@pytest.mark.processes
def test_processes_change_nothing_but_who_works(demo_dir, demo_index):
    paths = find_shards(demo_dir / "shards")
    progress = []
    other = index_tars(paths, 3, progress.append)
    assert rows(other) == rows(demo_index) and other.fingerprint == demo_index.fingerprint
    assert sum(progress) == sum(path.stat().st_size for path in paths)


def test_pictures_come_in_the_order_of_their_numbers(write_shard):
    files = {f"{number}.png": picture_bytes((10 + number, 8), "png") for number in (10, 2, 0)}
    index = index_tars([write_shard({"a": {"json": question("<image>" * 3), **files}})])
    assert [member.extension for member in index.sample(0).images] == ["0.png", "2.png", "10.png"]
    assert index.image_sizes(0) == [(10, 8), (12, 8), (20, 8)]
    assert not index.faults


def test_sizes_are_those_of_the_upright_picture(write_shard):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    index = index_tars([write_shard({"a": {"json": question(), "jpg": picture_bytes((40, 30), exif=exif)}})])
    assert index.image_sizes(0) == [(30, 40)]


BAD = {
    Fault.invalid_json: {"json": b"{'a': 1}", "jpg": picture_bytes()},
    Fault.no_turns: {"json": b"[]"},
    Fault.unknown_role: {"json": json.dumps([{"role": "robot", "content": "x"}]).encode()},
    Fault.text_not_string: {"json": json.dumps([{"role": "user", "content": 7}]).encode()},
    Fault.image_count: {"json": question("<image><image>"), "jpg": picture_bytes()},
    Fault.empty_answer: {"json": question("?", " \n")},
    Fault.no_answer: {"json": json.dumps([{"role": "user", "content": "x"}]).encode()},
    Fault.unreadable_image: {"json": question(), "jpg": b"no picture"},
    Fault.image_too_large: {"json": question(), "png": picture_bytes((80, 80), "png")},
    Fault.image_shape: {"json": question(), "png": picture_bytes((1, 300), "png")},
}


def test_every_fault_of_a_sample_is_found_logged_and_kept(write_shard, tmp_path, caplog):
    samples = {"good": {"json": question(), "jpg": picture_bytes()}}
    samples |= {f"key/{fault}": files for fault, files in BAD.items()}
    index = index_tars([write_shard(samples)], max_pixels=80 * 80 - 1)
    write_index(index, tmp_path / "index.parquet")
    for one in (index, read_index(tmp_path / "index.parquet")):
        assert faults_of(one) == {"good": None, **{f"key/{fault}": fault for fault in BAD}}
        assert one.faults == Counter(dict.fromkeys(BAD, 1))
    for fault in BAD:
        assert f"train-00000.tar: 'key/{fault}' cannot be used ({fault}, 1 so far)" in caplog.text


def test_a_fault_does_not_hide_the_other_pictures(write_shard):
    files = {"0.jpg": b"?", "1.jpg": picture_bytes((8, 9))}
    index = index_tars([write_shard({"a": {"json": question("<image><image>"), **files}})])
    assert index.image_sizes(0) == [(0, 0), (8, 9)] and index.sample(0).fault is Fault.unreadable_image


def test_pictures_without_text_and_other_files(write_shard, caplog):
    files = {"pickle": b"cos\nsystem\n(S'false'\ntR.", "pyd": b"x", "npy": b"x", "pth": b"x", "cls": b"1"}
    samples = {"a": {"json": question(), "jpg": picture_bytes(), **files}, "b": {"jpg": b"x"}, "c": {"pickle": b"x"}}
    index = index_tars([write_shard(samples)])
    assert faults_of(index) == {"a": None}
    assert index.left_out == {Fault.no_json: 1}
    assert index.ignored == {"pickle": 2, "pyd": 1, "npy": 1, "pth": 1, "cls": 1}
    assert "'b' cannot be used (no_json, 1 so far): pictures or other media without a .json" in caplog.text


def write_tar(path, names, content=None):
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(content or question("?"))
            tar.addfile(info, io.BytesIO(content or question("?")))
    return path


@pytest.mark.parametrize("key", ["../x", "a/../../x", "..", "/etc/x", "a\nb", "a\\b", "\x1b[31m", "a/.."])
def test_keys_that_could_be_paths(tmp_path, key):
    index = index_tars([write_tar(tmp_path / "a.tar", [f"{key}.json", "fine/b.json"])])
    assert index.sample(len(index) - 1).key == "fine/b" and index.fault_I[-1] == 0
    if not key.endswith(".."):  # whose name has no key at all
        assert faults_of(index)[key] is Fault.unsafe_key
    assert len(list(tmp_path.rglob("*"))) == 1  # nothing was unpacked


def test_keys_that_come_twice(tmp_path):
    names = ["a.json", "a.json", "b.json", "c.json", "b.json"]
    index = index_tars([write_tar(tmp_path / "a.tar", names)])
    assert [FAULTS[c - 1] if c else None for c in index.fault_I] == [
        Fault.duplicate_key, None, None, Fault.duplicate_key,
    ]  # fmt: skip
    again = index_tars([write_tar(tmp_path / "1.tar", ["a.json"]), write_tar(tmp_path / "2.tar", ["a.json"])])
    assert not again.faults  # keys need only be unique within a shard


MANY = [f"{number:04d}" for number in range(20)]


@pytest.mark.processes
@pytest.mark.parametrize("text", ["<image>\nWhat is it?", "What is it?"])
@pytest.mark.parametrize("order", [("json", "jpg"), ("jpg", "json")])
def test_files_of_a_sample_that_do_not_lie_together(tmp_path, order, text, caplog):
    """Taken as they come, texts would be learnt without their pictures."""
    contents = {"json": question(text), "jpg": picture_bytes()}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for extension in order:
            for key in MANY:
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(contents[extension])
                tar.addfile(info, io.BytesIO(contents[extension]))
    index = index_tars([tmp_path / "a.tar"])
    assert index.faults == {"scattered": 20} and not +index.left_out
    assert caplog.messages and all("`tar --sort=name`" in message for message in caplog.messages)
    with tarfile.open(tmp_path / "a.tar") as tar:
        tar.extractall(tmp_path / "files", filter="data")
    subprocess.run(["tar", "--sort=name", "-cf", "../b.tar", "-C", ".", "."], cwd=tmp_path / "files", check=True)
    mended = index_tars([tmp_path / "b.tar"])
    assert not mended.faults and len(mended.image_offset_P) == 20


def test_a_tar_of_a_mac(write_shard):
    """Every file comes with one of the same name behind `._`."""
    samples = {f"{number}": {"json": question(), "jpg": picture_bytes()} for number in range(3)}
    plain = index_tars([write_shard(samples)])
    shard = write_shard({f"{prefix}{key}": files for key, files in samples.items() for prefix in ("._", "")}, "mac.tar")
    index = index_tars([shard])
    assert not index.faults and not +index.left_out
    assert [index.key(row) for row in range(3)] == [plain.key(row) for row in range(3)]
    assert index.image_width_P.tolist() == plain.image_width_P.tolist()


def test_a_tar_that_is_cut_off_between_two_samples_says_so(write_shard, caplog):
    shard = write_shard({f"{i}": {"json": question(), "jpg": picture_bytes()} for i in range(8)})
    os.truncate(shard, index_tars([shard]).sample(5).text.offset - tarfile.BLOCKSIZE)
    caplog.clear()
    index = index_tars([shard])
    assert len(index) == 5 and index.left_out == {"damaged_shard": 1}
    assert "cut off: the file ends without a tar's closing zeros" in caplog.text


def test_unused_keys_of_records_stand_in_the_index(write_shard, tmp_path):
    records = [json.loads(question("Q")), {"messages": json.loads(question("Q")), "score": 3, "note": None}]
    shard = write_shard({f"{i}": {"json": json.dumps(record).encode()} for i, record in enumerate(records * 2)})
    index = index_tars([shard])
    assert index.other_keys == {"score": 2}
    write_index(index, tmp_path / "index.parquet")
    assert read_index(tmp_path / "index.parquet").other_keys == {"score": 2}
    assert concatenate([index, index]).other_keys == {"score": 4}
    assert "1  unused keys of records: score (2)" in index_summary(index)


def test_a_truncated_tar_gives_what_is_before_the_cut(write_shard, caplog):
    shard = write_shard({f"{i}": {"json": question(), "jpg": picture_bytes()} for i in range(8)})
    whole = index_tars([shard])
    cut = whole.sample(5).images[0].offset + 100
    os.truncate(shard, cut)
    index = index_tars([shard])
    assert rows(index)[:5] == rows(whole)[:5] and not index.fault_I[:5].any()
    assert len(index) == 5 and (index.faults + index.left_out) == {Fault.damaged_shard: 1}
    assert f"but the file has {cut}" in caplog.text and "'5' cannot be used (damaged_shard" in caplog.text


def test_a_sample_that_is_cut_apart(tmp_path):
    content = json.dumps([{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "x" * 700}]).encode()
    shard = write_tar(tmp_path / "a.tar", ["0.json", "0.jpg", "1.json", "1.jpg"], content)
    os.truncate(shard, index_tars([shard]).sample(1).images[0].offset + 1)
    index = index_tars([shard])
    assert faults_of(index) == {"0": Fault.unreadable_image, "1": Fault.damaged_shard} and not index.left_out


def test_garbage_in_the_middle_costs_only_what_it_covers(write_shard, caplog):
    shard = write_shard({f"{i}": {"json": question(), "jpg": picture_bytes()} for i in range(8)})
    whole = index_tars([shard])
    content = bytearray(shard.read_bytes())
    header = whole.sample(3).images[0].offset - 512
    content[header : header + 512] = b"garbage!" * 64
    shard.write_bytes(content)
    index = index_tars([shard])
    assert [row for row in rows(index) if row[0].key != "3"] == [row for row in rows(whole) if row[0].key != "3"]
    assert (index.faults + index.left_out) == {Fault.damaged_shard: 1}
    assert f"garbage instead of a tar header at byte {header}" in caplog.text
    end = whole.sample(4).images[0].offset - 512  # all of the sample: nothing of it is left to be seen
    content[header:end] = b"garbage!" * ((end - header) // 8)
    shard.write_bytes(content)
    index = index_tars([shard])
    assert len(index) == 7 and (index.faults + index.left_out) == {Fault.damaged_shard: 1}


def test_tars_without_a_sample(write_shard, tmp_path, caplog):
    with pytest.raises(ValueError, match=r"train-00000.tar holds no complete sample, but no_json \(1\).*KEY.json"):
        index_tars([write_shard({"a": {"jpg": b"x"}})])
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 1000)
    with pytest.raises(ValueError, match=r"b.tar holds no complete sample, but damaged_shard"):
        index_tars([tmp_path / "b.tar"])
    index = index_tars([tmp_path / "b.tar", write_tar(tmp_path / "a.tar", ["a.json"])])  # one of many ends nothing
    assert len(index) == 1 and index.left_out == {Fault.damaged_shard: 1}
    assert "b.tar holds no complete sample" in caplog.text
    with pytest.raises(ValueError, match="gone.tar cannot be read: No such file"):
        index_tars([tmp_path / "gone.tar"])


# --- columns -------------------------------------------------------------------------------------------


@given(st.data())
def test_select_and_concatenate_are_lists_of_samples(demo_index, data):
    numbers = st.lists(st.integers(0, len(demo_index) - 1), max_size=20)
    parts = data.draw(st.lists(numbers, min_size=1, max_size=3))
    joined = concatenate([select(demo_index, np.array(part, np.int64)) for part in parts])
    everything = rows(demo_index)
    assert rows(joined) == [everything[row] for part in parts for row in part]
    assert sum(shard.num_samples for shard in joined.shards) == len(joined)


def test_the_fingerprint_follows_order_and_content_and_not_the_place(shards, demo_index, tmp_path):
    shutil.move(shards, tmp_path / "elsewhere")
    moved = index_tars(find_shards(tmp_path / "elsewhere"))
    assert moved.fingerprint == demo_index.fingerprint
    everything = np.arange(len(demo_index))
    assert select(demo_index, everything).fingerprint == demo_index.fingerprint
    different = [
        select(demo_index, everything[::-1]),
        select(demo_index, everything[1:]),
        concatenate([demo_index, demo_index]),
        replace(demo_index, checksum_I=demo_index.checksum_I + np.uint64(1)),
        replace(demo_index, fault_I=demo_index.fault_I + np.int8(1)),
        replace(demo_index, image_width_P=demo_index.image_width_P + np.int32(1)),
        replace(demo_index, keys=demo_index.keys.take(np.roll(everything, 1))),
    ]
    fingerprints = {index.fingerprint for index in different} | {demo_index.fingerprint}
    assert len(fingerprints) == len(different) + 1


def test_a_pickled_column_is_small(demo_index):
    """No Python object a sample: ten million samples must fit a reader's memory."""
    columns = [value for value in vars(demo_index).values() if isinstance(value, np.ndarray)]
    assert sum(column.nbytes for column in columns) + demo_index.keys.nbytes < 150 * len(demo_index)


# --- the file ------------------------------------------------------------------------------------------


def test_a_written_index_reads_the_same(demo_index, tmp_path):
    path = tmp_path / "any name.parquet"
    write_index(demo_index, path)
    index = read_index(path)
    assert rows(index) == rows(demo_index) and index.fingerprint == demo_index.fingerprint
    assert index.shards == demo_index.shards and index.path == path
    assert list(tmp_path.iterdir()) == [path]  # no temporary file
    check_index(index)
    names = pq.read_schema(path).names
    assert names[:4] == ["shard", "key", "text_offset", "text_size"]


def test_an_index_without_pictures(write_shard, tmp_path):
    index = index_tars([write_shard({"a": {"json": question("?")}})])
    write_index(index, tmp_path / "i.parquet")
    assert rows(read_index(tmp_path / "i.parquet")) == rows(index)


def test_data_and_index_move_together(shards, tmp_path):
    write_index(index_tars(find_shards(shards)), shards / "index.parquet")
    (tmp_path / "subsets").mkdir()
    write_index(index_tars(find_shards(shards)), tmp_path / "subsets" / "all.parquet")
    (tmp_path / "new").mkdir()
    for name in ("shards", "subsets"):
        shutil.move(tmp_path / name, tmp_path / "new" / name)
    for index in (read_index(tmp_path / "new/shards/index.parquet"), read_index(tmp_path / "new/subsets/all.parquet")):
        check_index(index)
        assert all(shard.path.startswith(str(tmp_path / "new" / "shards")) for shard in index.shards)


def test_shards_that_changed_are_named_with_both_sizes(shards):
    paths = find_shards(shards)
    write_index(index_tars(paths), shards / "index.parquet")
    size = paths[0].stat().st_size
    os.truncate(paths[0], size - 512)
    paths[1].unlink()
    with pytest.raises(ValueError) as caught:
        open_indexes(shards)
    assert f"has {size - 512} bytes, but {size} in the index" in str(caught.value)
    assert f"{paths[1]}: No such file" in str(caught.value) and "tools/index_shards.py" in str(caught.value)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.97])
def test_a_damaged_index_is_no_index(demo_index, tmp_path, place):
    path = tmp_path / "index.parquet"
    write_index(demo_index, path)
    content = bytearray(path.read_bytes())
    for offset in range(8):
        content[int(place * len(content)) + offset] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="index.parquet .*tools/index_shards.py --overwrite"):
        read_index(path)


def test_files_that_are_no_index(tmp_path, demo_index):
    path = tmp_path / "index.parquet"
    with pytest.raises(ValueError, match="does not exist"):
        read_index(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read_index(path)
    write_index(demo_index, path)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({}), path)
    with pytest.raises(ValueError, match="no index of version 2"):
        read_index(path)
    pq.write_table(table.drop_columns(["checksum"]), path)
    with pytest.raises(ValueError, match="cannot be used"):
        read_index(path)
    pq.write_table(table.slice(1), path)
    with pytest.raises(ValueError, match="damaged: its content has the hash"):
        read_index(path)


# --- what a user names ---------------------------------------------------------------------------------


def test_lists_in_braces_and_file_urls(write_shard, tmp_path):
    for number in range(3):
        write_shard({"a": {"json": question("Q")}}, f"x-{number:03d}.tar")
    names = [tmp_path / f"x-{number:03d}.tar" for number in range(3)]
    assert find_shards(f"{tmp_path}/x-{{000..002}}.tar") == names
    assert find_shards(f"{tmp_path}/x-{{000,002}}.tar") == [names[0], names[2]]
    assert find_shards(f"{tmp_path}/x-{{000..001}}*.tar") == names[:2]
    with pytest.raises(ValueError, match=r"x-003.tar does not exist and 1 more of .*x-{000..004}.tar"):
        find_shards(f"{tmp_path}/x-{{000..004}}.tar")
    (tmp_path / "a folder").mkdir()
    spaced = Path(shutil.copy(names[0], tmp_path / "a folder" / "x{1}.tar"))
    assert find_shards(str(spaced)) == [spaced]
    for url in (spaced.as_uri(), f"file://localhost{spaced.as_uri()[7:]}", f"file:{spaced}", f"FILE://{spaced}"):
        assert find_shards(url) == [spaced] == [Path(path) for path in find_shards_and_urls([url])]
        assert path_problems([url]) == [] and len(open_indexes(url)) == 1
    [problem] = path_problems(["file://other/x.tar"])
    assert problem == "file://other/x.tar names a file of the machine other; write file:///PATH, or the path alone"
    assert path_problems([(tmp_path / "none.tar").as_uri()]) == [f"{tmp_path}/none.tar does not exist"]


def test_entries_of_all_kinds(shards, tmp_path, demo_index, caplog):
    caplog.set_level(logging.INFO, "laver_megatron")
    one, two = find_shards(shards)
    [unindexed] = open_indexes(shards)
    assert unindexed.fingerprint == demo_index.fingerprint and "which no index lists" in caplog.text
    write_index(unindexed, shards / "index.parquet")
    write_index(select(unindexed, np.arange(5)), tmp_path / "five.parquet")
    caplog.clear()
    entries = [shards, shards / "index.parquet", tmp_path / "five.parquet", two, str(shards / "*.tar")]
    indexes = open_indexes(entries)
    assert "indexing" not in caplog.text  # nothing is read again
    train = unindexed.shards[0].num_samples
    assert [len(index) for index in indexes] == [120, 120, 5, 120 - train, 120]
    assert rows(indexes[3]) == rows(unindexed)[train:] and [s.path for s in indexes[3].shards] == [str(two)]


def test_tars_beside_an_index_that_does_not_list_them(shards, write_shard):
    write_index(index_tars(find_shards(shards)), shards / "index.parquet")
    new = shards / "new.tar"
    shutil.move(write_shard({"a": {"json": question("?")}}), new)
    with pytest.raises(ValueError, match=r"lists 2 shards but not new.tar; index them with tools/index_shards.py"):
        open_indexes(shards)
    assert len(open_indexes(shards / "index.parquet")[0]) == 120
    assert len(open_indexes(str(shards / "*.tar"))[0]) == 121


def test_find_names_everything_that_is_wrong(tmp_path, write_shard):
    (tmp_path / "void.tar").touch()
    (tmp_path / "nothing").mkdir()
    wrong = [tmp_path / "gone.tar", tmp_path / "no-*.tar", tmp_path / "nothing", tmp_path / "void.tar"]
    with pytest.raises(ValueError) as caught:
        find_shards([write_shard({"a": {"json": question()}}), *wrong])
    assert all(str(path) in str(caught.value) for path in wrong)
    assert "train-00000" not in str(caught.value)
    for look in (find_shards, open_indexes):
        with pytest.raises(ValueError, match="no shards were named"):
            look([])


def test_find_takes_files_directories_and_globs_once(tmp_path, write_shard):
    first, second = (write_shard({"a": {"json": question()}}, name) for name in ("1.tar", "2.tar"))
    assert find_shards([second, tmp_path, str(tmp_path / "*.tar")]) == [second, first]


def test_lists_of_urls_are_written_out():
    numbered = [f"https://h/{number}.tar" for number in ("08", "09", "10")]
    assert find_shards_and_urls(["https://h/{08..10}.tar", "pipe:x"]) == [*numbered, "pipe:x"]


# --- the tool ------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_the_tool_writes_an_index_and_says_what_is_in_it(write_shard, tmp_path):
    samples = {"a": {"json": question(), "jpg": picture_bytes()}, "b": {"json": b"{"}, "c": {"jpg": b"", "npy": b""}}
    write_shard(samples)
    command = [sys.executable, TOOL, "--shards", tmp_path, "--num-workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in (
        "1  usable samples", "1  pictures in them", "2  samples that cannot be used:", "1  invalid_json ",
        "1  no_json ", "1  other files, never opened: npy (1)",
    ):  # fmt: skip
        assert line in done.stdout
    assert "train-00000.tar: 'b' cannot be used (invalid_json" in done.stderr
    assert len(read_index(tmp_path / "index.parquet")) == 2
    again = run_here(TOOL, "--shards", tmp_path)
    assert again.returncode == 2 and "is there already; replace it with --overwrite" in again.stderr
    assert "Traceback" not in again.stderr
    assert run_here(TOOL, "--shards", tmp_path, "--overwrite").returncode == 0
    other = run_here(TOOL, "--shards", tmp_path / "*.tar", "--output", tmp_path / "x" / "y.parquet")
    assert other.returncode == 0 and len(read_index(tmp_path / "x" / "y.parquet")) == 2
    nothing = run_here(TOOL, "--shards", tmp_path / "gone")
    assert nothing.returncode == 2 and "gone does not exist" in nothing.stderr


@pytest.mark.parametrize("kept", ["json", "half a picture", "half a text"])
def test_a_tar_that_goes_on_as_zeros(tmp_path, kept, caplog):
    """Broken off in a file that had its final size already: the sample that is cut is damaged, whatever is left of it,
    and so are those that are missing."""
    picture = picture_bytes((64, 64), quality=95)
    samples = {f"k{number}": {"json": question(), "jpg": picture} for number in range(20)}
    path = tmp_path / "cut.tar"
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for extension, payload in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
    content = path.read_bytes()
    texts = content.index(b"k7.json") + 512
    pictures = content.index(b"k7.jpg") + 512
    ends = {"json": pictures - 512, "half a picture": pictures + len(picture) // 2, "half a text": texts + 20}
    path.write_bytes(content[: ends[kept]].ljust(3 << 20, b"\0"))
    index = index_tars([path])
    assert [index.key(row) for row in np.flatnonzero(index.fault_I == 0)] == [f"k{number}" for number in range(7)]
    assert set(index.faults) == {"damaged_shard"} and index.left_out["damaged_shard"] > 100
    assert "are zeros" in caplog.text and "'k7' cannot be used (damaged_shard" in caplog.text
