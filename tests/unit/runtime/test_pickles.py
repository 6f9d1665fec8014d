"""Pickles of a checkpoint are read without running what they name."""

import pickle
import re
from collections import OrderedDict

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from laver_megatron.runtime.pickles import only_known_pickles, read_metadata
from tests.attacks import RunsCode

REFUSED = {
    "a function": RunsCode,
    "a class of the standard library": lambda made: __import__("decimal").Decimal(1),
    "a name in a name": lambda made: torch.nn.Linear(1, 1).weight,
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_metadata_name_nothing_but_their_own_classes(tmp_path, make):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(make(tmp_path / "made")))
    with pytest.raises(ValueError, match=rf"{tmp_path}/\.metadata is a pickle that names \w+[\w.]+, which no"):
        read_metadata(tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_way_to_write_a_global_is_seen(tmp_path, protocol):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(RunsCode(tmp_path / "made"), protocol))
    with pytest.raises(ValueError, match=r"names posix\.mkdir"):
        read_metadata(tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["../../outside.distcp", "/etc/hostname", "link", "folder/x", "a\0"])
def test_metadata_name_files_of_the_checkpoint_alone(tmp_path, name):
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (tmp_path / "x").touch()
    (directory / "link").symlink_to(tmp_path / "x")
    (directory / "folder").symlink_to(tmp_path)
    for place in ("inside.distcp", name):
        metadata = Metadata(state_dict_metadata={}, storage_data={MetadataIndex("a"): _StorageInfo(place, 0, 1)})
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))
        if place != name:
            assert read_metadata(directory).storage_data == metadata.storage_data
    shown = re.escape(name.replace("\0", "\\x00"))
    with pytest.raises(ValueError, match=rf"{directory}/\.metadata names {shown}, which lies outside the checkpoint"):
        read_metadata(directory)


def test_archives_of_torch_are_weights_only_however_they_are_opened(tmp_path):
    path = tmp_path / "common.pt"
    torch.save({"more": RunsCode(tmp_path / "made")}, path)
    with only_known_pickles(tmp_path):
        with pytest.raises(ValueError, match=rf"{path} is a pickle that names posix\.mkdir"):
            torch.load(path, weights_only=False)
        with path.open("rb") as file, pytest.raises(ValueError, match=rf"{tmp_path}: an object .* posix\.mkdir"):
            torch.load(file, weights_only=False)
        torch.save(OrderedDict(step=3, size=torch.Size([2]), values=torch.ones(2)), path)
        assert torch.load(path)["step"] == 3
    assert not (tmp_path / "made").exists()
