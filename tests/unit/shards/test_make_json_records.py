import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laver_megatron.shards import json_records
from laver_megatron.shards.json_records import read_records

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a"\\[]{},\n é猫', max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('k"\\]', max_size=3), inner, max_size=4),
    max_leaves=10,
)


@settings(deadline=None)
@given(st.lists(VALUES, max_size=8), st.integers(1, 40), st.sampled_from([None, 2]), st.booleans())
def test_an_array_read_through_any_window_is_what_json_reads(tmp_path_factory, values, chunk, indent, plain):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=plain), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "_CHUNK_BYTES", chunk)
        assert [json.loads(record) for record in read_records(path)] == values


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b" \n "])
def test_lines(tmp_path, mark):
    path = tmp_path / "a.jsonl"
    path.write_bytes(mark + b'{"a": 1}\r\n\n  {"b": "["}\n{"c": 3}')
    assert [json.loads(record) for record in read_records(path)] == [{"a": 1}, {"b": "["}, {"c": 3}]


def test_a_bad_record_spoils_only_itself(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"b": nonsense}, ' + "[" * 100_000 + "]" * 100_000 + ', {"c": 3}]')
    first, bad, deep, last = read_records(path)
    assert (first, bad, last) == (b'{"a": 1}', b'{"b": nonsense}', b'{"c": 3}')
    assert len(deep) == 200_000


@pytest.mark.parametrize(
    "content, what",
    [
        ('[{"a": 1}, {"b": 2}', "is cut off: the JSON array does not end"),
        ('[{"a": "text', "is cut off"),
        ('[{"a": 1}] [{"b": 2}]', "goes on after the end of its JSON array, at byte 10"),
        ("hello", "neither a JSON array nor JSON Lines"),
        ("\x00", "neither a JSON array nor JSON Lines"),
    ],
)
def test_broken_files(tmp_path, content, what):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=what):
        list(read_records(path))


def test_records_without_end_are_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(json_records, "_CHUNK_BYTES", 100)
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": "' + b"x" * 5000 + b'"}\n{"b": 2}\n')
    cut, whole = read_records(path)
    assert len(cut) == 1000 and whole == b'{"b": 2}'
    path.write_bytes(b'[{"a": "' + b"x" * 5000 + b'"}]')
    with pytest.raises(ValueError, match="the record at byte 1 is above 1,000 bytes"):
        list(read_records(path))


def test_empty(tmp_path):
    path = tmp_path / "a.json"
    for content in ("", "  \n", "[]", "[ \n ]"):
        path.write_text(content)
        assert list(read_records(path)) == []


def test_a_file_is_not_held_in_memory(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"a": "x" * 1000}] * 20_000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records(path)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 5 << 20  # of 20 MB: a window of 1 MB, and one being filled
    finally:
        tracemalloc.stop()


def test_lines_that_are_bare_lists(tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [[{"from": "human", "value": "a ]\n[ b"}, {"from": "gpt", "value": "x"}], [], [{"c": [1]}]]
    for between in ("\n", "\r\n", "\n\n"):
        path.write_text("\n" + between.join(map(json.dumps, turns)) + "\n", newline="")
        assert [json.loads(record) for record in read_records(path)] == turns
    for array in ("[[1],\n[2]]", "[[1]\n,[2]]\n", "[\n[1],[2]\n]", "[\n[1]\n,\n[2]]"):
        path.write_text(array)
        assert [json.loads(record) for record in read_records(path)] == [[1], [2]]
