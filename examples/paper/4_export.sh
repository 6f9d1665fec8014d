#!/bin/bash
# Both arms as Hugging Face models, each compared with its checkpoint. Flags are passed on to `laver verify`.
. "$(dirname "$0")/settings.sh"

for arm in laver baseline; do
    checkpoints=$RUNS/stage3_instruct/checkpoints
    [ "$arm" = laver ] || checkpoints=$RUNS/stage3_instruct-baseline/checkpoints
    mkdir -p "$EXPORTS"
    [ -d "$EXPORTS/$arm" ] || laver export --megatron "$checkpoints" --hf "$EXPORTS/$arm"
    laver verify --hf "$EXPORTS/$arm" --megatron "$checkpoints" "$@"
done
