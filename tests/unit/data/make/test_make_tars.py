import io
import json
import tarfile
from functools import cache

import pytest

from tests.unit.data.make.form import encoded, jpeg, noise, turns


def write_tar(path, members):
    """members: [(name, bytes or anything that becomes JSON)]."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
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
    assert make.report.faults == {"scattered": 6}


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
