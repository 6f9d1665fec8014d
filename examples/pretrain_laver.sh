#!/usr/bin/env bash
# Starts training. This file is a shell script and a Python program at once:
#
#   bash examples/pretrain_laver.sh --config my_run.yaml               one machine, every GPU
#   srun --ntasks-per-node 1 bash examples/pretrain_laver.sh ...       SLURM, one task per node
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 bash examples/pretrain_laver.sh ...    by hand, on each node
#   torchrun --nproc-per-node 8 examples/pretrain_laver.sh ...         torchrun runs it with Python
#
# Without --config it runs examples/demo.yaml. Paths in a configuration are relative to the current directory.
# NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR and MASTER_PORT, or else what SLURM says, are read by
# laver_megatron/launcher.py, which checks the run and starts torchrun. It is the same as `laver train`.
''''true
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v torchrun >/dev/null && echo python3 || echo "$root/.venv/bin/python3")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" "${BASH_SOURCE[0]}" "$@"  # '''

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":  # Megatron's checkpoint writer starts processes that import this file
    if (ROOT / "laver_megatron").is_dir():  # a clone, installed or not
        sys.path.insert(0, str(ROOT))
    from laver_megatron.launcher import main

    main()
