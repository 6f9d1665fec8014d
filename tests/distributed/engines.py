"""Goes on with runs of the frozen checkpoint, under the Megatron-Core that PYTHONPATH puts first:
`python -m tests.distributed.engines VERSION JOBS`.

JOBS is JSON: [[directory of a run, directory to do the next part in, number of processes, last iteration], ...].
"""

import json
import shutil
import sys
from pathlib import Path

from tests.distributed.harness import Layout, Pool
from tests.distributed.test_frozen_checkpoint import go_on

LAYOUTS = {1: Layout(), 4: Layout(tp=2, pp=2, sp=True)}
NUM_STEPS = 6


def go_on_until(layout, directory, last):
    """Job: the run again, ending with a checkpoint at iteration `last`. Returns Megatron-Core's version."""
    import megatron.core

    go_on(layout, directory, **{"train-iters": NUM_STEPS, "exit-interval": last})
    return megatron.core.__version__.partition("+")[0]  # behind it stands the commit of the repository that it lies in


def main() -> None:
    version, jobs = sys.argv[1], json.loads(sys.argv[2])
    pool = Pool()
    try:
        for source, target, num_processes, last in jobs:
            shutil.copytree(source, target)
            found = pool.run(go_on_until, LAYOUTS[num_processes], Path(target), last)
            assert set(found) == {version}, f"Megatron-Core {found} runs where {version} should"
    finally:
        pool.close()  # or the process would wait for its workers for ever


if __name__ == "__main__":
    main()
