"""Checkpoints of others: nothing in them is run, and what they hold is compared before it is loaded."""

import pickle
import shutil

import pytest

from laver_megatron import train
from laver_megatron.checkpoint import state as checkpoint
from laver_megatron.checkpoint.directory import latest_checkpoint
from tests.attacks import lead_outside, poison_common, poison_metadata, renew_manifest
from tests.distributed.build import VOCABULARY, assert_same_bits, make_config, make_trainer, snapshot
from tests.distributed.harness import Layout

LAYOUT = Layout(tp=2)


def write(layout, config):
    """Job: a checkpoint of a run that has not begun."""
    train.save(make_trainer(config))


@pytest.fixture(scope="module")
def written(pool, assets, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("written")
    pool.run(write, LAYOUT, make_config(assets, run_dir, LAYOUT))
    return latest_checkpoint(run_dir / "checkpoints")


def refusals(layout, config, directory):
    """Job: what going on from a checkpoint says, and starting from its weights; nothing changes by it."""
    trainer, messages = make_trainer(config), []
    before = snapshot(trainer)
    for load in (
        lambda: checkpoint.load_checkpoint(directory, trainer.state),
        lambda: checkpoint.start_from_weights(directory, trainer.state, take_teacher=True),
    ):
        with pytest.raises(ValueError) as raised:
            load()
        messages.append(str(raised.value))
    assert_same_bits(snapshot(trainer), before)
    return messages


@pytest.mark.parametrize("poison", [poison_metadata, poison_common])
def test_a_checkpoint_runs_no_code(pool, assets, written, tmp_path, poison):
    """Though its manifest fits: whoever makes a checkpoint makes its manifest."""
    directory = tmp_path / "theirs"
    shutil.copytree(written, directory)
    poisoned = poison(directory, tmp_path / "made")
    config = make_config(assets, tmp_path / "run", LAYOUT)
    for messages in pool.run(refusals, LAYOUT, config, directory):
        for message in messages:
            assert f"{poisoned}" in message and "posix.mkdir" in message, message
    assert not (tmp_path / "made").exists()


def test_tensors_come_from_the_checkpoint_alone(pool, assets, written, tmp_path):
    """Though a file like theirs lies elsewhere."""
    directory = tmp_path / "theirs"
    shutil.copytree(written, directory)
    shutil.copy(directory / "__0_0.distcp", tmp_path / "outside.distcp")
    path = lead_outside(directory, "../outside.distcp")
    config = make_config(assets, tmp_path / "run", LAYOUT)
    for messages in pool.run(refusals, LAYOUT, config, directory):
        for message in messages:
            assert f"{path} names ../outside.distcp, which lies outside the checkpoint" in message, message


def test_sizes_are_compared_before_anything_is_loaded(pool, assets, written, tmp_path):
    """Megatron-Core would load an embedding of 127 rows into one of 128."""
    directory = tmp_path / "other"
    shutil.copytree(written, directory)
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    embedding = metadata.state_dict_metadata["embedding.word_embeddings.weight"]
    rows, columns = embedding.size
    assert rows == VOCABULARY
    embedding.size = type(embedding.size)((rows - 1, columns))
    path.write_bytes(pickle.dumps(metadata))
    renew_manifest(directory)
    config = make_config(assets, tmp_path / "run", LAYOUT)
    for messages in pool.run(refusals, LAYOUT, config, directory):
        for message in messages:
            assert f"1 tensors of another size or kind than this run needs: embedding.word_embeddings.weight is [{rows - 1}, {columns}], here [{rows}, {columns}]" in message  # fmt: skip  # noqa: E501
