"""`laver checkpoint`: what it says of whole and of damaged ones, without running what lies in them."""

import json
import pickle

import pytest

from laver_megatron.checkpoint.about import about, commit
from laver_megatron.checkpoint.progress import Progress
from laver_megatron.checkpoint_command import main
from tests.attacks import RunsCode, cut, flip, renew_manifest, write_checkpoint

RUN = {"train_iters": 40, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4, "load": "hf:models/a"}


@pytest.fixture
def run_dir(tmp_path):
    for iteration in (10, 20):
        path = write_checkpoint(tmp_path / "checkpoints", iteration)
        (path / "run.json").write_text(json.dumps(RUN))
        progress = vars(Progress(iteration=iteration, consumed_tokens=123_456, consumed_samples=77))
        (path / "about.json").write_text(json.dumps(about(progress)))
        renew_manifest(path)
    return tmp_path


def test_what_whole_ones_hold(run_dir, capsys):
    main([str(run_dir)])
    shown = capsys.readouterr().out
    assert shown.index("iter_0000010") < shown.index("iter_0000020") and shown.count("GB, whole\n") == 2
    for words in ("iteration 20 of 40, 123,456 tokens, 77 samples", "TP 2, PP 4, 1 processes", "--load hf:models/a"):
        assert words in shown
    assert f"commit {commit() or 'unknown'}" in shown and "by laver_megatron " in shown and "torch " in shown


@pytest.mark.parametrize("damage, name", [(cut, "__0_0.distcp"), (flip, "hf/tokenizer.json")])
def test_a_damaged_one_is_named(run_dir, capsys, damage, name):
    file = run_dir / "checkpoints/iter_0000010" / name
    damage(file)
    with pytest.raises(SystemExit) as ended:
        main([str(run_dir), "--json"])
    first, second = json.loads(capsys.readouterr().out)
    assert ended.value.code == 1
    assert str(file) in first["problem"] and second["problem"] == "" and first["run"] == RUN
    assert second["about"]["consumed_tokens"] == 123_456 and second["iteration"] == 20


def test_verify_reads_everything(run_dir, capsys):
    path = run_dir / "checkpoints/iter_0000020"
    flip(path / "__0_0.distcp")
    main([str(path)])
    assert "GB, whole\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([str(path), "--verify"])
    assert ended.value.code == 1
    assert f"DAMAGED: {path}/__0_0.distcp is damaged" in capsys.readouterr().out
    main([str(path.with_name("iter_0000010")), "--verify"])
    assert "GB, whole, verified\n" in capsys.readouterr().out


def test_nothing_of_it_is_run(run_dir, tmp_path):
    path = run_dir / "checkpoints/iter_0000020"
    (path / ".metadata").write_bytes(pickle.dumps(RunsCode(tmp_path / "made")))
    renew_manifest(path)
    main([str(path), "--verify"])
    assert not (tmp_path / "made").exists()


def test_older_and_converted_ones(run_dir, capsys):
    path = run_dir / "checkpoints/iter_0000010"
    (path / "about.json").unlink()
    (path / "run.json").write_text('{"weights_only": true}')
    renew_manifest(path)
    main([str(path)])
    assert "weights alone, converted" in capsys.readouterr().out


def test_there_are_none(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 2 and "holds no checkpoints" in capsys.readouterr().err
