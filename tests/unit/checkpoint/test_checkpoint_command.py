"""`laver checkpoint`: what it says of whole and of damaged ones, without running what lies in them."""

import json
import pickle

import pytest
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

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


def test_nothing_of_it_is_run(run_dir, tmp_path, capsys):
    path = run_dir / "checkpoints/iter_0000020"
    (path / ".metadata").write_bytes(pickle.dumps(RunsCode(tmp_path / "made")))
    renew_manifest(path)
    with pytest.raises(SystemExit) as ended:
        main([str(path), "--verify"])
    assert ended.value.code == 1 and "names posix.mkdir" in capsys.readouterr().out
    assert not (tmp_path / "made").exists()


def test_metadata_that_lead_outside(run_dir, capsys):
    path = run_dir / "checkpoints/iter_0000020"
    places = {MetadataIndex("a"): _StorageInfo("../../outside.distcp", 0, 1)}
    (path / ".metadata").write_bytes(pickle.dumps(Metadata(state_dict_metadata={}, storage_data=places)))
    renew_manifest(path)
    with pytest.raises(SystemExit) as ended:
        main([str(path), "--verify"])
    assert ended.value.code == 1
    assert f"DAMAGED: {path}/.metadata names ../../outside.distcp, which lies outside" in capsys.readouterr().out


@pytest.mark.parametrize("empty", [False, True])
def test_a_manifest_that_omits_what_was_changed(run_dir, capsys, empty):
    path = run_dir / "checkpoints/iter_0000020"
    flip(path / "__0_0.distcp")
    entries = json.loads((path / "manifest.json").read_text())
    del entries["__0_0.distcp"]
    (path / "manifest.json").write_text(json.dumps({} if empty else entries))
    with pytest.raises(SystemExit) as ended:
        main([str(path), "--verify"])
    missing = ".metadata" if empty else "__0_0.distcp"
    assert ended.value.code == 1
    assert f"DAMAGED: {path}/manifest.json does not list {missing}" in capsys.readouterr().out


NONSENSE = {
    "time-text": ({"written": "yesterday"}, "written at an unknown time by laver_megatron "),
    "time-huge": ({"written": 10**300}, "written at an unknown time by laver_megatron "),
    "versions-list": ({"versions": ["torch"]}, "by unknown versions, commit "),
    "versions-none": ({"versions": None}, "by unknown versions, commit "),
    "numbers": ({"consumed_tokens": "many", "consumed_samples": [1], "iteration": {}}, "{} of 40, many tokens, [1] sa"),
    "escapes": ({"commit": "a\x1b[2J\x7f\u009b\u202e\nb"}, "commit a\\x1b[2J\\x7f\\x9b\\u202e\\nb\n"),
    "surrogate": ({"commit": "\ud800"}, "commit \\ud800\n"),
}


@pytest.mark.parametrize("changes, expected", NONSENSE.values(), ids=NONSENSE)
def test_about_says_nonsense(run_dir, capsys, changes, expected):
    path = run_dir / "checkpoints/iter_0000020"
    told = json.loads((path / "about.json").read_text())
    (path / "about.json").write_text(json.dumps({**told, **changes}))
    renew_manifest(path)
    main([str(path)])
    assert expected in capsys.readouterr().out
    main([str(path), "--json"])
    assert json.loads(capsys.readouterr().out)[0]["about"] == {**told, **changes}


def test_about_without_a_commit(run_dir, capsys):
    path = run_dir / "checkpoints/iter_0000020"
    (path / "about.json").write_text('{"written": 0}')
    renew_manifest(path)
    main([str(path)])
    assert "written 1970-01-01 00:00:00 UTC by unknown versions, commit unknown" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["about.json", "run.json"])
@pytest.mark.parametrize("content", ['{"a": 1e999}', '{"a":' * 990 + "0" + "}" * 990, '{"a":' * 100_000])
def test_what_cannot_be_shown_is_left_out(run_dir, capsys, name, content):
    path = run_dir / "checkpoints/iter_0000020"
    (path / name).write_text(content)
    renew_manifest(path)
    main([str(path)])
    main([str(path), "--json"])
    shown, _, listed = capsys.readouterr().out.partition("[\n")
    assert "GB, whole\n" in shown and json.loads("[" + listed)[0][name.removesuffix(".json")] == {}


def test_control_characters_of_others_are_not_obeyed(run_dir, capsys):
    path = run_dir / "checkpoints/iter_0000020"
    (path / "run.json").write_text(json.dumps({"load": "hf:a\x1b]0;title\x07", "train_iters": "\x1b[31m"}))
    renew_manifest(path)
    (path.with_name("iter_0000010") / "manifest.json").write_text('{"\\u001b[2J": [1, "no"]}')
    with pytest.raises(SystemExit):
        main([str(run_dir)])
    shown = capsys.readouterr().out
    assert "hf:a\\x1b]0;title\\x07" in shown and "for \\x1b[2J" in shown and "\x1b" not in shown


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
