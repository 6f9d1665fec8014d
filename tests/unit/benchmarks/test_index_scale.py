"""The benchmark of opening many samples, on few."""

import pytest

from laver_megatron.data.index import mapped
from laver_megatron.data.index.index_file import check_index, read_index
from tools.benchmarks import index_scale


@pytest.mark.parametrize("is_mapped", [False, True])
def test_what_is_drawn_can_be_opened_and_measured(demo_dir, tmp_path, monkeypatch, is_mapped):
    monkeypatch.setattr(index_scale, "_DRAWN_TOGETHER", 1700)
    monkeypatch.setattr(index_scale, "_SAMPLES_A_SHARD", 600)
    monkeypatch.setattr(mapped, "SMALLEST", 1 if is_mapped else 1 << 40)
    folder = tmp_path / "drawn"
    index_scale.draw(folder, 4000, demo_dir)
    index = read_index(folder / "index.parquet")
    check_index(index)
    assert (len(index), len(index.shards), index.key(3999)) == (4000, 7, "000003999")
    assert not index.faults and index.image_sizes(0) in ([], [(640, 480)])
    result, reader = index_scale.measure(folder, demo_dir)
    assert reader.plan.num_samples > 3900 and not list(folder.glob("scratch"))
    assert min(result.values()) >= 0 and result["private_mib"] > 10 and result["resume_cpu_s"] > 0
    assert len(list(folder.glob("*.mapped"))) == 2 * is_mapped
    reader.close()
