"""What is too large to be read is so for the index and for make_shards alike."""

import pytest

from laver_megatron.data.index import build as indexing
from laver_megatron.data.index.build import index_tars
from laver_megatron.data.index.faults import Fault
from laver_megatron.shards import MakeSettings, make_shards, tars
from tests.content import picture_bytes, question


@pytest.mark.parametrize("room", [0, -1])
def test_texts_and_pictures_above_the_limits(write_shard, tmp_path, monkeypatch, room):
    text, picture = question("<image>" + "x" * 100), picture_bytes()
    for module in (indexing, tars):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", len(text) + room)
        monkeypatch.setattr(module, "MAX_PICTURE_BYTES", len(picture) + room)
    (tmp_path / "in").mkdir()
    shard = write_shard(
        {"text": {"json": text}, "picture": {"json": question(), "jpg": picture}, "good": {"json": question("?")}},
        "in/a.tar",
    )
    index = index_tars([shard])
    report = make_shards(MakeSettings((shard,), tmp_path / "out", max_bad_fraction=1))
    too_large = [Fault.invalid_json.code, Fault.image_too_large.code, 0]
    allowed = [Fault.image_count.code, 0, 0]
    assert index.fault_I.tolist() == (too_large if room else allowed)
    assert report.faults == index.faults
