"""The examples of docs/api.md run as they stand, without Megatron-Core."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What comes before the examples: a finder that is asked first, and refuses Megatron-Core.
_NO_MEGATRON = """
import sys

class NoMegatron:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "megatron":
            raise ImportError(f"{name} must not be imported here")

sys.meta_path.insert(0, NoMegatron())
"""


@pytest.mark.processes
def test_examples_run_without_megatron(tmp_path):
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/api.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(examples) >= 5
    files = []
    for number, example in enumerate(examples):
        files.append(tmp_path / f"example_{number}.py")
        files[-1].write_text(example)
    # Each has names of its own, and errors name its file and line.
    runs = "".join(f"runpy.run_path({str(file)!r})\n" for file in files)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"{_NO_MEGATRON}import runpy\n{runs}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
