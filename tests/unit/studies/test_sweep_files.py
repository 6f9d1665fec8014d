"""What a sweep leaves for its runs: scripts that do what is left, on this machine and on SLURM."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from laver_megatron.studies import sweep_files
from laver_megatron.studies.registry import read_registry

LAUNCHER = """\
#!/usr/bin/env bash
# Stands for the launcher: notes how it was called; fails where a file `fail` says so, else leaves a summary.
echo "$NPROC_PER_NODE $*" >> {place}/calls
name=$(basename "$2" .yaml)
[[ -e {place}/fail ]] && grep -qx "$name" {place}/fail && exit 1
mkdir -p {place}/sweep/runs/$name
echo ' "state": "finished",' > {place}/sweep/runs/$name/run_summary.json
"""


@pytest.fixture
def scripts(sweep, tmp_path, monkeypatch):
    (tmp_path / "launcher.sh").write_text(LAUNCHER.format(place=tmp_path))
    monkeypatch.setattr(sweep_files, "LAUNCHER", tmp_path / "launcher.sh")
    assert sweep("--iterations", "2", "--num-gpus", "1", "2", "--gpus-per-node", "2") == 0
    return sweep


def run_script(path, *arguments, **environ):
    command = ["bash", str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environ}, cwd="/")


def calls(place):
    path = place / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


@pytest.mark.processes
def test_the_loop_does_what_is_left(scripts, tmp_path):
    names = list(scripts.runs)
    (tmp_path / "fail").write_text(names[1])
    done = run_script(scripts.output / "run.sh")
    assert done.returncode == 1 and f"not finished: {names[1]}\n" in done.stderr
    expected = [f"{scripts.runs[name]['num_gpus']} --config {scripts.output}/configs/{name}.yaml" for name in names]
    assert calls(tmp_path) == expected
    (tmp_path / "fail").unlink()
    done = run_script(scripts.output / "run.sh")
    assert done.returncode == 0 and f"{names[0]} is finished" in done.stderr
    assert calls(tmp_path) == [expected[1]]


@pytest.mark.processes
def test_the_loop_runs_those_that_are_named(scripts, tmp_path):
    name = list(scripts.runs)[2]
    assert run_script(scripts.output / "run.sh", name).returncode == 0
    assert [call.split("/")[-1] for call in calls(tmp_path)] == [f"{name}.yaml"]


@pytest.mark.processes
def test_the_loop_refuses_names_that_it_does_not_know(scripts, tmp_path):
    first, second, *_ = scripts.runs
    for wrong in ("nosuch", f"{first} {second}", first[:-1], ".*"):
        done = run_script(scripts.output / "run.sh", first, wrong)
        assert done.returncode == 2 and f"no run {wrong} in manifest.csv" in done.stderr
        assert calls(tmp_path) == []
    done = run_script(scripts.output / "run.sh", first)
    assert done.returncode == 0 and f"finished: {first}" in done.stderr and "all runs" not in done.stderr


@pytest.mark.processes
def test_the_loop_without_its_manifest_is_not_finished(scripts, tmp_path):
    """As after the sweep was moved: its paths are those of where it was made."""
    scripts.output.rename(tmp_path / "moved")
    done = run_script(tmp_path / "moved" / "run.sh")
    assert done.returncode == 1 and "no manifest.csv in" in done.stderr and "are finished" not in done.stderr
    assert calls(tmp_path) == []


@pytest.mark.processes
def test_a_place_with_odd_characters(sweep, tmp_path, monkeypatch):
    """What is printed can be pasted, and what SLURM reads is one word."""
    (tmp_path / "launcher.sh").write_text(LAUNCHER.format(place=tmp_path))
    monkeypatch.setattr(sweep_files, "LAUNCHER", tmp_path / "launcher.sh")
    sweep.output = tmp_path / "my sweep's $(touch pwned);x"
    assert sweep("--iterations", "2") == 0
    here = sweep.out[sweep.out.index("bash ") :].split(" runs them here")[0]
    assert shlex.split(here) == ["bash", str(sweep.output / "run.sh")]
    assert "#SBATCH --job-name=my-sweep-s-touch-pwned-x\n" in (sweep.output / "array.sh").read_text()
    done = subprocess.run(here, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert len(calls(tmp_path)) == 4 and not (tmp_path / "pwned").exists(), done.stderr


@pytest.mark.processes
def test_arrays_on_slurm(scripts, tmp_path):
    """sbatch is played by running what it was given once for each number of --array."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text('#!/usr/bin/env bash\n[[ $1 == --ntasks-per-node=1 ]] && shift && exec "$@"\n')
    (tools / "sbatch").write_text(
        "#!/usr/bin/env bash\n"
        f'echo "$*" >> {tmp_path}/submitted\n'
        'for word in "$@"; do case $word in --array=*) ids=${word#--array=};; esac; done\n'
        'for id in ${ids//,/ }; do SLURM_ARRAY_TASK_ID=$id bash "${@: -1}" || exit 1; done\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    submit = scripts.output / "submit.sh"
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    assert run_script(submit, "--time=1", PATH=path).returncode == 0
    started = {call.split("/")[-1].removesuffix(".yaml"): call.split()[0] for call in calls(tmp_path)}
    assert started == {name: line["num_gpus"] for name, line in scripts.runs.items()}
    assert all("--nodes=1" in line and "--time=1" in line for line in (tmp_path / "submitted").read_text().splitlines())
    assert run_script(submit, PATH=path).returncode == 0
    assert calls(tmp_path) == []  # all are finished


@pytest.mark.slow(reason="real runs; counts and hashes are held against plans piece by piece")
def test_runs_cost_what_was_planned(sweep):
    """Real runs on one process, one of which goes on from where it was stopped: what they count is the manifest to the
    last token, FLOP and digit of the hash."""
    sweep.models.pop()
    assert sweep("--iterations", "2") == 0
    stopped = sweep.output / "configs" / f"{next(iter(sweep.runs))}.yaml"
    launcher = Path(__file__).parents[3] / "examples" / "pretrain_laver.sh"
    done = run_script(launcher, "--config", str(stopped), "--exit-interval", "1", NPROC_PER_NODE="1")
    assert done.returncode == 0, done.stderr
    with pytest.raises(ValueError, match="unfinished: is at iteration 1 of 2"):
        read_registry([sweep.output / "runs"])
    done = run_script(sweep.output / "run.sh")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr and "at iteration 1" in done.stderr
    registry = read_registry([sweep.output / "runs"])
    assert len(registry.runs) == 2
    for run in registry.runs:
        line = sweep.runs[run.path.name]
        counted = {
            "N": sum(run.value(f"parameters.{part}") for part in ("decoder", "embedding", "lm_head")),
            "tokens": run.value("tokens.total"), "visual_tokens": run.value("tokens.visual"),
            "flops": run.value("flops.model"), "laver_overhead": run.value("flops.laver_overhead"),
            "train_iters": run.value("iteration"), "seed": run.value("seed"),
        }  # fmt: skip
        assert {key: int(line[key]) for key in counted} == counted
        assert line["config_hash"] == run.value("config_hash")
        assert run.value("validation.last.lm_loss") > 0
    assert json.loads((registry.runs[0].path / "run_summary.json").read_text())["state"] == "finished"
