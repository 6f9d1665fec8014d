import io
import tarfile

import pytest
import webdataset
from PIL import Image

from laver_megatron.data.shards import find_shards, index_shards
from tests.unit.data.content import picture_bytes, question


def test_index_reads_what_webdataset_reads(demo_dir):
    paths = find_shards(demo_dir / "shards" / "train-*.tar")
    samples, left_out = index_shards(paths)
    theirs = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
    assert [sample.key for sample in samples] == [sample["__key__"] for sample in theirs]
    assert not left_out
    for sample, other in zip(samples, theirs, strict=True):
        for member in (sample.text, *sample.images):
            assert sample.read(member) == other[member.extension]
        assert len(sample.images) == len([name for name in other if name.endswith(("jpg", "png"))])


def test_pictures_come_in_the_order_of_their_numbers(write_shard):
    files = {f"{number}.png": picture_bytes((10 + number, 8), "png") for number in (10, 2, 0)}
    [sample], _ = index_shards(write_shard({"a": {"json": question(), **files}}))
    assert [member.extension for member in sample.images] == ["0.png", "2.png", "10.png"]
    assert sample.image_sizes() == [(10, 8), (12, 8), (20, 8)]


def test_sizes_are_those_of_the_upright_picture(write_shard):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture = picture_bytes((40, 30), "jpeg", exif=exif)
    [sample], _ = index_shards(write_shard({"a": {"json": question(), "jpg": picture}}))
    assert sample.image_sizes() == [(30, 40)]


def test_keys_stay_names(tmp_path):
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("../../etc/a.b.json", "/abs/c.json", "folder.d/e.json"):
            info = tarfile.TarInfo(name)
            info.size = len(question())
            tar.addfile(info, io.BytesIO(question()))
    samples, left_out = index_shards(path)
    assert [sample.key for sample in samples] == ["/abs/c", "folder.d/e"]
    assert left_out == {"no .json": 1}  # "a.b.json": the key ends at the first dot
    assert samples[0].read(samples[0].text) == question()


def test_pictures_without_text_are_counted(write_shard):
    shard = write_shard({"a": {"json": question(), "jpg": b"x"}, "b": {"jpg": b"x"}, "c": {"pickle": b"x"}})
    samples, left_out = index_shards(shard)
    assert [sample.key for sample in samples] == ["a"]
    assert left_out == {"no .json": 2}


def test_find_names_everything_that_is_wrong(tmp_path, write_shard):
    (tmp_path / "void.tar").touch()
    (tmp_path / "nothing").mkdir()
    wrong = [tmp_path / "gone.tar", tmp_path / "no-*.tar", tmp_path / "nothing", tmp_path / "void.tar"]
    with pytest.raises(ValueError) as caught:
        find_shards([write_shard({"a": {"json": question()}}), *wrong])
    assert all(str(path) in str(caught.value) for path in wrong)
    assert "train-00000" not in str(caught.value)
    with pytest.raises(ValueError, match="no shards were named"):
        find_shards([])


def test_find_takes_files_directories_and_globs_once(tmp_path, write_shard):
    first, second = (write_shard({"a": {"json": question()}}, name) for name in ("1.tar", "2.tar"))
    assert find_shards([second, tmp_path, str(tmp_path / "*.tar")]) == [second, first]


def test_tar_without_a_sample(write_shard):
    with pytest.raises(ValueError, match=r"train-00000.tar holds no complete sample"):
        index_shards(write_shard({"a": {"jpg": b"x"}}))


@pytest.mark.parametrize("keep, what", [(0.5, "cut off"), (512 + 100, "cut off|unexpected end")])
def test_truncated_tar(write_shard, keep, what):
    shard = write_shard({f"{i}": {"json": question(), "jpg": picture_bytes()} for i in range(8)})
    content = shard.read_bytes()
    shard.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(ValueError, match=what):
        index_shards(shard)


def test_tar_cut_between_members(write_shard):
    shard = write_shard({"a": {"json": question()}, "b": {"json": question()}})
    shard.write_bytes(shard.read_bytes()[: 2 * 512])  # the first header and its payload
    with pytest.raises(ValueError, match="without a tar's closing zeros"):
        index_shards(shard)


def test_garbage_in_the_middle_of_a_tar(write_shard):
    shard = write_shard({f"{i}": {"json": question()} for i in range(4)})
    content = bytearray(shard.read_bytes())
    content[2 * 512 : 3 * 512] = b"garbage!" * 64  # the second header
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="garbage instead of a tar header at byte 1024"):
        index_shards(shard)


def test_shard_that_shrinks_after_indexing(write_shard):
    shard = write_shard({"a": {"json": question()}})
    [sample], _ = index_shards(shard)
    shard.write_bytes(shard.read_bytes()[:520])
    with pytest.raises(ValueError, match="has changed"):
        sample.read(sample.text)
