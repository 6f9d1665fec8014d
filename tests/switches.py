"""What a run of two steps did, taken apart into named pieces, so that a test can say which of them a switch changes.

    base, other = run(assets), run(assets, mim_weight=2.0)
    changed(base, other, step=0)   ->   {"loss", "grad_norm", "gradient of connector", ...}

Pieces are compared to the last bit. Everything is computed by the program's own trainer, on the synthetic packs
of `tests.distributed.build`, in this process alone; one micro-batch holds all packs of a step.

Letters: B packs, S language tokens, V visual slots, L = S + V, T visual tokens, H hidden, K the vision head's logits.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from laver_megatron import train
from laver_megatron.config.fields import Config
from laver_megatron.data.batch.batches import GlobalBatch
from laver_megatron.data.batch.broadcast import image_num_tokens
from laver_megatron.model.laver import StageOutput
from laver_megatron.model.teacher import pair_by_name
from laver_megatron.runtime.backend import shut_down_parallelism
from tests.distributed.build import PACKS_PER_STEP, SEQ_LENGTH, Assets, make_config, make_trainer

PARTS = ("encoder", "connector", "embedding", "decoder", "vision_head", "mask_token")
# Numbers of a step's record that follow from the configuration and the data alone.
NUMBERS = (
    "loss", "lm_loss", "mim_loss", "gram_loss", "student_visual_similarity", "teacher_visual_similarity",
    "teacher_entropy", "mask_ratio", "num_masked_tokens", "ema_momentum", "grad_norm", "learning_rate",
    "visual_token_share", "num_samples", "num_tokens", "consumed_packs", "consumed_samples", "consumed_tokens",
    "skipped_iterations", "global_batch_size",
)  # fmt: skip
# Everything trains; gradients are not clipped, so that a change of one part's gradient stays with that part.
BASE: dict[str, Any] = {
    "micro_batch_size": PACKS_PER_STEP,
    "train_iters": 4,
    "freeze": (),
    "clip_grad": 0.0,
    "centre_momentum": None,
}
NUM_STEPS = 2

Tensors = dict[str, Tensor]


@dataclass
class Step:
    """One step: its record and batch, what the last stage computed, the gradients before clipping, and the state
    after it. Parameters go by their names; those without a gradient (frozen) are not in `gradients`."""

    record: dict[str, Any]
    batch: GlobalBatch
    hidden_LBH: Tensor
    output: StageOutput
    gradients: Tensors
    weights: Tensors
    teacher: Tensors
    moments: dict[str, Tensors]
    centre_K: Tensor | None


@dataclass
class Run:
    """Steps of a run, and the student's and the teacher's weights it started from."""

    config: Config
    weights: Tensors
    teacher: Tensors
    steps: list[Step] = field(default_factory=list)


@contextmanager
def trainer_of(assets: Assets, run_dir: str = "unused", **changes: Any) -> Iterator[train.Trainer]:
    """The program's trainer in a process group of one, which is left afterwards."""
    gc.collect()  # the last one is full of cycles that keep its process groups, and their threads, alive
    try:
        yield make_trainer(make_config(assets, run_dir, **{**BASE, **changes}))
    finally:
        shut_down_parallelism()


def run(assets: Assets, num_steps: int = NUM_STEPS, **changes: Any) -> Run:
    """The first steps of BASE with some settings changed."""
    with trainer_of(assets, **changes) as trainer:
        result = Run(trainer.config, student_weights(trainer), teacher_weights(trainer))
        for _ in range(num_steps):
            result.steps.append(_step(trainer))
        return result


def _step(trainer: train.Trainer) -> Step:
    (stage,) = trainer.stages
    seen: dict[str, Any] = {}
    prepare, at = trainer.optimizer.prepare_grads, trainer.training_data.at

    def note_gradients() -> bool:
        seen["gradients"] = {
            name: parameter.main_grad.clone() for name, parameter in _student(trainer) if parameter.requires_grad
        }
        return prepare()

    def note_batch(*args: Any, **kwargs: Any) -> GlobalBatch:
        seen["batch"] = at(*args, **kwargs)
        return seen["batch"]

    trainer.optimizer.prepare_grads, trainer.training_data.at = note_gradients, note_batch
    hooks = [
        stage.register_forward_hook(lambda module, args, output: seen.update(output=output)),
        stage.decoder.register_forward_hook(lambda module, args, output: seen.update(hidden=output.detach())),
    ]
    record = train.train_step(trainer)
    trainer.optimizer.prepare_grads, trainer.training_data.at = prepare, at
    for hook in hooks:
        hook.remove()
    return Step(
        record=record,
        batch=seen["batch"],
        hidden_LBH=seen["hidden"],
        output=StageOutput(**{name: _detached(value) for name, value in vars(seen["output"]).items()}),
        gradients=seen["gradients"],
        weights=student_weights(trainer),
        teacher=teacher_weights(trainer),
        moments=_moments(trainer),
        centre_K=None if trainer.centre is None else trainer.centre.value_K.clone(),
    )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _student(trainer: train.Trainer) -> Iterator[tuple[str, torch.nn.Parameter]]:
    (stage,) = trainer.stages
    return ((name, value) for name, value in stage.named_parameters() if not name.startswith("teacher."))


def student_weights(trainer: train.Trainer) -> Tensors:
    return {name: parameter.detach().clone() for name, parameter in _student(trainer)}


def teacher_weights(trainer: train.Trainer) -> Tensors:
    """Under the student's names; nothing without LaVer."""
    (stage,) = trainer.stages
    return {name: t.clone() for name, _, t in pair_by_name(stage)} if stage.teacher is not None else {}


def _moments(trainer: train.Trainer) -> dict[str, Tensors]:
    found: dict[str, Tensors] = {}
    for part in trainer.optimizer.chained_optimizers:
        for name, parameter in _student(trainer):
            if parameter in part.model_param_gbuf_map:
                group, order = part.model_param_group_index_map[parameter]
                state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
                found[name] = {key: state[key].clone().view(parameter.shape) for key in ("exp_avg", "exp_avg_sq")}
    return found


# --- pieces --------------------------------------------------------------------------------------------


def part_of(name: str) -> str:
    return name.split(".")[0]


def positions_of(batch: GlobalBatch) -> dict[str, Tensor]:
    """Kinds of positions of the language stream, bool `[B, S]`: text of documents without images, and, of those
    with images, text before the first image, images, text after the first."""
    (packs,) = batch.packs
    visual_BS = packs.image_BS >= 0
    kinds = {name: torch.zeros_like(visual_BS) for name in ("text alone", "text before", "images", "text after")}
    for b, document_S in enumerate(packs.document_BS):
        for document in range(int(document_S.max()) + 1):
            mine_S = document_S == document
            places = (mine_S & visual_BS[b]).nonzero()[:, 0]
            if not len(places):
                kinds["text alone"][b] |= mine_S
                continue
            index_S = torch.arange(len(mine_S))
            kinds["text before"][b] |= mine_S & (index_S < places[0])
            kinds["images"][b] |= mine_S & visual_BS[b]
            kinds["text after"][b] |= mine_S & ~visual_BS[b] & (index_S > places[0])
    return kinds


def pieces(run: Run, step: int) -> dict[str, Any]:
    """A step taken apart, and, at the first, what it started from. Values: numbers, tensors, or dicts of them."""
    it = run.steps[step]
    found: dict[str, Any] = {name: it.record[name] for name in NUMBERS}
    hidden_BSH = it.hidden_LBH[:SEQ_LENGTH].transpose(0, 1)
    found.update({kind: hidden_BSH[where_BS] for kind, where_BS in positions_of(it.batch).items()})
    found["masks"] = it.batch.masked[0]
    found["student logits"], found["teacher logits"] = it.output.student_logits_TK, it.output.teacher_logits_TK
    found["centre"] = it.centre_K
    if step == 0:
        found.update(_by_part("start of {}", run.weights))
    found.update(_by_part("gradient of {}", it.gradients))
    found.update(_by_part("moments of {}", it.moments))
    found.update(_by_part("new {}", it.weights))
    found.update(_by_part("new teacher's {}", it.teacher))
    return found


def _by_part(label: str, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        label.format(part): {name: value for name, value in values.items() if part_of(name) == part} for part in PARTS
    }


def changed(one: Run, other: Run, step: int) -> set[str]:
    """Names of the pieces of a step that are not the same to the last bit."""
    mine, theirs = pieces(one, step), pieces(other, step)
    assert mine.keys() == theirs.keys()
    return {name for name in mine if not _is_same(mine[name], theirs[name])}


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and one == other


def trained(*parts: str) -> set[str]:
    """What a change of the gradients of some parts changes, up to the teacher after the step."""
    return {f"{what} of {part}" for what in ("gradient", "moments") for part in parts} | stepped(*parts)


def stepped(*parts: str) -> set[str]:
    """What another update of some parts changes."""
    return {f"new {part}" for part in parts} | averaged(*parts)


def averaged(*parts: str) -> set[str]:
    """What another average of some parts changes."""
    return {f"new teacher's {part}" for part in parts if part in ("decoder", "vision_head")}


def of_images(step: Step, value: Callable[[Tensor, Tensor, Tensor], Any]) -> list[Any]:
    """`value(student_NK, teacher_NK, masked_N)` of every image of a step, logits in fp64: N is its nine tokens."""
    (packs,), (masked_BS,) = step.batch.packs, step.batch.masked
    num_tokens = image_num_tokens(packs)
    visual_BS = packs.image_BS >= 0
    of_all = (step.output.student_logits_TK.double(), step.output.teacher_logits_TK.double(), masked_BS[visual_BS])
    return [value(*of_image) for of_image in zip(*(tensor.split(num_tokens) for tensor in of_all), strict=True)]
