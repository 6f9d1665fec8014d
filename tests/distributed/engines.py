"""Goes on with runs of the frozen checkpoint, under the Megatron-Core that PYTHONPATH puts first:
`python -m tests.distributed.engines VERSION JOBS`.

JOBS is JSON: [[directory, number of processes, last iteration, steps of the run], ...].
"""

import json
import sys
from pathlib import Path

from tests.distributed.harness import Layout, Pool
from tests.distributed.test_frozen_checkpoint import go_on

LAYOUTS = {1: Layout(), 4: Layout(tp=2, pp=2, sp=True)}


def go_on_until(layout, directory, last, num_steps):
    """Job: the run again, ending with a checkpoint at iteration `last`. Returns Megatron-Core's version."""
    import megatron.core

    go_on(layout, directory, **{"train-iters": num_steps, "exit-interval": last})
    return megatron.core.__version__


def main() -> None:
    version, jobs = sys.argv[1], json.loads(sys.argv[2])
    pool = Pool()
    for directory, num_processes, last, num_steps in jobs:
        found = pool.run(go_on_until, LAYOUTS[num_processes], Path(directory), last, num_steps)
        assert set(found) == {version}, f"Megatron-Core {found} runs where {version} should"
    pool.close()


if __name__ == "__main__":
    main()
