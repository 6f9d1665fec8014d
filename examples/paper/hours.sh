#!/bin/bash
# The planner's GPU hours of the three stages for 7B with SigLIP2, two pictures of 729 tokens in each pack of 2048, as the
# table of docs/reproduce.md: GPU, how many, stage, and the fastest layout's line.
set -euo pipefail
common=(--model 7b --seq-length 2048 --global-batch-size 128 --visual-share 0.72 --layouts 1)

for gpu in a100-80gb h100-80gb; do
    for gpus in 8 16; do
        stage() {  # name, flags
            local name=$1
            shift
            printf '%s\t%s\t%s\t%s\n' "$gpu" "$gpus" "$name" \
                "$(laver plan "${common[@]}" --gpu "$gpu" --gpus "$gpus" "$@" | sed -n '/^TP/{n;p}')"
        }
        stage "1 align" --no-laver --freeze encoder decoder --train-iters 4360
        stage "2 LaVer" --freeze encoder --train-iters 6250
        stage "2 baseline" --no-laver --freeze encoder --train-iters 6250
        stage "3 instruct" --no-laver --freeze encoder --train-iters 6250
    done
done
