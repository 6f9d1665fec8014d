"""Two versions of Megatron-Core give the same numbers, and each goes on from what the other wrote.

The second is a copy of the newest for Python 3.11, which `make test-engine` puts into .engine/.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.engines import LAYOUTS, NUM_STEPS
from tests.distributed.test_frozen_checkpoint import MEASURED, unpack

ROOT = Path(__file__).parents[2]
COPY = ROOT / ".engine"
# The arithmetic is torch's in both; the orders of summation may differ in buffers that are laid out otherwise.
TOLERANCE = 1e-6
HALF_WAY = 4  # the frozen checkpoint stands at 2

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.version_info >= (3, 12), reason="the older Megatron-Core is that of Python 3.11"),
    pytest.mark.skipif(not COPY.is_dir(), reason="make test-engine puts the newer Megatron-Core there"),
]


def pinned(constraints: str) -> str:
    return re.search(r"^megatron-core==(.+)$", (ROOT / constraints).read_text(), re.MULTILINE).group(1)


# Version: the folders that Python looks into first.
ENGINES = {pinned("constraints.txt"): [ROOT], pinned("constraints-py312.txt"): [COPY, ROOT]}


def run(engine, jobs):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, ENGINES[engine]))}
    command = [sys.executable, "-m", "tests.distributed.engines", engine, json.dumps(jobs, default=str)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not any(word in done.stderr for word in ("deprecated", "Rewrapping", "full_param_layout")), done.stderr


def records(directory, first):
    lines = [json.loads(line) for line in (directory / "run/metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]
    return {line["iteration"]: line for line in kept if line["iteration"] >= first}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{(engine of steps 3 and 4, number of processes, engine of steps 5 and 6): records of these steps}."""
    directory = tmp_path_factory.mktemp("engines")
    start = unpack(directory / "start")
    halves = {(engine, size): directory / f"{engine}-{size}" for engine in ENGINES for size in LAYOUTS}
    wholes = {(*half, reader): directory / f"{half[0]}-{half[1]}-{reader}" for half in halves for reader in ENGINES}
    first = {engine: [(start, halves[engine, size], size, HALF_WAY) for size in LAYOUTS] for engine in ENGINES}
    second = {
        reader: [(path, wholes[*half, reader], half[1], NUM_STEPS) for half, path in halves.items()]
        for reader in ENGINES
    }
    older, newer = ENGINES
    run(older, first[older])
    run(newer, first[newer] + second[newer])
    run(older, second[older])
    return {whole: records(path, 3) for whole, path in wholes.items()}


@pytest.mark.parametrize("num_processes", LAYOUTS)
def test_both_engines_give_the_same_numbers_from_each_others_checkpoints(runs, num_processes):
    older, newer = ENGINES
    expected = runs[older, num_processes, older]
    assert list(expected) == [3, 4, 5, 6]
    assert len({record["loss"] for record in expected.values()}) == 4
    for writer, reader in ((newer, newer), (older, newer), (newer, older)):
        found = runs[writer, num_processes, reader]
        assert list(found) == list(expected)
        for iteration, record in expected.items():
            assert found[iteration] == pytest.approx(record, rel=TOLERANCE), (writer, reader, iteration)
