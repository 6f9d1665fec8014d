import io
import random
import tarfile
from itertools import groupby

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset import tariterators

from laver_megatron.data.index.members import Damage, MemberGroup, group_members, walk

BLOCK = 512


def tar_bytes(files, format=tarfile.USTAR_FORMAT, **attributes):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def found(content):
    return list(group_members(io.BytesIO(content), len(content)))


def keys(content):
    return [entry.key for entry in found(content) if isinstance(entry, MemberGroup)]


def damages(content):
    return [entry for entry in found(content) if isinstance(entry, Damage)]


FILES = [(f"{i:03d}.{extension}", bytes([i]) * (100 + 300 * i)) for i in range(6) for extension in ("json", "jpg")]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_formats_with_long_and_foreign_names(format):
    long = [(f"{'folder/' * 13}{'n' * 60}{i}.json", bytes([i]) * 700) for i in range(3)] + [("übung/é.0.JPG", b"x")]
    if format != tarfile.USTAR_FORMAT:
        long.append((f"{'n' * 300}.json", b"y"))
    content = tar_bytes(long, format, mtime=1.5 if format == tarfile.PAX_FORMAT else 1)
    groups = found(content)
    assert [f"{group.key}.{group.members[0].extension}" for group in groups] == [
        name.replace("JPG", "jpg") for name, _ in long
    ]
    for group, (_, expected) in zip(groups, long, strict=True):
        [member] = group.members
        assert content[member.offset : member.offset + member.size] == expected


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["json", "jpg", "0.png"]), st.binary(max_size=1100))))
def test_walk_agrees_with_tarfile(parts):
    content = tar_bytes([(f"{key}.{extension}", payload) for key, extension, payload in parts], tarfile.PAX_FORMAT)
    members = list(walk(io.BytesIO(content), len(content)))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        theirs = [(info.name, info.offset_data, info.size) for info in tar]
    assert [(f"{key}.{m.extension}", m.offset, m.size) for key, m in members] == theirs


def test_keys_and_groups_are_webdatasets(tmp_path):
    names = ["a/b.c/x.0.png", "a/b.c/x.json", "y.tar.gz", "y.json", "z.json"]
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes([(name, b"{}") for name in names]))
    theirs = webdataset.WebDataset(str(path), shardshuffle=False)
    expected = [(s["__key__"], {e for e in s if not e.startswith("__")}) for s in theirs]
    assert [(group.key, {m.extension for m in group.members}) for group in found(path.read_bytes())] == expected


names = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(
            ["", "./", "d/", "a.b/", "d/e/", ".h/", "__MACOSX/", "__MACOSX/d/", "__meta__/", "d/__MACOSX/"]
        ),
        st.sampled_from(["", "._", ".", ".."]),
        st.sampled_from(["0001", "0002", "README", "x y", "é" * 60, "long" * 40]),
        st.sampled_from(["", ".", ".json", ".jpg", ".JPG", ".0.png", ".Tar.GZ", ".json.gz"]),
    ),
)
kinds = st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE])


@given(st.lists(st.tuples(names, kinds), max_size=14), st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
@settings(max_examples=300)
def test_grouping_is_webdatasets(entries, form):
    """On any tar, but for names that webdataset takes for keys by mistake: hidden files of a folder (`d/._a.jpg` has
    the key `d/` there), and copies of them in `__MACOSX/`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, kind in entries:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, 2 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"{}"))

    def is_wanted(name):
        *folders, base = name.split("/")
        return not base.startswith(".") and "__MACOSX" not in folders

    files = tariterators.tar_file_iterator(io.BytesIO(buffer.getvalue()), select_files=is_wanted)
    # A key that comes twice ends webdataset's grouping; ours reports it, and only the order of files is compared then.
    listed = [tariterators.base_plus_ext(file["fname"]) for file in files]
    theirs = [(key, extension.lower()) for key, extension in listed if key is not None]
    ours = [(g.key, [m.extension for m in g.members if m.extension != "(link)"]) for g in found(buffer.getvalue())]
    grouped = [(key, [extension for _, extension in group]) for key, group in groupby(theirs, lambda entry: entry[0])]
    assert [entry for entry in ours if entry[1]] == grouped


def test_what_macos_adds_breaks_no_sample():
    pairs = [(f"{number}.{end}", b"{}") for number in range(3) for end in ("json", "jpg")]
    added = [(f"._{name}", b"\0\5\x16\7") for name, _ in pairs]
    mixed = [entry for pair in zip(added, pairs, strict=True) for entry in pair] + [("__MACOSX/._0.json", b"x")]
    expected = [(str(number), ["json", "jpg"]) for number in range(3)]
    assert [(g.key, [m.extension for m in g.members]) for g in found(tar_bytes(mixed))] == expected


def test_links_and_folders_are_no_content():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("a.json")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    [group] = found(buffer.getvalue())
    assert [member.extension for member in group.members] == ["(link)"] * 3


@pytest.mark.parametrize("lost", [slice(0, 0), slice(100, 100), slice(0, 512), slice(3, 700)])
@pytest.mark.parametrize("inserted", [b"garbage!" * 64, b"g" * 77, b"\0" * 1024])
def test_the_walk_goes_on_behind_damage(lost, inserted):
    """Also where bytes were lost or added, so that headers are no longer at multiples of 512."""
    content = tar_bytes(FILES)
    header = content.index(b"002.jpg")
    broken = content[: header + lost.start] + inserted + content[header + lost.stop :]
    if lost == slice(0, 0) and len(inserted) % BLOCK == 0 and not any(inserted):
        expected = FILES  # zeros between two whole members: reported, and nothing is missing
    else:
        expected = [entry for entry in FILES if entry[0] != "002.jpg"]
    groups = [entry for entry in found(broken) if isinstance(entry, MemberGroup)]
    names = [f"{group.key}.{member.extension}" for group in groups for member in group.members]
    assert names in ([name for name, _ in expected], [name for name, _ in FILES])
    [damage] = damages(broken)
    assert damage.start == header or lost.start > 0
    assert f"readable again from byte {damage.end}" in damage.what
    assert {group.key for group in groups if group.beside_damage} <= {"002", "003"} != set()
    for group in groups:
        for member in group.members:
            payload = broken[member.offset : member.offset + member.size]
            assert payload == bytes([int(group.key)]) * len(payload)


@pytest.mark.parametrize("end", [1, 511, 512, 600, 3 * 512, 5 * 512 + 3, -BLOCK * 21, -10300])
def test_a_truncated_tar_says_where(end):
    content = tar_bytes(FILES)[:end]
    entries = found(content)
    assert isinstance(entries[-1], Damage) or entries[-1].beside_damage
    [damage] = damages(content)
    assert damage.end == len(content) and damage.what.startswith("cut off")
    whole = [name for name, payload in FILES if payload in content]
    assert len([m for e in entries if isinstance(e, MemberGroup) for m in e.members]) <= len(whole)


def test_the_key_of_a_file_that_is_cut_off_is_known():
    content = tar_bytes(FILES)
    [damage] = damages(content[: content.index(b"002.jpg") + 600])
    assert damage.key == "002"


@pytest.mark.parametrize("num_blocks", [2, 20, 2048, 2050])
def test_zeros_that_end_a_tar(num_blocks):
    content = tar_bytes(FILES).rstrip(b"\0")
    end = -(-len(content) // BLOCK) * BLOCK
    assert not damages(content.ljust(end + num_blocks * BLOCK, b"\0"))


def test_more_zeros_than_end_a_tar():
    content = tar_bytes(FILES)
    cut = content.index(b"004.json")
    broken = content[:cut].ljust(3 << 20, b"\0")
    [damage] = damages(broken)
    assert (damage.start, damage.end) == (cut, len(broken))
    assert f"bytes {cut} to {len(broken)} are zeros, {len(broken) - cut} of them" in damage.what
    assert keys(broken) == ["000", "001", "002", "003"] and found(broken)[-1].beside_damage
    [damage] = damages(bytes(3 << 20))
    assert damage.start == 0


@pytest.mark.parametrize("distance", [512, 5000, 65_536 - 257, 65_536, 2 * 65_535 - 257, (3 << 20) + 77])
def test_the_next_header_is_found_at_any_distance(distance):
    """Also where the mark of a header lies across two chunks that are read one after the other."""
    content = tar_bytes(FILES)
    start = content.index(b"002.json")
    for num_added in range(distance - 6, distance + 7):
        broken = content[:start] + b"g" * num_added + content[start:]
        [damage] = damages(broken)
        assert (damage.start, damage.end) == (start, start + num_added)
        assert keys(broken) == [f"{number:03d}" for number in range(6)]


def test_every_record_of_a_long_extended_header_counts():
    """The last of those that repeat, and of a broken one none that follow."""
    small = {f"k{number:06d}": "v" for number in range(20_000)}
    records = tarfile.TarInfo("0.json")._create_pax_generic_header({**small, "path": "a/1.json"}, b"x", "utf-8")
    long, plain = records[BLOCK:].rstrip(b"\0"), tar_bytes([("0.json", b"{}")])
    later = b"17 path=b/2.json\n"
    for body, key in ((long, "a/1"), (long + later, "b/2"), (long + b"17 path=c/3.jsonX" + later, "a/1")):
        header = tarfile.TarInfo("header")
        header.type, header.size = tarfile.XHDTYPE, len(body)
        content = header.tobuf(tarfile.USTAR_FORMAT) + body.ljust(-(-len(body) // BLOCK) * BLOCK, b"\0") + plain
        assert keys(content) == [key]


def test_garbage_up_to_the_end():
    content = tar_bytes(FILES[:4]).rstrip(b"\0")
    size = -(-len(content) // BLOCK) * BLOCK
    [damage] = damages(content.ljust(size, b"\0") + b"garbage" * 1000)
    assert damage.start == size and damage.end == size + 7000


@given(st.integers(0, 2**32), st.integers(1, 3000))
def test_no_damage_hangs_or_escapes(seed, length):
    source = random.Random(seed)
    content = bytearray(tar_bytes(FILES, tarfile.PAX_FORMAT, mtime=0.5))
    place = source.randrange(len(content) - length)
    content[place : place + length] = source.randbytes(length)
    for entry in found(bytes(content)):
        if isinstance(entry, MemberGroup):
            assert all(m.offset >= 0 and m.offset + m.size <= len(content) for m in entry.members)


def test_what_is_no_tar_at_all():
    for content in (b"", b"x" * 10, b"x" * 5000, random.Random(0).randbytes(100_000)):
        assert keys(content) == [] and len(damages(content)) == 1
