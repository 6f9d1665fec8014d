# What the scripts beside this one have in common. Every value can be given in the environment: NUM_SAMPLES=1000 bash ...
# All paths are relative to WORK, which takes downloads/, shards/, runs/, exports/ and scores/ (docs/reproduce.md: how
# much that is). The three stages are the files of examples/, which name shards and model by the same relative paths.
set -euo pipefail
EXAMPLES=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "${WORK:-.}"

MODEL_REPO=${MODEL_REPO:-Qwen/Qwen2.5-7B-Instruct}
MODEL=${MODEL:-$(basename "$MODEL_REPO")}
ENCODER_REPO=${ENCODER_REPO:-google/siglip2-so400m-patch14-384}
ENCODER=${ENCODER:-$(basename "$ENCODER_REPO")}
RUNS=${RUNS:-runs/7b}            # another encoder: RUNS=runs/clip
EXPORTS=${EXPORTS:-exports/7b}
SCORES=${SCORES:-scores/7b}

SEED=${SEED:-1}
NUM_SAMPLES=${NUM_SAMPLES:-800000}
FINEVISION_EVERY=${FINEVISION_EVERY:-20}    # one file of so many, of every subset its share: about 1.2M samples of 24M
ONEVISION_EVERY=${ONEVISION_EVERY:-3}
LISTS=${LISTS:-}                 # folder with FineVision.txt and LLaVA-OneVision-Data.txt in place of asking the hub
STAGES=("$EXAMPLES"/stage1_align.yaml "$EXAMPLES"/stage2_laver.yaml "$EXAMPLES"/stage3_instruct.yaml)
