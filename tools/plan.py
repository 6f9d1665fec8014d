"""Plans a run: which layout on these GPUs is the fastest that fits, what it takes in memory, time and GPU hours, and
why the others are not it. Needs neither weights, data nor GPUs.

    python tools/plan.py --model 72b --gpus 256 --gpu h100-80gb --visual-share 0.6
    python tools/plan.py --model 7b --gpus 16 --gpu a100-80gb --tp 2 --pp 2 --write plan.yaml
    python tools/plan.py --model DIR --gpus 64 --gpu-memory 96 --gpu-tflops 400 --bandwidth 25 --node-bandwidth 450

How it computes and how far it is off: docs/planning.md.
"""

from laver_megatron.planning.plan_command import main

if __name__ == "__main__":
    main()
