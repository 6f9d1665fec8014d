import io
import json
import tarfile
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laver_megatron.data.index.build import index_tars
from laver_megatron.data.index.opening import open_indexes
from laver_megatron.shards import MakeSettings, make_shards
from laver_megatron.shards.commands import index_summary
from tests.unit.shards.form import encoded, jpeg, noise, turns


def write_tar(path, members):
    """members: [(name, bytes or anything that becomes JSON)], or (TarInfo, b"") for a link."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            if isinstance(name, tarfile.TarInfo):
                tar.addfile(name)
                continue
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@cache  # noise differs from call to call
def small(number):
    return jpeg((10 + number, 10))


def conversations(samples):
    return [sample["json"]["conversations"] for sample in samples.values()]


def test_plain_webdataset(tmp_path, make):
    several = {"id": "x", "conversations": turns("<image>" * 3 + "Q")}
    source = write_tar(
        tmp_path / "a.tar",
        [("k1.json", turns()), ("k1.jpg", small(1))]
        + [("dir/k2.10.png", encoded(noise(), "PNG")), ("dir/k2.2.jpg", small(2)), ("dir/k2.0.JPEG", small(0))]
        + [("dir/k2.json", several), ("dir/k2.cls", b"7"), ("dir/k2.pickle", b"cos\nsystem\n(S'false'\ntR.")]
        + [("k3.json", turns("No picture"))]
        + [("k4.left.gif", encoded(noise(mode="P"), "GIF")), ("k4.json", turns())],
    )
    samples = make(source)
    assert conversations(samples) == [turns(), several["conversations"], turns("No picture"), turns()]
    assert [sample["json"]["id"] for sample in samples.values()] == ["k1", "x", "k3", "k4"]
    assert [sorted(sample) for sample in samples.values()] == [
        ["jpg", "json"],
        ["0.jpg", "1.jpg", "2.png", "json"],
        ["json"],
        ["json", "png"],
    ]
    assert samples["000000001"]["1.jpg"] == small(2)
    assert make.report.num_converted == 1


def test_shards_of_our_own_stay_as_they_are(tmp_path, make):
    source = write_tar(tmp_path / "a.tar", [("k1.json", turns()), ("k1.jpg", small(1)), ("k2.json", turns("Q"))])
    make(source)
    make(tmp_path / "out", output="again")
    names = [path.name for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert names == ["shard-000000-00.tar"]
    assert (tmp_path / "out" / names[0]).read_bytes() == (tmp_path / "again" / names[0]).read_bytes()


def test_names_of_members_never_become_paths(tmp_path, make):
    source = write_tar(tmp_path / "a.tar", [("../../up.json", turns("Q")), ("/etc/abs.json", turns("Q"))])
    samples = make(source)
    assert list(samples) == ["000000000", "000000001"]
    assert [sample["json"]["id"] for sample in samples.values()] == ["../../up", "/etc/abs"]


def test_faults_of_records(tmp_path, make):
    source = write_tar(
        tmp_path / "a.tar",
        [("k1.jpg", small(1))]
        + [("k2.json", turns()), ("k2.json", turns())]
        + [("k3.json", b"{"), ("k4.json", turns()), ("k5.json", turns("Fine?"))],
    )
    assert len(make(source, max_bad_fraction=1)) == 1
    assert make.report.faults == {"no_json": 1, "duplicate_key": 1, "invalid_json": 1, "image_count": 1}


def test_scattered_and_hidden_files(tmp_path, make):
    """Texts would be learnt without pictures that lie elsewhere; what macOS adds is nothing."""
    pairs = [(f"k{number}", turns("Q"), small(number)) for number in range(3)]
    apart = [(f"{key}.json", text) for key, text, _ in pairs] + [(f"{key}.jpg", picture) for key, _, picture in pairs]
    whole = [("._k9.json", b"x"), ("k9.json", turns("Q")), ("._k9.jpg", b"x"), ("k9.jpg", small(9))]
    samples = make(write_tar(tmp_path / "a.tar", apart + whole), max_bad_fraction=1)
    assert [sorted(sample) for sample in samples.values()] == [["jpg", "json"]]
    assert make.report.faults == {"scattered": 3}


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


UNREAD = {
    "another kind of picture": (["k.heic"], {}, "unreadable_image"),
    "a hard link": ([link("k.jpg", "other.jpg", tarfile.LNKTYPE)], {}, "unreadable_image"),
    "a symbolic link": ([link("k.jpg", "other.jpg", tarfile.SYMTYPE)], {}, "unreadable_image"),
    "a picture that is named": ([], {"image": "k.jpg"}, "image_count"),
    "one of two that are named": (["k.0.jpg"], {"images": ["a.jpg", "b.jpg"]}, "image_count"),
    "video": (["k.mp4"], {}, "video_or_audio"),
    "audio under another name": (["k.left.wav"], {}, "video_or_audio"),
}


@pytest.mark.parametrize("first", ["json", "others"])
@pytest.mark.parametrize("what", UNREAD)
def test_what_is_not_read_is_not_left_out_of_what_is_learnt(tmp_path, make, what, first):
    """A question about a picture would be learnt blind."""
    files, keys, fault = UNREAD[what]
    others = [(info, b"") if isinstance(info, tarfile.TarInfo) else (info, small(0)) for info in files]
    text = ("k.json", {**keys, "conversations": turns("What colour is the car?")})
    before, after = [("a.json", turns("Q"))], [("z.json", turns("Q")), ("z.txt", b"a note")]
    members = [*before, *([text, *others] if first == "json" else [*others, text]), *after]
    source = write_tar(tmp_path / "a.tar", members)
    assert len(make(source, max_bad_fraction=1)) == 2
    assert make.report.faults == {fault: 1} and make.report.ignored == {"txt": 1}
    index = index_tars([source])
    assert index.faults == {fault: 1} and not +index.left_out and index.ignored == {"txt": 1}


def test_names_of_other_files_cannot_flood_or_paint_the_terminal(tmp_path, make):
    members = [("k.json", turns("Q")), ("k.\x1b[31mred\n", b"")] + [(f"k.x{number}", b"") for number in range(1000)]
    source = write_tar(tmp_path / "a.tar", members)
    make(source)
    for line in (make.report.summary(False).splitlines()[1], index_summary(index_tars([source])).splitlines()[-1]):
        assert line.isprintable() and len(line) < 3000 and "and 71 more" in line


names = st.sampled_from(["json", "jpg", "0.jpg", "1.PNG", "01.png", "txt", "heic", "mp4"])
contents = st.sampled_from(["<image>\nQ", "<image><image>Q", "Q", "about `<image>`"])


@given(st.lists(st.tuples(st.sampled_from("abc"), names), unique=True, max_size=10), st.lists(contents, min_size=3))
@settings(max_examples=60, deadline=None)
def test_indexing_and_making_judge_alike(entries, texts):
    """Whatever lies in a tar: the same samples with the same pictures in the same order, and the same faults."""
    text_of = dict(zip("abc", texts, strict=False))
    files = [(f"{key}.{end}", turns(text_of[key]) if end == "json" else small(len(end))) for key, end in entries]
    with tempfile.TemporaryDirectory() as folder:
        source = write_tar(Path(folder) / "a.tar", files)
        try:
            index = index_tars([source])
        except ValueError:  # nothing of a sample in it
            index = None
        try:
            report = make_shards(MakeSettings([source], Path(folder) / "out", max_bad_fraction=1))
            (made,) = open_indexes(Path(folder) / "out")
        except ValueError:
            assert index is None or index.fault_I.all()
            return
    assert index is not None and report.faults == index.faults + index.left_out
    usable = [row for row in range(len(index)) if not index.fault_I[row]]
    assert [index.image_sizes(row) for row in usable] == [made.image_sizes(row) for row in range(len(made))]
    assert report.faults or report.ignored == index.ignored


APART = [["a.jpg"], ["a.json", "a.heic"]]  # groups of one key, between which another key's lie


@pytest.mark.parametrize(
    "groups, text, fault",
    [
        (APART, "<image>\nQ", "scattered"),
        (APART[::-1], "<image>\nQ", "scattered"),
        (APART, "<image><image>Q", "scattered"),
        ([["a.jpg"], ["a.json", "a.mp4"]], "Q", "scattered"),
        ([["a.json", "a.mp4"], ["a.jpg"]], "Q", "scattered"),
        ([["a.jpg"], ["a.json", "a.json"]], "Q", "scattered"),
        ([["a.jpg", "a.heic"], ["a.txt"]], "Q", "no_json"),
    ],
)
def test_scattered_goes_before_what_is_wrong_with_the_files_that_lie_together(tmp_path, make, groups, text, fault):
    members = [(name, turns(text) if name.endswith("json") else small(0)) for name in groups[0]]
    members += [("b.json", turns("Q"))]
    members += [(name, turns(text) if name.endswith("json") else small(1)) for name in groups[1]]
    source = write_tar(tmp_path / "a.tar", members)
    assert len(make(source, max_bad_fraction=1)) == 1
    index = index_tars([source])
    assert make.report.faults == index.faults + index.left_out == {fault: 1}


@pytest.mark.parametrize("where", ["middle", "end"])
def test_damaged_tars(tmp_path, make, where):
    members = [(f"k{number}.{end}", content) for number in range(9) for end, content in
               (("json", turns()), ("jpg", small(number)))]  # fmt: skip
    source = write_tar(tmp_path / "a.tar", members)
    content = bytearray(source.read_bytes())
    place = content.index(b"k4.json")
    if where == "end":
        content = content[: place + 600]
    else:
        content[place : place + 512] = b"garbage!" * 64
    source.write_bytes(content)
    samples = make(source, max_bad_fraction=1)
    ids = [sample["json"]["id"] for sample in samples.values()]
    whole = ["k0", "k1", "k2", "k3", "k5", "k6", "k7", "k8"] if where == "middle" else ["k0", "k1", "k2", "k3"]
    assert ids == whole
    assert make.report.faults.total() == 2, "the damage, and what lies behind it without its text"
    with pytest.raises(ValueError, match="damaged_shard"):
        make(source, max_bad_fraction=0.01, output="strict")


def test_beside_a_damage_a_sample_may_lack_pictures(tmp_path, make):
    """One that does not say how many it has is not taken for whole, with some left or with none."""
    unsaid = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A."}]
    members = [("k0.json", turns()), ("k0.jpg", small(0)), ("k1.json", unsaid), ("k1.0.jpg", small(1)),
               ("k1.1.jpg", small(2)), ("k2.json", turns()), ("k2.jpg", small(3)), ("k3.json", unsaid),
               ("k3.jpg", small(4))]  # fmt: skip
    source = write_tar(tmp_path / "a.tar", members)
    content = bytearray(source.read_bytes())
    for name in (b"k1.1.jpg", b"k3.jpg"):
        place = content.index(name)
        content[place : place + 512] = b"garbage!" * 64
    source.write_bytes(content)
    samples = make(source, max_bad_fraction=1)
    assert [sample["json"]["id"] for sample in samples.values()] == ["k0", "k2"]


def test_onevision_captions(tmp_path, make):
    packed = {"images": ["/data/x/img_a.jpg", "b.jpg"], "prompts": ["Describe.", ""], "captions": ["One.", "Two."]}
    source = write_tar(
        tmp_path / "a.tar",
        [("ps_0.img0.jpg", small(0)), ("ps_0.img1.jpg", small(1)), ("ps_0.json", packed)]
        + [("ps_1.img0.jpg", small(2)), ("ps_1.json", {"images": ["img0.jpg"], "captions": ["Three."]})],
    )
    samples = make(source)
    assert list(samples) == ["000000000-000", "000000000-001", "000000001"]
    assert conversations(samples) == [
        turns("<image>\nDescribe.", "One."),
        turns("<image>\n", "Two."),
        turns("<image>\n", "Three."),
    ]
    assert [sample["jpg"] for sample in samples.values()] == [small(0), small(1), small(2)]
    assert [sample["json"]["id"] for sample in samples.values()] == ["ps_0/0", "ps_0/1", "ps_1/0"]


def test_onevision_turns_in_packs(tmp_path, make):
    packed = {
        "images": [["img000.jpg"], [], ["img002.jpg", "img003.jpg"]],
        "prompt": [["<image>What?"], ["Hello?", "Fine too."], ["<image>and<image>", "More?"]],
        "captions": [["A."], ["And you?", "Good."], ["B.", "C."]],
    }
    pictures = [(f"ps_0.img{number:03d}.jpg", small(number)) for number in (3, 0, 2)]
    samples = make(write_tar(tmp_path / "a.tar", [*pictures, ("ps_0.json", packed)]))
    assert conversations(samples) == [
        turns("<image>What?", "A."),
        turns("Hello?", "And you?") + turns("Fine too.", "Good."),
        turns("<image>and<image>", "B.") + turns("More?", "C."),
    ]
    assert [sample.get("jpg", sample.get("0.jpg")) for sample in samples.values()] == [small(0), None, small(2)]
    assert samples["000000000-002"]["1.jpg"] == small(3)


def test_onevision_mix(tmp_path, make):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image><image>Q"}]
    messages.append({"role": "assistant", "content": "A"})
    named = {"texts": messages, "media": "image", "name": ["0_z.v2.JPG", "1_a.jpg"]}
    text = {"texts": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "media": "text"}
    video = {"texts": messages[1:], "media": "video", "name": ["0_a.mp4"]}
    source = write_tar(
        tmp_path / "a.tar",
        [("image_0.1_a.jpg", small(1)), ("image_0.0_z.v2.JPG", small(0)), ("image_0.json", named)]
        + [("text_1.json", text), ("video_2.0_a.mp4", b"video"), ("video_2.json", video)],
    )
    samples = make(source, max_bad_fraction=1)
    assert list(samples) == ["000000000", "000000001"]
    assert samples["000000000"]["0.jpg"] == small(0)
    assert samples["000000000"]["json"]["conversations"][0] == {"from": "system", "value": "Be brief."}
    assert make.report.faults == {"video_or_audio": 1}


def test_packed_records_say_what_others_say(tmp_path, make):
    packed = {
        "captions": ["A", "B"],
        "prompts": None,
        "prompt": ["Q", "R"],
        "system": "S",
        "system_prompt": "T",
        "n": 1,
    }
    besides = {"captions": None, "texts": None, "conversations": turns("Q", "A"), "note": None}
    refused = {"captions": ["A"], "prompts": ["Q"], "tools": ["t"], "video": "a.mp4"}
    both = {"captions": ["A"], "prompts": ["Q"], "conversations": turns("Lost", "Lost")}
    members = [("a.json", packed), ("b.json", besides), ("c.json", refused), ("d.json", both)]
    samples = make(write_tar(tmp_path / "a.tar", members), max_bad_fraction=1)
    said = {sample["json"]["id"]: sample["json"]["conversations"] for sample in samples.values()}
    system = {"from": "system", "value": "S\nT"}
    assert said == {
        "a/0": [system, *turns("Q", "A")], "a/1": [system, *turns("R", "B")], "b": turns("Q", "A"),
        "d/0": turns("Q", "A"),
    }  # fmt: skip
    assert make.report.faults == {"video_or_audio": 1}
    assert make.report.other_keys == {"n": 2, "conversations beside a packed form": 1}


@pytest.mark.parametrize(
    "packed, fault",
    [
        ({"images": ["a", "b"], "prompts": ["", ""], "captions": ["One."]}, "no_turns"),
        ({"images": ["a"], "prompts": 3, "captions": ["One."]}, "no_turns"),
        ({"images": ["a"], "captions": []}, "no_turns"),
        ({"images": ["a"], "captions": "text"}, "no_turns"),
        ({"images": [{"a": 1}], "captions": ["One."]}, "image_count"),
        ({"images": [["a", "b"]], "captions": ["One."]}, "image_count"),
        ({"images": ["a"], "prompts": [["Q", "R"]], "captions": [["One."]]}, "no_turns"),
        ({"images": ["a"], "captions": [None]}, "text_not_string"),
    ],
)
def test_packs_that_do_not_fit_together(tmp_path, make, packed, fault):
    good = ("k.json", {"texts": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]})
    source = write_tar(tmp_path / "a.tar", [good, ("p.img0.jpg", small(0)), ("p.json", packed)])
    assert len(make(source, max_bad_fraction=1)) == 1
    assert make.report.faults == {fault: 1}


def test_the_format_may_be_told(tmp_path, make):
    packed = {"images": ["a.jpg"], "prompts": ["Q"], "captions": ["A."]}
    source = write_tar(
        tmp_path / "a.tar", [("k.json", turns("Q")), ("p.img0.jpg", small(0)), ("p.json", packed)]
    )  # the first record is plain
    assert len(make(source, max_bad_fraction=1)) == 1
    assert make.report.faults == {"no_turns": 1}
    assert len(make(source, format_name="onevision15", output="told")) == 2
