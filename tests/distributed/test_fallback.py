"""A damaged newest checkpoint: the ranks go back to the newest whole one together, and lose nothing but the steps."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest

from laver_megatron.checkpoint.directory import latest_checkpoint
from laver_megatron.trainer import agree_on_start
from tests.attacks import cut, flip, lead_outside, poison_metadata, renew_manifest
from tests.distributed.build import assert_same_bits, make_config, make_trainer
from tests.distributed.harness import Layout, join
from tests.distributed.test_checkpoint import metrics, run

LAYOUT = Layout(tp=2)
DAMAGES = {"cut": cut, "flipped": flip, "missing": Path.unlink}


def config_of(assets, run_dir, **changes):
    return make_config(assets, run_dir, LAYOUT, train_iters=4, ema_interval=1, **changes)


@pytest.fixture(scope="module")
def written(pool, assets, tmp_path_factory):
    """A run with checkpoints at iterations 1 and 2."""
    run_dir = tmp_path_factory.mktemp("written") / "run"
    pool.run(run, LAYOUT, config_of(assets, run_dir, save_interval=1, exit_interval=2))
    return run_dir


def starts(layout, config, run_dirs):
    """Job: what a run would start from in each directory, by name, and what it says of the others."""
    join(layout)
    found = {}
    for run_dir in run_dirs:
        start = agree_on_start(config.replace(run_dir=str(run_dir)))
        found[run_dir.name] = start.checkpoint.name, start.passed_over
    return found


def test_every_file_damaged_in_every_way(pool, assets, written, tmp_path):
    newest = latest_checkpoint(written / "checkpoints")
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    damaged = {}
    for file in files:
        for name, damage in DAMAGES.items():
            run_dir = tmp_path / f"{name}-{str(file).replace('/', '-')}"
            shutil.copytree(written, run_dir)
            damaged[run_dir] = run_dir / "checkpoints" / newest.name / file
            damage(damaged[run_dir])
    assert len(damaged) >= 30
    for found in pool.run(starts, LAYOUT, config_of(assets, tmp_path), list(damaged)):
        for run_dir, file in damaged.items():
            name, passed_over = found[run_dir.name]
            assert name == "iter_0000001", run_dir.name
            assert len(passed_over) == 1 and str(file.parent) in passed_over[0], passed_over


def omit_tensors(directory):
    """A changed file that the manifest does not list."""
    flip(directory / "__0_0.distcp")
    renew_manifest(directory)
    entries = json.loads((directory / "manifest.json").read_text())
    del entries["__0_0.distcp"]
    (directory / "manifest.json").write_text(json.dumps(entries))


FORGERIES = {
    "omitted": (omit_tensors, "manifest.json does not list __0_0.distcp"),
    "empty": (
        lambda directory: (directory / "manifest.json").write_text("{}"),
        "manifest.json does not list .metadata",
    ),
    "outside": (lambda directory: lead_outside(directory, "../../outside.distcp"), ".metadata names ../../outside"),
    "code": (lambda directory: poison_metadata(directory, directory / "made"), ".metadata is a pickle that names"),
}


def test_forgeries_count_as_damage(pool, assets, written, tmp_path):
    """What nobody checked and what leads elsewhere, though the checksums fit."""
    for name, (forge, _) in FORGERIES.items():
        shutil.copytree(written, tmp_path / name)
        forge(tmp_path / name / "checkpoints/iter_0000002")
    run_dirs = [tmp_path / name for name in FORGERIES]
    for found in pool.run(starts, LAYOUT, config_of(assets, tmp_path), run_dirs):
        for name, (_, expected) in FORGERIES.items():
            start, (problem,) = found[name]
            assert start == "iter_0000001" and expected in problem, problem


def refused(layout, config):
    """Job: what setup says with --strict-load."""
    with pytest.raises(ValueError) as raised:
        make_trainer(config)
    return str(raised.value)


def test_strict_load_refuses(pool, assets, written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    file = tmp_path / "run/checkpoints/iter_0000002/__1_0.distcp"
    flip(file)
    for message in pool.run(refused, LAYOUT, config_of(assets, tmp_path / "run", strict_load=True)):
        assert f"{file} is damaged" in message and "--strict-load goes on from the newest" in message


def run_and_listen(layout, config):
    """Job: `train`; this rank's state at the end and what it says."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        _, after = run(layout, config)
    return after, said.getvalue()


def test_the_run_goes_on_as_if_nothing_had_happened(pool, assets, written, tmp_path):
    """To the last bit, from the older checkpoint; the damaged one is written anew."""
    straight = pool.run(run, LAYOUT, config_of(assets, tmp_path / "straight"))
    shutil.copytree(written, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/iter_0000002"
    flip(newest / "__0_0.distcp")
    again = pool.run(run_and_listen, LAYOUT, config_of(assets, tmp_path / "run", save_interval=2))
    for rank in range(LAYOUT.world_size):
        assert_same_bits(again[rank][0], straight[rank][1])
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")
    said = again[0][1]
    assert f"WARNING: NOT THE NEWEST CHECKPOINT: {newest}/__0_0.distcp is damaged" in said
    assert f"going back to {newest.with_name('iter_0000001')}" in said
    pool.run(begins_at_2, LAYOUT, config_of(assets, tmp_path / "new", load=str(newest)))


def begins_at_2(layout, config):
    """Job: that a run starts at iteration 2."""
    assert make_trainer(config).progress.iteration == 2
