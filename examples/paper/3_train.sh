#!/bin/bash
# The three stages, then stages 2 and 3 without LaVer (stage 1 is the same). Flags are passed on to all of them, such as a
# layout from `laver plan`; on a cluster: srun --ntasks-per-node 1 bash examples/paper/3_train.sh. Finished stages are
# skipped. --dry-run checks all and trains nothing.
. "$(dirname "$0")/settings.sh"

for arm in "" --baseline; do
    laver stages "${STAGES[@]}" --runs "$RUNS" --encoder "$ENCODER" --load "hf:$MODEL" $arm "$@"
done
