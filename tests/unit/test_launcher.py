"""The launcher: examples/pretrain_laver.sh under bash and under Python, and what it starts."""

import os
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from laver_megatron import launcher
from laver_megatron.config.command_line import Invocation
from laver_megatron.config.fields import Config, ConfigError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "pretrain_laver.sh"
DEMO = ROOT / "examples" / "demo.yaml"
OF_THE_LAUNCHER = (
    "NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK",
    "LAVER_LAUNCHED", "LAVER_STARTED",
)  # fmt: skip


@pytest.fixture
def started(monkeypatch):
    """A launcher that starts nothing: what it gives torchrun or the trainer, and the demos that it makes. The
    configuration is checked elsewhere; there are no GPUs, so that counts are the same everywhere."""
    calls = types.SimpleNamespace(torchrun=None, trained=None, made=[], checked=[])
    for name in list(os.environ):
        if name in OF_THE_LAUNCHER or name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(
        launcher,
        "_run_ranks",
        lambda words, per_node, num_nodes, config: setattr(calls, "torchrun", [*launcher.meeting(num_nodes), *words]),
    )
    monkeypatch.setattr(launcher, "_train", lambda config: setattr(calls, "trained", config))
    monkeypatch.setattr(launcher, "make_or_await_demo", calls.made.append)
    monkeypatch.setattr(launcher, "check", lambda invocation, on_cuda: calls.checked.append(invocation))
    monkeypatch.setattr(launcher, "check_run", lambda invocation: invocation.config)
    return calls


def launched(started, *arguments: str) -> list[str]:
    """What torchrun is given before the script and its arguments."""
    launcher.main(["--config", str(DEMO), *arguments])
    words = list(started.torchrun)
    script = words.index(str(SCRIPT))
    assert words[script + 1 :] == ["--config", str(DEMO), *arguments]
    return words[:script]


# --- what is started -------------------------------------------------------------------------------------


def test_one_machine(started, monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "8")
    assert launched(started, "--run-dir", "a b") == ["--standalone", "--nproc-per-node", "8"]
    (invocation,) = started.checked
    assert invocation.world_size() == 8 and not invocation.dry_run


def test_processes_without_gpus_are_the_layouts(started, monkeypatch):
    assert launched(started) == ["--standalone", "--nproc-per-node", "4"]
    assert launched(started, "--tensor-model-parallel-size", "1", "--no-sequence-parallel")[-1] == "2"
    assert launched(started, "--tensor-model-parallel-size", "4")[-1] == "8"
    monkeypatch.setenv("NNODES", "2")
    assert launched(started, "--tensor-model-parallel-size", "4")[-1] == "4"


def test_a_process_for_each_gpu(started, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert launched(started)[-1] == "8"


def test_several_nodes_by_hand(started, monkeypatch):
    for name, value in {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0", "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NPROC_PER_NODE", "8")
    assert launched(started) == [
        "--nnodes", "2", "--node-rank", "1", "--master-addr", "host0", "--master-port", "1234", "--nproc-per-node", "8"
    ]  # fmt: skip
    (invocation,) = started.checked
    assert invocation.world_size() == 16


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\ntest "$*" = "show hostnames node[07-09]" && printf "node07\\nnode08\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return {"SLURM_NNODES": "3", "SLURM_NODEID": "2", "SLURM_JOB_NODELIST": "node[07-09]"}


@pytest.mark.processes
def test_slurm(slurm):
    assert launcher.count_processes([], {**slurm, "NPROC_PER_NODE": "8"}) == (8, 3)
    assert launcher.meeting(3, slurm) == (
        "--nnodes", "3", "--node-rank", "2", "--master-addr", "node07", "--master-port", "29500"
    )  # fmt: skip


def test_every_start_has_a_port_of_its_own():
    by_hand = {"MASTER_ADDR": "host0", "MASTER_PORT": "1234", "NODE_RANK": "1"}
    first, third = (launcher.meeting(2, by_hand, attempt=attempt) for attempt in (0, 2))
    assert first[-2:] == ("--master-port", "1234")
    assert third == (*first[:-1], "1236", "--rdzv-conf", "timeout=300")
    assert launcher.meeting(1, {}, attempt=2) == ("--standalone",)


@pytest.mark.parametrize(
    "nodes, per_node, settings, problem",
    [
        (2, 1, {"restarts": 1}, None),
        (2, 1, {}, "restarts is 0"),
        (1, 2, {"restarts": 1}, "there is one node"),
        (2, 1, {"restarts": 1, "tensor_model_parallel_size": 2}, "with 1: 1 processes cannot be divided into TP 2"),
        (4, 1, {"restarts": 1, "global_batch_size": 4}, None),  # two of four
        (2, 3, {"restarts": 1, "global_batch_size": 4}, "with 1: global_batch_size 4 is not a multiple of"),
    ],
)
def test_elastic_is_refused_where_no_fewer_nodes_fit(nodes, per_node, settings, problem):
    needed = {"data_path": ("none",), "seq_length": 8, "visual_seq_length": 8, "train_iters": 9, "run_dir": "run"}
    config = Config.of(**{**needed, "elastic": True, "global_batch_size": 8, "micro_batch_size": 1, **settings})
    if problem is None:
        launcher.check_elastic(config, per_node, nodes)
        return
    with pytest.raises(ConfigError, match=problem):
        launcher.check_elastic(config, per_node, nodes)


def test_own_settings_beat_slurms(slurm):
    own = {**slurm, "NPROC_PER_NODE": "1", "NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "me"}
    assert launcher.count_processes([], own) == (1, 2)
    assert launcher.meeting(2, own)[:6] == ("--nnodes", "2", "--node-rank", "0", "--master-addr", "me")


def test_one_slurm_node_needs_no_address():
    assert launcher.meeting(1, {"SLURM_NNODES": "1", "SLURM_NODEID": "0"}) == ("--standalone",)


def test_threads_are_one_unless_said_otherwise(started, monkeypatch):
    for given, expected in ((None, "1"), ("3", "3")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        launched(started)
        assert os.environ["OMP_NUM_THREADS"] == expected


def test_one_process_in_all_needs_no_torchrun(started, monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    launcher.main(["--config", str(DEMO), "--lr", "1"])
    assert started.torchrun is None and started.trained.training.lr == 1


def test_one_process_that_is_to_be_started_again_gets_torchrun(started, monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    assert launched(started, "--restarts", "3")[-1] == "1"
    assert started.trained is None


def test_under_torchrun_it_is_one_rank(started, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    launcher.main(["--config", str(DEMO), "--lr", "1"])
    assert started.torchrun is None and started.trained.training.lr == 1


# --- the script ------------------------------------------------------------------------------------------


@pytest.fixture
def run_script(tmp_path):
    """Runs the script, under bash or Python, from another directory and without the package on the path."""

    def run(interpreter: str, *arguments: str) -> subprocess.CompletedProcess:
        environ = {name: value for name, value in os.environ.items() if name not in (*OF_THE_LAUNCHER, "PYTHONPATH")}
        environ |= {"PATH": f"{Path(sys.executable).parent}:{environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
        command = [interpreter, str(SCRIPT), *arguments]
        return subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True)

    return run


@pytest.mark.processes
@pytest.mark.parametrize("interpreter", ["bash", sys.executable])
def test_print_config_under_bash_and_python(interpreter, run_script, tmp_path):
    done = run_script(interpreter, "--config", str(DEMO), "--print-config", "--lr", "0.5")
    assert done.returncode == 0, done.stderr
    assert "lr: 0.5\n" in done.stdout and "tensor_model_parallel_size: 2\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_mistakes_end_in_our_lines_and_not_in_torchruns(run_script, tmp_path):
    """What the flags say, and what they say of files: neither starts a process."""
    done = run_script("bash", "--config", str(DEMO), "--mask-ratoi", "0.3")
    assert done.returncode == 2
    assert "unknown flag --mask-ratoi; did you mean --mask-ratio?" in done.stderr
    done = run_script("bash", "--config", str(DEMO), "--load", "hf:nowhere", "--data-path", "no-shards")
    assert done.returncode == 2
    assert "load nowhere: no such directory" in done.stderr and "no-shards does not exist" in done.stderr
    assert "Traceback" not in done.stderr and "torch" not in done.stderr and "rank" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_fresh_clone_uses_its_own_environment(tmp_path):
    """Without torchrun on PATH, the .venv beside the script is used, from any current directory."""
    clone = tmp_path / "clone"
    (clone / "examples").mkdir(parents=True)
    shutil.copy(SCRIPT, clone / "examples")
    python = clone / ".venv" / "bin" / "python3"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    result = subprocess.run(
        [str(tools / "bash"), "clone/examples/pretrain_laver.sh", "--lr", "1"],
        env={"PATH": str(tools)}, cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert result.stdout.split() == ["clone/examples/pretrain_laver.sh", "--lr", "1"]


def test_spawned_processes_import_it_without_starting_anything(monkeypatch):
    monkeypatch.setattr(launcher, "main", lambda: pytest.fail("a spawned process started training"))
    assert "ROOT" in runpy.run_path(str(SCRIPT), run_name="__mp_main__")


# --- the demo --------------------------------------------------------------------------------------------


def test_a_given_configuration_makes_no_demo_and_says_nothing(started, capsys):
    launched(started, "--lr", "1")
    assert started.made == [] and capsys.readouterr().err == ""


def test_no_configuration_runs_the_demo_and_says_so(started, monkeypatch, capsys):
    launcher.main(["--train-iters", "3"])
    assert started.torchrun[-4:] == ["--config", str(DEMO), "--train-iters", "3"]
    assert started.made == [Path("runs/demo")]
    assert f"no --config: running the demo, {DEMO}" in capsys.readouterr().err


def test_the_demo_under_torchrun(started, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    launcher.main(["--train-iters", "3"])
    assert started.trained.training.train_iters == 3 and started.made == [Path("runs/demo")]
    assert f"no --config: running the demo, {DEMO}" in capsys.readouterr().err


def test_demo_on_one_process(started, monkeypatch, capsys):
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    launcher.main([])
    parallel = started.trained.parallel
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (1, 1)
    assert not parallel.sequence_parallel
    assert "1 process(es) do not make the demo's TP 2 x PP 2: using TP 1 x PP 1" in capsys.readouterr().err


def test_demo_keeps_a_layout_that_is_given(started, monkeypatch):
    flags = ["--tensor-model-parallel-size", "1", "--no-sequence-parallel"]
    launcher.main(flags)
    assert started.torchrun[-5:] == ["--config", str(DEMO), *flags]
    assert started.torchrun[1:3] == ["--nproc-per-node", "2"]


def test_asking_makes_no_demo(started, monkeypatch):
    shown: list[Invocation] = []
    monkeypatch.setattr("laver_megatron.planning.dry_run_command.show_dry_run", shown.append)
    for flag in ("--print-config", "--help", "--print-schema"):
        with pytest.raises(SystemExit) as ended:
            launcher.main([flag])
        assert not ended.value.code
    launcher.main(["--dry-run"])
    launcher.dry_run_main(["8", "--lr", "1"])
    launcher.dry_run_main(["--lr", "1"])
    assert [(each.dry_run, each.dry_run_world_size) for each in shown] == [(True, None), (True, 8), (True, None)]
    assert shown[1].config.training.lr == 1
    assert started.made == []


def test_first_process_makes_the_demo_and_the_others_wait(tmp_path, monkeypatch):
    made = []

    def make_demo(directory: Path) -> None:
        made.append(directory)
        for part in launcher.DEMO_PARTS:
            (directory / part).mkdir(parents=True)

    monkeypatch.setattr("laver_megatron.demo.make.make_demo", make_demo)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(launcher, "DEMO_TIMEOUT_SECONDS", 0)
    with pytest.raises(SystemExit, match="were not made in 0 seconds"):
        launcher.make_or_await_demo(tmp_path / "demo")
    monkeypatch.setenv("LOCAL_RANK", "0")
    launcher.make_or_await_demo(tmp_path / "demo")
    monkeypatch.setenv("LOCAL_RANK", "1")
    launcher.make_or_await_demo(tmp_path / "demo")
    assert made == [tmp_path / "demo"]
