"""The benchmark measures what it says, on a model small enough for a test."""

import sys

import pytest

from tools.benchmarks import conversion as benchmark

ALLOCATES = """
import os, sys, time
block = bytearray(80_000_000)
if len(sys.argv) > 1:
    os.spawnl(os.P_WAIT, sys.executable, sys.executable, sys.argv[1])
else:
    time.sleep(0.3)
"""


@pytest.mark.processes
@pytest.mark.parametrize("num_processes, least", [(1, 80e6), (2, 160e6)])
def test_memory_of_a_process_and_its_children(tmp_path, num_processes, least):
    program = tmp_path / "allocates.py"
    program.write_text(ALLOCATES)
    measured = benchmark.measure([sys.executable, *[str(program)] * num_processes])
    # An interpreter of its own takes some 10 MB.
    assert least <= measured.peak_bytes <= 1.4 * least
    assert measured.seconds >= 0.3


@pytest.mark.processes
def test_a_failed_command_is_told_with_its_output():
    with pytest.raises(RuntimeError, match="no such thing"):
        benchmark.measure([sys.executable, "-c", "raise SystemExit('no such thing')"])


@pytest.mark.processes
def test_the_table(tmp_path, monkeypatch):
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 256}
    for name, value in small.items():
        monkeypatch.setitem(benchmark._SHAPE_3B, name, value)
    header, _, *rows = benchmark.benchmark(tmp_path, [1], repeats=1).splitlines()
    columns = [row.strip("| ").split(" | ") for row in rows]
    assert [row[0] + row[2] for row in columns] == ["1to Megatron", "1to Hugging Face"]
    assert all(float(row[4]) > 0 for row in columns)
    assert header.count("|") == rows[0].count("|")
    assert list(tmp_path.iterdir()) == []
