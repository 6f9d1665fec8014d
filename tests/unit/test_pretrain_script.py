"""examples/pretrain_laver.sh under bash, with a torchrun that writes down how it was called, and under Python."""

import os
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from laver_megatron import launch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "pretrain_laver.sh"
DEMO = ROOT / "examples" / "demo.yaml"
OF_THE_LAUNCHER = ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def bash(tmp_path):
    """Runs the script under bash and returns what torchrun was given."""
    record = 'for a; do echo "$a"; done > "$RECORD"; echo "$OMP_NUM_THREADS" > "$RECORD.omp"'
    write_program(tmp_path / "bin" / "torchrun", record)
    write_program(
        tmp_path / "bin" / "scontrol", 'test "$*" = "show hostnames node[07-09]" && printf "node07\\nnode08\\n"'
    )

    def run(*arguments: str, **environ: str) -> list[str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in OF_THE_LAUNCHER and not name.startswith("SLURM_")
        }
        path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{inherited['PATH']}"
        # Without GPUs, so that counts are the same everywhere.
        fixed = {"PATH": path, "RECORD": str(tmp_path / "record"), "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(
            ["bash", str(SCRIPT), *arguments], env={**inherited, **fixed, **environ}, cwd=tmp_path, check=True
        )
        return (tmp_path / "record").read_text().splitlines()

    return run


def test_one_machine(bash):
    arguments = bash("--config", str(DEMO), "--run-dir", "a b", NPROC_PER_NODE="8")
    assert arguments == [
        "--standalone", "--nproc-per-node", "8", str(SCRIPT), "--config", str(DEMO), "--run-dir", "a b"
    ]  # fmt: skip


def test_processes_without_gpus_are_the_layouts(bash):
    assert bash("--config", str(DEMO))[:3] == ["--standalone", "--nproc-per-node", "4"]
    flags = ("--tensor-model-parallel-size", "1", "--no-sequence-parallel")
    assert bash("--config", str(DEMO), *flags)[2] == "2"
    assert bash()[2] == "4"


def test_several_nodes_by_hand(bash):
    arguments = bash(
        "--config", str(DEMO), NNODES="2", NODE_RANK="1", MASTER_ADDR="host0", MASTER_PORT="1234", NPROC_PER_NODE="8"
    )
    assert arguments[:-3] == [
        "--nnodes", "2", "--node-rank", "1", "--master-addr", "host0", "--master-port", "1234", "--nproc-per-node", "8"
    ]  # fmt: skip


def test_slurm(bash):
    slurm = {"SLURM_NNODES": "3", "SLURM_NODEID": "2", "SLURM_JOB_NODELIST": "node[07-09]"}
    arguments = bash("--config", str(DEMO), NPROC_PER_NODE="8", **slurm)
    assert arguments[:-3] == [
        "--nnodes", "3", "--node-rank", "2", "--master-addr", "node07", "--master-port", "29500",
        "--nproc-per-node", "8",
    ]  # fmt: skip


def test_own_settings_beat_slurms(bash):
    slurm = {"SLURM_NNODES": "3", "SLURM_NODEID": "2", "SLURM_JOB_NODELIST": "node[07-09]"}
    arguments = bash("--config", str(DEMO), NPROC_PER_NODE="1", NNODES="2", NODE_RANK="0", MASTER_ADDR="me", **slurm)
    assert arguments[:6] == ["--nnodes", "2", "--node-rank", "0", "--master-addr", "me"]


def test_one_slurm_node_needs_no_address(bash):
    assert bash("--config", str(DEMO), NPROC_PER_NODE="1", SLURM_NNODES="1", SLURM_NODEID="0")[0] == "--standalone"


def test_threads_are_one_unless_said_otherwise(bash, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for given, expected in (({}, "1"), ({"OMP_NUM_THREADS": "3"}, "3")):
        bash("--config", str(DEMO), NPROC_PER_NODE="1", **given)
        assert (tmp_path / "record.omp").read_text().strip() == expected


def test_mistakes_end_before_torchrun(bash, tmp_path, capfd):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        bash("--config", str(DEMO), "--mask-ratoi", "0.3")
    assert caught.value.returncode == 2
    assert "unknown flag --mask-ratoi; did you mean --mask-ratio?" in capfd.readouterr().err
    assert not (tmp_path / "record").exists()


def test_fresh_clone_uses_its_own_environment(tmp_path):
    """Without torchrun on PATH, the .venv beside the script is used, from any current directory."""
    clone = tmp_path / "clone"
    (clone / "examples").mkdir(parents=True)
    shutil.copy(SCRIPT, clone / "examples")
    write_program(clone / ".venv" / "bin" / "torchrun", 'echo "$@"')
    write_program(clone / ".venv" / "bin" / "python3", "echo 6")
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    result = subprocess.run(
        [str(tools / "bash"), "clone/examples/pretrain_laver.sh", "--lr", "1"],
        env={"PATH": str(tools)}, cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert result.stdout.split() == [
        "--standalone", "--nproc-per-node", "6", "clone/examples/pretrain_laver.sh", "--lr", "1"
    ]  # fmt: skip


@pytest.mark.parametrize("interpreter", ["bash", sys.executable])
def test_print_config_under_bash_and_python(interpreter, tmp_path):
    """Both run the same main, without the package on the path, from any current directory."""
    environ = {name: value for name, value in os.environ.items() if name not in (*OF_THE_LAUNCHER, "PYTHONPATH")}
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    result = subprocess.run(
        [interpreter, str(SCRIPT), "--config", str(DEMO), "--print-config", "--lr", "0.5"],
        env=environ, cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "lr: 0.5\n" in result.stdout
    assert "tensor_model_parallel_size: 2\n" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_spawned_processes_import_it_without_starting_anything(monkeypatch):
    monkeypatch.setattr(launch, "main", lambda: pytest.fail("a spawned process started training"))
    assert "Path" in runpy.run_path(str(SCRIPT), run_name="__mp_main__")


# --- the Python side -----------------------------------------------------------------------------------


@pytest.fixture
def trainer(monkeypatch):
    """A trainer that keeps the arguments its configuration was read from, and a demo that is made without work;
    validation is elsewhere."""
    calls = types.SimpleNamespace(arguments=None, made=[])
    module = types.ModuleType("laver_megatron.train")
    arguments_of: dict[int, list[str]] = {}  # by the configuration they were read into
    read = launch.from_command_line

    def from_command_line(arguments):
        invocation = read(arguments)
        arguments_of[id(invocation.config)] = arguments
        return invocation

    monkeypatch.setattr(launch, "from_command_line", from_command_line)
    module.run = lambda config: setattr(calls, "arguments", arguments_of[id(config)])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "laver_megatron.train", module)
    monkeypatch.setattr("laver_megatron.train", module, raising=False)
    monkeypatch.setattr(launch, "make_or_await_demo", calls.made.append)
    monkeypatch.setattr(launch, "check_run", lambda invocation: invocation.config)
    for name in OF_THE_LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    return calls


def test_given_configuration_is_passed_on_as_it_is(trainer, capsys):
    launch.main(["--config", str(DEMO), "--lr", "1"])
    assert trainer.arguments == ["--config", str(DEMO), "--lr", "1"]
    assert trainer.made == []
    assert capsys.readouterr().err == ""


def test_no_configuration_runs_the_demo_and_says_so(trainer, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    launch.main(["--train-iters", "3"])
    assert trainer.arguments == ["--config", str(DEMO), "--train-iters", "3"]
    assert trainer.made == [Path("runs/demo")]
    assert f"no --config: running the demo, {DEMO}" in capsys.readouterr().err


def test_demo_on_one_process(trainer, capsys):
    launch.main([])
    config = launch.read_command_line(trainer.arguments).config
    assert (config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size) == (1, 1)
    assert not config.parallel.sequence_parallel
    assert "1 process(es) do not make the demo's TP 2 x PP 2: using TP 1 x PP 1" in capsys.readouterr().err


def test_demo_keeps_a_layout_that_is_given(trainer, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch.main(["--tensor-model-parallel-size", "1"])
    assert trainer.arguments == ["--config", str(DEMO), "--tensor-model-parallel-size", "1"]


def test_asking_makes_no_demo(trainer, capsys):
    with pytest.raises(SystemExit):
        launch.main(["--print-config"])
    launch.main(["--dry-run"])
    assert trainer.made == []


def test_first_process_makes_the_demo_and_the_others_wait(tmp_path, monkeypatch):
    made = []

    def make_demo(directory: Path) -> None:
        made.append(directory)
        for part in launch.DEMO_PARTS:
            (directory / part).mkdir(parents=True)

    monkeypatch.setattr("laver_megatron.demo.make_demo", make_demo)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(launch, "DEMO_TIMEOUT_SECONDS", 0)
    with pytest.raises(SystemExit, match="were not made in 0 seconds"):
        launch.make_or_await_demo(tmp_path / "demo")
    monkeypatch.setenv("LOCAL_RANK", "0")
    launch.make_or_await_demo(tmp_path / "demo")
    monkeypatch.setenv("LOCAL_RANK", "1")
    launch.make_or_await_demo(tmp_path / "demo")
    assert made == [tmp_path / "demo"]


def test_number_of_processes(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    layout = ["--config", str(DEMO), "--tensor-model-parallel-size", "4"]
    assert launch.num_processes(layout, {}) == 8
    assert launch.num_processes(layout, {"NNODES": "2"}) == 4
    assert launch.num_processes([], {}) == 4
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert launch.num_processes([], {}) == 8
