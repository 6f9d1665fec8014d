import tarfile

from hypothesis import given
from hypothesis import strategies as st

from laver_megatron.shards.assemble import Sample
from laver_megatron.shards.pictures import Picture
from laver_megatron.shards.shard_writer import SliceWriter, tar_header


@given(st.text("0123456789abcdefgh-.", min_size=1, max_size=100), st.integers(0, 8**11 - 1))
def test_headers_are_those_of_tarfile(name, num_bytes):
    info = tarfile.TarInfo(name)
    info.size = num_bytes
    assert tar_header(name, num_bytes) == info.tobuf(tarfile.USTAR_FORMAT)


def sample(number, num_bytes):
    return Sample(f"{number}", b"{}", (Picture("png", bytes(num_bytes), 1, 1),))


def test_shards_appear_when_they_are_whole_and_stay_below_their_size(tmp_path):
    with SliceWriter(tmp_path, "a", 4 * 1024) as writer:
        writer.write(sample(0, 512))  # four blocks, and two that close the tar
        writer.write(sample(1, 1))
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["a-00.tar", "a-01.tar.partial"]
        writer.write(sample(2, 10_000))
        writer.write(sample(3, 0))
    sizes = {path.name: path.stat().st_size for path in sorted(tmp_path.iterdir())}
    assert sizes == {"a-00.tar": 3072, "a-01.tar": 3072, "a-02.tar": 10_240 + 512 * 5, "a-03.tar": 2560}
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
