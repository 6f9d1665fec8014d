"""examples/slurm.sbatch against stand-ins of srun, scontrol and laver."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "slurm.sbatch"
pytestmark = pytest.mark.processes
STOPS = "trap 'echo \"exiting at iteration 7, as SIGUSR1 asks\"; exit 0' USR1; echo ready; while :; do sleep 0.1; done"


@pytest.fixture
def job(tmp_path):
    """Starts the script with a `laver` that does as it is told; srun runs it and writes down what it was given."""

    def start(laver: str, *words: str, **environment: str) -> subprocess.Popen:
        programs = {
            # As srun, it passes on signals.
            "srun": f'echo "$@" > {tmp_path}/srun.txt\nwhile [ "${{1#--}}" != "$1" ]; do shift; done\nexec "$@"',
            "scontrol": f'echo "$@" > {tmp_path}/scontrol.txt',
            "laver": laver,
        }
        for name, body in programs.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environ |= {"PATH": f"{tmp_path}:{environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(tmp_path)}
        command = ["bash", str(SCRIPT), *words]
        return subprocess.Popen(command, env=environ | environment, stdout=subprocess.PIPE, text=True)

    return start


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_run_that_was_told_to_stop_is_queued_again(job, tmp_path, number):
    process = job(STOPS, "--config", "a b.yaml")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(60) == 0
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"
    given = (tmp_path / "srun.txt").read_text()
    assert given == "--ntasks-per-node=1 --kill-on-bad-exit=0 laver train --config a b.yaml --restarts 20\n"


@pytest.mark.parametrize("body, status", [("exit 0", 0), ("exit 2", 2), ("exit 1", 1)])
def test_a_run_that_ends_by_itself_is_not(job, tmp_path, body, status):
    assert job(f"echo 'exiting at iteration 6, a multiple of --exit-interval 3'; {body}").wait(60) == status
    assert not (tmp_path / "scontrol.txt").exists()


def test_in_a_container(job, tmp_path):
    assert job("exit 0", CONTAINER="laver.sqsh", MOUNTS="/data:/data", RESTARTS="3").wait(60) == 0
    given = (tmp_path / "srun.txt").read_text()
    here = f"{tmp_path}:{tmp_path},/data:/data"
    assert f"--container-image=laver.sqsh --container-mounts={here} --container-workdir={tmp_path} laver" in given
    assert given.endswith("laver train --restarts 3\n")


def test_slurm_signals_the_script_before_the_limit():
    text = SCRIPT.read_text()
    assert "#SBATCH --signal=B:USR1@600\n" in text and "#SBATCH --requeue\n" in text
