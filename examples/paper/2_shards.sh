#!/bin/bash
# Shards of what was downloaded, and the seeded subsets of stages 2 and 3; the same command goes on with what is missing.
. "$(dirname "$0")/settings.sh"

subset() {  # folder of shards, index of the subset
    [ -f "$2" ] || laver shards subset --index "$1" --num-samples "$NUM_SAMPLES" --seed "$SEED" --output "$2"
}

laver shards make --source downloads/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json \
    --images downloads/LLaVA-Pretrain/images --output shards/llava-558k --resume
laver shards make --source downloads/FineVision --output shards/finevision --resume
laver shards make --source downloads/LLaVA-OneVision-Data --output shards/onevision --resume
subset shards/finevision shards/finevision-800k.parquet
subset shards/onevision shards/onevision-800k.parquet
