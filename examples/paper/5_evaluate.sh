#!/bin/bash
# Scores both arms by VLMEvalKit, the paper's kit, and by lmms-eval on GPUS GPUs, and prints the tables. Needs both kits
# (docs/evaluation.md). Answers are matched by rules (exact_matching); the paper does not say which judge it used.
# HallusionBench is left to VLMEvalKit: lmms-eval's asks a judge over the network.
. "$(dirname "$0")/settings.sh"
GPUS=${GPUS:-8}
DATASETS=${DATASETS:-OCRBench AI2D_TEST ChartQA_TEST TextVQA_VAL MMVP CV-Bench-2D RealWorldQA HallusionBench}
TASKS=${TASKS:-ocrbench,ai2d,chartqa,textvqa_val,mmvp,cv_bench_2d,realworldqa}

export PRED_FORMAT=tsv    # samples that `laver scores` reads without openpyxl
for arm in baseline laver; do
    torchrun --nproc-per-node "$GPUS" "$EXAMPLES/evaluation/vlmeval_laver.py" --export "$EXPORTS/$arm" --name "$arm" \
        --data $DATASETS --judge exact_matching --work-dir "$SCORES/vlmevalkit"
    accelerate launch --num_processes "$GPUS" "$EXAMPLES/evaluation/lmms_eval_laver.py" --model laver \
        --model_args "pretrained=$EXPORTS/$arm" --tasks "$TASKS" --batch_size 8 --log_samples \
        --output_path "$SCORES/lmms-eval/$arm"
done
laver scores "$SCORES"/vlmevalkit/{baseline,laver} --output "$SCORES/vlmevalkit.md"
laver scores "$SCORES"/lmms-eval/{baseline,laver} --output "$SCORES/lmms-eval.md"
