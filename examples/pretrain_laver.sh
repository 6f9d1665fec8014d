#!/usr/bin/env bash
# Starts training. This file is a shell script and a Python program at once:
#
#   bash examples/pretrain_laver.sh --config my_run.yaml               one machine, every GPU
#   srun --ntasks-per-node 1 bash examples/pretrain_laver.sh ...       SLURM, one task per node
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 bash examples/pretrain_laver.sh ...    by hand, on each node
#   torchrun --nproc-per-node 8 examples/pretrain_laver.sh ...         torchrun runs it with Python
#
# Without --config it runs examples/demo.yaml. Paths in a configuration are relative to the current directory.
# The shell reads NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR and MASTER_PORT, or else what SLURM says;
# --help, --print-config and --dry-run [PROCESSES] start one process only.
''''true
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bin=$(command -v torchrun >/dev/null || echo "$root/.venv/bin/")
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} NNODES=${NNODES:-${SLURM_NNODES:-1}}
case " $* " in *" -h "* | *" --help "* | *" --print-config "* | *" --dry-run"*)
  exec "${bin}python3" "${BASH_SOURCE[0]}" "$@" ;;
esac
NPROC_PER_NODE=${NPROC_PER_NODE:-$("${bin}python3" -m laver_megatron.launch "$@")}
if ((NNODES == 1)) && [[ -z ${MASTER_ADDR:-}${MASTER_PORT:-} ]]; then
  meeting=(--standalone)
else
  if [[ -z ${MASTER_ADDR:-} && -n ${SLURM_JOB_NODELIST:-} ]]; then
    read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  fi
  meeting=(--nnodes "$NNODES" --node-rank "${NODE_RANK:-${SLURM_NODEID:-0}}"
    --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}")
fi
exec "${bin}torchrun" "${meeting[@]}" --nproc-per-node "$NPROC_PER_NODE" "${BASH_SOURCE[0]}" "$@"  # '''

import sys
from pathlib import Path

if __name__ == "__main__":  # Megatron's checkpoint writer starts processes that import this file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from laver_megatron.launch import main

    main()
