"""The lines at the end of a chain, and what they say of weights that should not have moved."""

import json
from types import SimpleNamespace

import pytest

from laver_megatron.stages import report
from laver_megatron.stages.weight_changes import ModuleChange

CHANGES = {
    "encoder": ModuleChange(64, 0, 0),
    "decoder": ModuleChange(30, 28, 0),
    "connector": ModuleChange(4, 0, 4),
    "heads": ModuleChange(7, 3, 2),
}


def stage(tmp_path, freeze):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"iteration": i, "lm_loss": 8.0 / i}) + "\n" for i in (1, 2, 4))
    )
    config = SimpleNamespace(
        start=SimpleNamespace(load="there", encoder=None),
        model=SimpleNamespace(freeze=freeze),
        run=SimpleNamespace(run_dir=str(tmp_path)),
    )
    return SimpleNamespace(name="stage", config=config, checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("freeze", "status", "expected"),
    [
        (
            ("encoder",),
            0,
            "frozen and the same to the last bit: encoder (64 tensors); changed: connector (new), decoder (28 of 30 "
            "tensors), heads (5 of 7 tensors)",
        ),
        (
            ("encoder", "decoder"),
            1,
            "FROZEN, BUT CHANGED: decoder; frozen and the same to the last bit: encoder (64 tensors); changed: "
            "connector (new), decoder (28 of 30 tensors), heads (5 of 7 tensors)",
        ),
    ],
)
def test_lines(tmp_path, capsys, monkeypatch, freeze, status, expected):
    monkeypatch.setattr(report, "changes_of_modules", lambda *_: CHANGES)
    assert report.report_stages([stage(tmp_path, freeze)], compare_weights=True) == status
    assert capsys.readouterr().out == f"stage  LM loss 8.000 -> 2.000; {expected}\n"


def test_without_comparing(tmp_path, capsys):
    assert report.report_stages([stage(tmp_path, ("encoder", "decoder"))], compare_weights=False) == 0
    assert capsys.readouterr().out == "stage  LM loss 8.000 -> 2.000; frozen: encoder, decoder\n"


def test_other_nodes_say_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NODE_RANK", "1")
    assert report.report_stages([stage(tmp_path, ())], compare_weights=False) == 0
    assert capsys.readouterr().out == ""
