import tarfile
from tarfile import RECORDSIZE

from laver_megatron.shards.assemble import Picture, Sample
from laver_megatron.shards.shard_writer import SliceWriter


def sample(number, num_bytes):
    return Sample(f"{number}", b"{}", (Picture("png", bytes(num_bytes), 1, 1),))


def test_shards_appear_when_they_are_whole_and_stay_below_their_size(tmp_path):
    with SliceWriter(tmp_path, "a", 2 * RECORDSIZE) as writer:
        writer.write(sample(0, 15 * 512))  # 18 blocks, and two that close the tar
        writer.write(sample(1, 18 * 512))
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["a-00.tar", "a-01.tar.partial"]
        writer.write(sample(2, 14 * 512))
        writer.write(sample(3, 40_000))
        writer.write(sample(4, 0))
    sizes = {path.name: path.stat().st_size for path in sorted(tmp_path.iterdir())}
    assert [size // RECORDSIZE for size in sizes.values()] == [1, 2, 5, 1]
    for path in tmp_path.iterdir():
        with tarfile.open(path) as tar:
            assert {(m.uid, m.gid, m.uname, m.gname, m.mtime, m.mode) for m in tar} == {(0, 0, "", "", 0, 0o644)}
            assert [member.name.partition(".")[2] for member in tar][:2] == ["json", "png"]
    assert [shard.num_bytes for index in writer.indexes for shard in index.shards] == list(sizes.values())


def test_nothing_appears_of_work_that_fails(tmp_path):
    try:
        with SliceWriter(tmp_path, "a", 10**6) as writer:
            writer.write(sample(0, 10))
            raise OSError
    except OSError:
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a-00.tar.partial"]
    with SliceWriter(tmp_path, "b", 10**6):
        pass
    assert not list(tmp_path.glob("b*"))
