"""A small trainer for the distributed tests: everything is real but the samples.

Model and encoder are Hugging Face directories with random weights, the trainer comes from
`laver_megatron.train.setup`; only tokenizer, preprocessor and reader are replaced, by packs that are made
from their number alone. A step has eight packs; they hold one document or two, none to three images, and on
even steps the second half has no image at all, so that one of two data-parallel ranks sees none.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from laver_megatron import train
from laver_megatron.config.fields import Config
from laver_megatron.data.batch import run_data
from laver_megatron.data.batch.packing import EncodedSample, PackBatch, PackedSample, build_packs
from laver_megatron.data.index.faults import Fault, FaultLog
from laver_megatron.data.plan.plan import PlanMark
from laver_megatron.objective.language import IGNORE_LABEL
from laver_megatron.runtime.sharded_state import sharding_metadata
from tests.distributed.harness import Layout

VOCABULARY, SEQ_LENGTH, VISUAL_SEQ_LENGTH, PACKS_PER_STEP = 128, 64, 32, 8
IMAGE_SIZE, PATCH_SIZE = 24, 8
GRID = IMAGE_SIZE // PATCH_SIZE
GRIDS = ((3, 3), (1, 7), (4, 2), (2, 2))  # of images of several sizes
# With Qwen's 1e6 the slowest frequencies would not turn at all within 64 tokens: their key biases would have
# rounding for a gradient, and Adam would blow it up to whole steps.
ROPE_THETA = 100.0
ONE_PROCESS = Layout()
IMAGE_TOKEN = VOCABULARY - 1
# Images of each document of each pack, on even and on odd steps.
IMAGES = (
    ((2, 1), (0,), (0, 1), (3,), (0,), (0, 0), (0,), (0,)),
    ((1,), (0, 0), (1, 1), (0,), (3,), (0, 2), (0,), (2,)),
)


@contextmanager
def before_the_update(trainer: train.Trainer, change: Callable[[], None]) -> Iterator[None]:
    """`change` is called once the gradients are reduced, before the optimizer takes them."""
    prepare = trainer.optimizer.prepare_grads

    def change_and_prepare() -> Any:
        change()
        return prepare()

    trainer.optimizer.prepare_grads = change_and_prepare
    yield
    trainer.optimizer.prepare_grads = prepare


@dataclass(frozen=True)
class Assets:
    """Hugging Face directories."""

    tied: Path
    untied: Path
    encoder: Path


def make_assets(directory: Path) -> Assets:
    """Random models with four layers and four heads in two key/value groups."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    assets = Assets(directory / "tied", directory / "untied", directory / "encoder")
    for path, tied in ((assets.tied, True), (assets.untied, False)):
        torch.manual_seed(11)
        config = Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, rope_theta=ROPE_THETA, initializer_range=0.05,
        )  # fmt: skip
        model = Qwen2ForCausalLM(config)
        for name, parameter in model.named_parameters():
            # Biases start at 0 and norms at 1, where a mistake in loading them would not show.
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
        model.save_pretrained(path)
    torch.manual_seed(12)
    SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        )  # fmt: skip
    ).save_pretrained(assets.encoder)
    return assets


def make_config(assets: Assets, run_dir: Path | str, layout: Layout = ONE_PROCESS, **changes: Any) -> Config:
    """A run with everything on: LaVer, the centre, fixed masks that hide 3 of an image's 9 tokens."""
    settings: dict[str, Any] = {
        "load": f"hf:{assets.tied}",
        "encoder": str(assets.encoder),
        "run_dir": str(run_dir),
        "data_path": ("packs",),
        "seq_length": SEQ_LENGTH,
        "visual_seq_length": VISUAL_SEQ_LENGTH,
        "micro_batch_size": 2,
        "global_batch_size": PACKS_PER_STEP,
        "mask_ratio": 0.4,
        "mask_sampling": "fixed",
        "ema_momentum": 0.9,
        "centre_momentum": 0.9,
        "vision_head_hidden_size": 32,
        "train_iters": 20,
        "lr": 1e-3,
        "num_workers": 0,
        **layout.settings,
    }
    return Config.of(**{**settings, **changes})


# --- packs ---------------------------------------------------------------------------------------------


class SyntheticPlan:
    """Remembers the mark that it was to go on from."""

    went_on_from: PlanMark | None = None

    def mark(self, number: int) -> PlanMark:
        return PlanMark(number // 2, number, "synthetic")

    def resume_from(self, mark: PlanMark) -> None:
        self.went_on_from = mark


class SyntheticReader:
    """Packs by number, in place of `PackReader`. `kind` (the run's `data_path`) chooses among

    packs: the packs themselves; other-answers: other tokens and labels after the images of every document;
    text: the same tokens without images; other-image: the second image of the first pack is another one;
    grids: images of several sizes, none of more tokens than the others' have;
    nan: the first pixels of step 1 are NaN; all-nan: those of every step; every-other-nan: of odd steps.
    """

    fingerprint = "synthetic"

    def __init__(self, kind: str) -> None:
        self.kind, self.plan, self.faults = kind, SyntheticPlan(), FaultLog(logging.getLogger("laver_megatron.test"))

    def read(self, first_pack: int, num_packs: int, micro_batch_size: int) -> list[PackBatch]:
        packs = [self._pack(number) for number in range(first_pack, first_pack + num_packs)]
        return [
            build_packs(packs[i : i + micro_batch_size], seq_length=SEQ_LENGTH, padding_token=0)
            for i in range(0, num_packs, micro_batch_size)
        ]

    def check_bad(self, num_bad: int, num_read: int, found: Mapping[Fault, int]) -> None:
        assert num_bad == 0 < num_read and not found

    def _pack(self, number: int) -> list[PackedSample]:
        step, place = divmod(number, PACKS_PER_STEP)
        images_of = tuple(0 if self.kind == "text" else number for number in IMAGES[step % 2][place])
        length = (SEQ_LENGTH - 3 - place) // len(images_of)
        return [self._sample(10 * number + i, images, length, step) for i, images in enumerate(images_of)]

    def _sample(self, sample_id: int, num_images: int, length: int, step: int) -> PackedSample:
        generator = torch.Generator().manual_seed(sample_id)
        tokens_T = torch.randint(0, IMAGE_TOKEN, (length,), generator=generator)
        image_number_T = torch.full((length,), -1)
        row_T, col_T = torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.int64)
        end = 1 + sample_id % 2  # text before the first image
        pixels = []
        several = GRIDS if self.kind == "grids" else ((GRID, GRID),)
        grids = tuple(several[(sample_id + image) % len(several)] for image in range(num_images))
        for image, (rows, columns) in enumerate(grids):
            slots = slice(end, end + rows * columns)
            tokens_T[slots], image_number_T[slots] = IMAGE_TOKEN, image
            place_N = torch.arange(rows * columns)
            row_T[slots], col_T[slots] = place_N // columns, place_N % columns
            pixels.append(self._pixels(generator, sample_id, image, step, grids[image]))
            end += rows * columns + image % 2  # the second and third image touch text, the first two each other
        if self.kind == "other-answers":
            tokens_T[end:] = (tokens_T[end:] + 5) % IMAGE_TOKEN
        labels_T = torch.full((length,), IGNORE_LABEL)
        labels_T[end:-1] = tokens_T[end + 1 :]
        encoded = EncodedSample(f"sample-{sample_id}", tokens_T, labels_T, image_number_T, row_T, col_T, grids)
        return PackedSample(sample_id, length, encoded, tuple(pixels))

    def _pixels(
        self, generator: torch.Generator, sample_id: int, image: int, step: int, grid: tuple[int, int]
    ) -> Tensor:
        pixels = torch.randn(3, grid[0] * PATCH_SIZE, grid[1] * PATCH_SIZE, generator=generator)
        is_first_of_step = sample_id % (10 * PACKS_PER_STEP) == 0 and image == 0
        poisoned = {"nan": step == 1, "all-nan": True, "every-other-nan": step % 2 == 1}.get(self.kind, False)
        if is_first_of_step and poisoned:
            pixels[:, 0, 0] = float("nan")
        if self.kind == "other-image" and sample_id == 0 and image == 1:
            pixels = pixels.flip(1)
        return pixels


@contextmanager
def synthetic_data() -> Iterator[None]:
    """`train.setup` without a tokenizer, a preprocessor and shards."""
    with (
        mock.patch.object(run_data, "load_tokenizer"),
        mock.patch.object(run_data, "open_preprocessor"),
        mock.patch.object(run_data, "open_reader", lambda spec, *_: SyntheticReader(spec.paths[0])),
    ):
        yield


def make_trainer(config: Config) -> train.Trainer:
    """`train.setup` on synthetic packs. Call inside a job, on all its ranks."""
    with synthetic_data():
        return train.setup(config)


# --- whole tensors from all ranks ----------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A rank's part of a whole tensor."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: Tensor


def shards_of(trainer: train.Trainer, value: Callable[[Tensor], Tensor]) -> list[Shard]:
    """`value(parameter)`, of the parameter's shape, for the student's parameters of this rank, under
    checkpoint keys."""
    shards = []
    for stage in trainer.stages:
        state = stage.sharded_state_dict(metadata=sharding_metadata())
        parameters = dict(stage.named_parameters())
        values = {name: value(parameters[name]) for name in state if name in parameters}
        shards += _shards({name: tensor for name, tensor in state.items() if name in values}, values)
    return shards


def teacher_shards(trainer: train.Trainer) -> list[Shard]:
    """The teacher's weights as it computes with them, under the student's checkpoint keys."""
    shards = []
    for stage in trainer.stages:
        state = stage.teacher.sharded_state_dict("", (), sharding_metadata())
        parameters = dict(stage.teacher.named_parameters())
        values = {name: parameters[name].detach() for name in state if name in parameters}
        shards += _shards({name: tensor for name, tensor in state.items() if name in values}, values)
    return shards


def _shards(state: dict[str, Any], values: dict[str, Tensor]) -> list[Shard]:
    for name, entry in state.items():
        entry.data = values[name]
    apply_factories(state)
    found = []
    for entry in state.values():
        for part in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else [entry]:
            assert isinstance(part, ShardedTensor)
            data = part.data.view(part.local_shape).clone()
            found.append(Shard(part.key, tuple(part.global_shape), tuple(part.global_offset), data))
    return found


def student_shards(trainer: train.Trainer) -> list[Shard]:
    """The student's weights."""
    return shards_of(trainer, lambda parameter: parameter.detach())


def gradient_shards(trainer: train.Trainer) -> list[Shard]:
    """The reduced gradients, to be read between the schedule and the optimizer's step.

    The distributed optimizer leaves the sum over data-parallel ranks only in the part of a gradient that it
    owns on this rank; the parts are put together here. Frozen parameters have gradient 0.
    """
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group()

    def whole(parameter: Tensor) -> Tensor:
        gradient = torch.zeros(parameter.numel())
        for part in trainer.optimizer.chained_optimizers:
            if parameter in getattr(part, "model_param_gbuf_map", {}):
                owned = part._get_model_param_range_map(parameter)["param"]
                gradient[owned.start : owned.end] = parameter.main_grad.flatten()[owned.start : owned.end].float()
        dist.all_reduce(gradient, group=group)
        return gradient.view(parameter.shape)

    return shards_of(trainer, whole)


def whole_tensors(shards_of_ranks: list[list[Shard]], *, rtol: float = 0.0) -> dict[str, Tensor]:
    """Puts the shards of all ranks together. Copies of the same part must agree: to the last bit, or to `rtol`
    in relative Frobenius norm."""
    whole: dict[str, Tensor] = {}
    filled: dict[str, Tensor] = {}
    for rank, shards in enumerate(shards_of_ranks):
        for shard in shards:
            tensor = whole.setdefault(shard.key, torch.zeros(shard.global_shape))
            seen = filled.setdefault(shard.key, torch.zeros(shard.global_shape, dtype=torch.bool))
            part = tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.data.shape, strict=True))
            data = shard.data.float()
            if seen[part].any():
                difference = (tensor[part] - data).norm()
                assert seen[part].all() and difference <= rtol * data.norm(), (
                    f"{shard.key}: rank {rank} differs from an earlier one by {difference:.3e} of {data.norm():.3e}"
                )
            tensor[part], seen[part] = data, True
    for key, seen in filled.items():
        assert seen.all(), f"{key} is not covered by the shards of all ranks"
    return whole


def relative_distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| in Frobenius norm; 0 for two zeros."""
    distance = float((a - b).norm())
    return distance / float(b.norm()) if distance else 0.0


# --- the state of a rank -------------------------------------------------------------------------------


def snapshot(trainer: train.Trainer) -> dict[str, Tensor]:
    """All that a step can change on this rank, copied: the student's and the teacher's weights, the teacher's
    accumulators, master weights and moments of the optimizer, the centre."""
    found = {}
    for i, stage in enumerate(trainer.stages):
        found.update({f"stage {i} {name}": parameter for name, parameter in stage.named_parameters()})
    for i, part in enumerate(trainer.optimizer.chained_optimizers):
        for j, group in enumerate(getattr(part.optimizer, "param_groups", ())):
            if group["params"]:  # on a stage without trainable parameters nobody counts
                found[f"optimizer {i} group {j} step"] = torch.tensor(group["step"])
            for k, master in enumerate(group["params"]):
                found[f"optimizer {i} group {j} master {k}"] = master
                for name, moment in part.optimizer.state.get(master, {}).items():
                    found[f"optimizer {i} group {j} {name} {k}"] = moment
    for pair in trainer.teacher._pairs if trainer.teacher is not None else ():
        if pair.accumulator is not None:
            found[f"accumulator {pair.stage} {pair.name}"] = pair.accumulator
    if trainer.centre is not None:
        found["centre"] = trainer.centre.value_K
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_same_bits(snapshot: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Two snapshots are equal to the last bit."""
    assert snapshot.keys() == expected.keys(), sorted(snapshot.keys() ^ expected.keys())
    different = [name for name, tensor in snapshot.items() if not torch.equal(tensor, expected[name])]
    assert not different, f"{len(different)} of {len(snapshot)} tensors differ: {different[:5]}"


def moment_shards(trainer: train.Trainer, name: str) -> list[Shard]:
    """`exp_avg` or `exp_avg_sq` of every parameter, whole over the data-parallel ranks; 0 for frozen ones."""
    from megatron.core import parallel_state

    def whole(parameter: Tensor) -> Tensor:
        moment = torch.zeros(parameter.numel())
        for part in trainer.optimizer.chained_optimizers:
            if parameter in getattr(part, "model_param_gbuf_map", {}):
                owned = part._get_model_param_range_map(parameter)["param"]
                group, order = part.model_param_group_index_map[parameter]
                master = part.optimizer.param_groups[group]["params"][order]
                moment[owned.start : owned.end] = part.optimizer.state[master][name].flatten()
        dist.all_reduce(moment, group=parallel_state.get_data_parallel_group())
        return moment.view(parameter.shape)

    return shards_of(trainer, whole)
