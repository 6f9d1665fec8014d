"""The benchmark of teacher and checkpoint."""

import pytest
import torch

from tools.benchmarks import state


def test_works_take_turns_and_the_first_round_does_not_count():
    calls = []
    seconds = state.seconds_in_turns([lambda: calls.append("a"), lambda: calls.append("b")], 2, torch.device("cpu"))
    assert calls == ["a", "b"] * 3 and [len(values) for values in seconds] == [2, 2]


def test_as_many_bytes_are_written_as_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "_BLOCK", 10)
    state.write_bytes(tmp_path / "bytes", 25)
    assert state.folder_bytes(tmp_path) == 25
    state.read_files(tmp_path)


@pytest.mark.slow(reason="saves and resumes a tiny model")
@pytest.mark.processes
def test_a_quick_run_reports_update_save_and_resume(tmp_path, capfd):
    state.main(["--quick", "--dir", str(tmp_path)])
    text = capfd.readouterr().out
    assert all(f"\n| {name}, " in text for name in ("teacher's update", "save", "resume"))
    assert not list(tmp_path.iterdir())
