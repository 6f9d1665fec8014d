"""Two training steps on whatever device this process sees, written to a file; with CUDA_VISIBLE_DEVICES empty, the CPU.

    python -m tests.gpu.steps ASSETS OUTPUT.pt '{"bf16": true}'

ASSETS: of `tests.distributed.build.make_assets`. The JSON changes the run's configuration. The file holds the device,
and for each step the record, and by parameter its gradient (before clipping), its value and the teacher's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch

from laver_megatron import train
from laver_megatron.runtime.backend import shut_down_parallelism
from tests.distributed.build import Assets, make_config, make_trainer

NUM_STEPS = 2
# Epsilon above the rounding of gradients: without it Adam would turn gradients of rounding alone into whole steps.
SETTINGS = {"adam_eps": 1e-3, "weight_decay": 0.1, "clip_grad": 0.3, "mim_weight": 0.7}
TERMS = ("lm_loss", "mim_loss", "gram_loss", "loss", "grad_norm")


def steps_in_a_process(assets: Path, output: Path, *, on_cpu: bool, **changes) -> dict:
    """Runs this file in a process of its own, and returns what it wrote."""
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})}
    command = [sys.executable, "-m", "tests.gpu.steps", str(assets), str(output), json.dumps(changes)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)} failed:\n{result.stderr[-3000:]}"
    return torch.load(output, weights_only=True)


def run_steps(assets: Path, **changes) -> dict:
    """The steps, in this process."""
    # Convolutions may take TF32 by default.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(False)
    directories = Assets(assets / "tied", assets / "untied", assets / "encoder")
    trainer = make_trainer(make_config(directories, "none", **{**SETTINGS, **changes}))
    (stage,) = trainer.stages
    parameters = {name: parameter for name, parameter in stage.named_parameters() if parameter.requires_grad}

    def values() -> dict[str, torch.Tensor]:
        return {name: parameter.detach().float().cpu().clone() for name, parameter in parameters.items()}

    gradients: dict[str, torch.Tensor] = {}
    update_student = train.update_student

    def noting_gradients(*arguments) -> tuple[float, bool]:
        for name, parameter in parameters.items():
            gradients[name] = parameter.main_grad.detach().float().cpu().clone()
        return update_student(*arguments)

    found = {"device": str(trainer.backend.device), "start": values(), "steps": []}
    for _ in range(NUM_STEPS):
        with mock.patch.object(train, "update_student", noting_gradients):
            record = train.train_step(trainer)
        teacher = {name: p.detach().float().cpu().clone() for name, p in stage.teacher.named_parameters()}
        step = {"terms": {name: float(record[name]) for name in TERMS}, "gradients": dict(gradients)}
        found["steps"].append({**step, "values": values(), "teacher": teacher})
    shut_down_parallelism()
    return found


if __name__ == "__main__":
    torch.save(run_steps(Path(sys.argv[1]), **json.loads(sys.argv[3])), sys.argv[2])
