"""A checkpoint that an earlier version wrote: it loads, goes on with the numbers of that version, and is exported to
the same bytes.

tests/data/checkpoint_f4d5f6b/make.py says how it came about.
"""

import hashlib
import json
import re
import tarfile
from pathlib import Path

import pytest

from laver_megatron import train
from laver_megatron.config.command_line import from_command_line
from laver_megatron.convert.megatron_to_hf import megatron_to_hf
from tests.distributed.harness import Layout

FROZEN = Path(__file__).parents[1] / "data" / "checkpoint_f4d5f6b"
EXPORTS = {"student": {"training_state": True}, "teacher": {"weights": "teacher"}}
# Another processor or another layout sums in another order: 1e-7 in losses, some 1e-6 in the gradient norm.
TOLERANCE = 1e-5
# What depends on the clock and on the machine.
MEASURED = (
    "tokens_per_second", "tflops_per_gpu", "peak_memory_bytes", "elapsed_seconds", "data_seconds", "data_wait_seconds",
    "visual_tokens_per_second", "images_per_second", "mfu", "hfu", "mfu_full_square",
)  # fmt: skip


def unpack(directory: Path) -> Path:
    """config.yaml, shards/ and run/ with the checkpoint after two of four steps."""
    with tarfile.open(FROZEN / "run.tar.xz") as archive:
        archive.extractall(directory, filter="data")
    return directory


@pytest.fixture
def written(tmp_path) -> Path:
    return unpack(tmp_path)


def go_on(layout, directory, **changes):
    """Job: the command of the run again, with other settings."""
    settings = {
        "config": directory / "config.yaml",
        "data-path": directory / "shards/train-*.tar",
        "run-dir": directory / "run",
        "tensor-model-parallel-size": layout.tp,
        "pipeline-model-parallel-size": layout.pp,
        **changes,
    }
    flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    train.train(train.setup(from_command_line([*flags, *(["--sequence-parallel"] if layout.sp else [])]).config))


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2, sp=True)], ids=str)
def test_the_run_goes_on_with_its_numbers(pool, written, layout):
    expected = [json.loads(line) for line in (FROZEN / "metrics.jsonl").read_text().splitlines()]
    pool.run(go_on, layout, written)
    *before, third, fourth = (json.loads(line) for line in (written / "run/metrics.jsonl").read_text().splitlines())
    assert [record["iteration"] for record in before] == [1, 2]
    for record, as_it_was in zip((third, fourth), expected, strict=True):
        kept = {name: value for name, value in as_it_was.items() if name not in MEASURED}
        assert {name: record[name] for name in kept} == pytest.approx(kept, rel=TOLERANCE)


def hash_of(path):
    """sha256 of a file's bytes; of code without lines of comment, which name files that may move."""
    content = path.read_bytes()
    if path.suffix == ".py":
        content = re.sub(rb"(?m)^ *#.*\n", b"", content)
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("weights", EXPORTS)
def test_it_is_exported_to_the_same_bytes(written, weights):
    expected = json.loads((FROZEN / "exports.json").read_text())[weights]
    target = written / weights
    megatron_to_hf(written / "run/checkpoints/iter_0000002", target, **EXPORTS[weights])
    files = [path for path in target.rglob("*") if path.is_file()]
    assert {str(path.relative_to(target)): hash_of(path) for path in files} == expected
