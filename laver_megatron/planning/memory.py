"""Bytes of what each rank keeps from step to step, by arithmetic alone: no tensor and no process group is made.

The tensors and their sizes are those of the table of weights; what this file adds is which of them a tensor-parallel
rank holds a part of, in which order Megatron lays them into its buffers, and how a buffer is padded and divided over
the data-parallel ranks. `dry_run` builds the model instead and says the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import lru_cache
from math import prod
from typing import Any

from laver_megatron.config.fields import Config
from laver_megatron.encoders import EncoderShape, idle_parameters, with_target_size
from laver_megatron.hf.shape import ModelShape
from laver_megatron.hf.weights import ModelParts, Size, weight_table
from laver_megatron.planning.pipeline import layers_of_stages

FP32_BYTES = 4
OPTIMIZER_BYTES_BF16, OPTIMIZER_BYTES_FP32 = 12, 8  # two moments, and under bf16 the master weight
_PARAMETER_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128  # of Megatron's buffers, in values

# Ends of the keys of tensors that tensor parallelism divides; all others are whole on every rank.
_DIVIDED = (
    "word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias", "linear_proj.weight",
    "linear_fc1.weight", "linear_fc2.weight", "vision_head.linear_1.weight", "vision_head.linear_1.bias",
    "vision_head.linear_2.weight", "vision_head.linear_3.weight",
)  # fmt: skip
# A layer's tensors as the modules own them, where the norms are modules of their own.
_LAYER_ORDER = (
    "self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias", "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight", "mlp.linear_fc2.weight",
)  # fmt: skip


def value_bytes(config: Config) -> int:
    """Of one weight or activation in the run's dtype."""
    return 2 if config.training.bf16 else FP32_BYTES


@dataclass(frozen=True)
class StateBytes:
    """What one rank keeps from step to step.

    Attributes:
        weights: the student's, in the run's dtype, alignment of Megatron's buffers included.
        gradients: fp32.
        optimizer: this rank's share of moments and, under bf16, of master weights.
        teacher: its weights in the run's dtype.
        accumulators: this rank's share of the EMA, fp32.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    teacher: int = 0
    accumulators: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self))

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class LocalTensor:
    """A student's tensor on one rank. averaged: the teacher has it as well; alone: it has a separate bucket."""

    num_values: int
    trains: bool
    averaged: bool = False
    alone: bool = False


def state_of_rank(
    config: Config,
    shape: ModelShape,
    encoder: EncoderShape | None,
    encoder_sizes: Mapping[str, Size],
    data_parallel_size: int,
    stage: int,
    dp_rank: int,
) -> StateBytes:
    """What a rank of this pipeline stage holds. Ranks of one stage that differ in their tensor-parallel rank alone hold
    the same. encoder: the image encoder, None for a text-only model; encoder_sizes: of its tensors in their order."""
    config, of_encoder = with_target_size(config, encoder), _of_encoder(config, encoder, encoder_sizes)
    whole, trained, averaged = _values_of_stage(config, shape, *of_encoder, data_parallel_size, stage)
    return with_shares(whole, trained[dp_rank], averaged[dp_rank], config)


def fullest_state(
    config: Config,
    shape: ModelShape,
    encoder: EncoderShape | None,
    encoder_sizes: Mapping[str, Size],
    data_parallel_size: int,
    stage: int,
) -> StateBytes:
    """What the fullest data-parallel rank of this pipeline stage holds: a bucket's padding falls to the last ranks, and
    the teacher's accumulators lie wherever the averaged tensors do. Arguments as of `state_of_rank`."""
    config, of_encoder = with_target_size(config, encoder), _of_encoder(config, encoder, encoder_sizes)
    # What changes nothing here, and most layouts of a search differ in.
    config = config.replace(micro_batch_size=1, recompute_granularity=None, sequence_parallel=False)
    return _fullest_state(config, shape, *of_encoder, data_parallel_size, stage)


_EncoderTensors = tuple[tuple[int, bool], ...]  # of each how many values, and whether they train


def _of_encoder(config: Config, encoder: EncoderShape | None, sizes: Mapping[str, Size]) -> tuple[_EncoderTensors, int]:
    """The image encoder's tensors, whole on every rank of the first stage, and its feature width."""
    if encoder is None:
        assert not sizes
        return (), 1
    trains = "encoder" not in config.model.freeze
    tensors = _encoder_tensors(encoder, tuple(sizes.items()), trains, config.model.encoder_feature_layer)
    return tensors, encoder.feature_size


@lru_cache(maxsize=64)
def _encoder_tensors(
    encoder: EncoderShape, sizes: tuple[tuple[str, Size], ...], trains: bool, feature_layer: int | None
) -> _EncoderTensors:
    idle = set(idle_parameters(encoder, [name for name, _ in sizes], feature_layer))
    return tuple((prod(size), trains and name not in idle) for name, size in sizes)


@lru_cache(maxsize=4096)
def _fullest_state(config: Config, shape: ModelShape, *rest: Any) -> StateBytes:
    whole, trained, averaged = _values_of_stage(config, shape, *rest)
    differing = set(zip(trained, averaged, strict=True))
    return max((with_shares(whole, *own, config) for own in differing), key=lambda state: state.total)


def with_shares(whole: StateBytes, trained: int, averaged: int, config: Config) -> StateBytes:
    """What one data-parallel rank holds. whole: what every rank holds; trained, averaged: values of which this rank
    keeps the optimizer's state and the teacher's average."""
    optimizer_bytes = OPTIMIZER_BYTES_BF16 if config.training.bf16 else OPTIMIZER_BYTES_FP32
    # In fp32 the teacher's weights are its accumulators.
    accumulators = averaged * FP32_BYTES if config.training.bf16 else 0
    return replace(whole, optimizer=trained * optimizer_bytes, accumulators=accumulators)


def checkpoint_copy_bytes(config: Config, state: StateBytes, data_parallel_size: int) -> int:
    """What a host holds for each data-parallel rank 0 of a stage while a checkpoint is written in the background: the
    weights, which others have as well, the optimizer's fp32 state of all data-parallel ranks, and its part of the EMA.

    state: of the fullest rank of the stage.
    """
    # In fp32 Megatron-Core stores the weights as the optimizer's once more.
    optimizer = state.optimizer if config.training.bf16 else state.optimizer * 3 // 2
    average = state.accumulators if config.training.bf16 else state.teacher // data_parallel_size
    return state.weights + optimizer * data_parallel_size + average


def _values_of_stage(
    config: Config, shape: ModelShape, encoder: _EncoderTensors, feature_size: int, dp: int, stage: int
) -> tuple[StateBytes, list[int], list[int]]:
    """What every data-parallel rank holds; and of each rank how many values it keeps the optimizer's state and the
    teacher's average of."""
    chunks = layers_of_stages(config, shape.num_layers)
    whole = StateBytes()
    trained, averaged = [0] * dp, [0] * dp
    for number, num_layers in enumerate(chunks[stage]):
        tensors = _chunk(
            config,
            shape,
            encoder,
            feature_size,
            num_layers,
            is_first=stage == number == 0,
            is_last=stage == len(chunks) - 1 and number == len(chunks[stage]) - 1,
        )
        places, buffer_values = _buffer([tensor for tensor in tensors if tensor.trains], dp)
        whole += _on_every_rank(tensors, buffer_values, config)
        for rank, tensor, num_values in _owned(places, dp):
            trained[rank] += num_values
            averaged[rank] += num_values if tensor.averaged else 0
        # What is frozen stays with the first rank.
        averaged[0] += sum(tensor.num_values for tensor in tensors if tensor.averaged and not tensor.trains)
    return whole, trained, averaged


def _on_every_rank(tensors: Sequence[LocalTensor], buffer_values: int, config: Config) -> StateBytes:
    frozen = sum(tensor.num_values for tensor in tensors if not tensor.trains)
    return StateBytes(
        weights=(buffer_values + frozen) * value_bytes(config),
        gradients=buffer_values * FP32_BYTES,
        teacher=sum(tensor.num_values for tensor in tensors if tensor.averaged) * value_bytes(config),
    )


_Place = tuple[LocalTensor, int, int, int, int]


def _owned(places: Sequence[_Place], dp: int) -> Iterator[tuple[int, LocalTensor, int]]:
    """(data-parallel rank, tensor, how many of its values the rank owns): each rank has an equal part of a bucket."""
    for tensor, start, end, bucket_start, bucket_end in places:
        share = (bucket_end - bucket_start) // dp
        for rank in range((start - bucket_start) // share, -(-(end - bucket_start) // share)):
            first = bucket_start + rank * share
            yield rank, tensor, min(end, first + share) - max(start, first)


def _buffer(tensors: Sequence[LocalTensor], dp: int) -> tuple[list[_Place], int]:
    """Where Megatron's buffer has each tensor: (tensor, start, end, start and end of its bucket), and the buffer's
    length in values. Tensors lie in the reverse of their order, aligned; a bucket divides evenly over the ranks."""
    found: list[_Place] = []
    waiting: list[tuple[LocalTensor, int, int]] = []
    bucket_start = end = 0

    def close() -> None:
        nonlocal bucket_start, end
        end = _multiple(end, math.lcm(dp, _BUCKET_ALIGNMENT))
        found.extend((*place, bucket_start, end) for place in waiting)
        waiting.clear()
        bucket_start = end

    for tensor in reversed(tensors):
        start = _multiple(end, _PARAMETER_ALIGNMENT)
        if tensor.alone and waiting:
            end = start
            close()
            start = end
        end = start + tensor.num_values
        waiting.append((tensor, start, end))
        if tensor.alone:
            close()
    if waiting:
        close()
    return found, end


def _multiple(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


def _chunk(
    config: Config,
    shape: ModelShape,
    encoder: _EncoderTensors,
    feature_size: int,
    num_layers: int,
    *,
    is_first: bool,
    is_last: bool,
) -> list[LocalTensor]:
    """The student's tensors of one (virtual) stage, in the order of its modules."""
    objective = config.objective
    sizes = _sizes(
        objective.laver, objective.vision_head_hidden_size, objective.vision_head_output_size, shape, feature_size
    )
    trains = {part: part not in config.model.freeze for part in ("connector", "decoder", "heads")}
    tp, laver = config.parallel.tensor_model_parallel_size, objective.laver
    # First and last stage hold a copy each of a tied embedding, and sum its gradients.
    shared = shape.tie_word_embeddings and config.parallel.pipeline_model_parallel_size > 1

    def local(key: str, part: str, *, averaged: bool = False, alone: bool = False) -> LocalTensor:
        divisor = tp if key.endswith(_DIVIDED) else 1
        assert sizes[key] % divisor == 0, (key, sizes[key], divisor)
        return LocalTensor(sizes[key] // divisor, trains[part], averaged and laver, alone)

    def of(beginning: str, part: str, *, averaged: bool = False) -> Iterator[LocalTensor]:
        return (local(key, part, averaged=averaged) for key in sizes if key.startswith(beginning))

    tensors: list[LocalTensor] = []
    embedding = "embedding.word_embeddings.weight"
    if is_first:
        tensors += of("mask_token", "heads")
        tensors.append(local(embedding, "decoder", alone=shared))
        tensors += (LocalTensor(*tensor) for tensor in encoder)
        tensors += of("connector.", "connector")
    layer = [local(f"decoder.layers.0.{name}", "decoder", averaged=True) for name in _LAYER_ORDER]
    tensors += layer * num_layers
    if is_last:
        tensors.append(local("decoder.final_layernorm.weight", "decoder", averaged=True))
        if not shape.tie_word_embeddings:
            tensors.append(local("output_layer.weight", "decoder"))
        elif not is_first:
            tensors.append(local(embedding, "decoder", alone=shared))
        tensors += of("vision_head.", "heads", averaged=True)
    return tensors


@lru_cache(maxsize=64)
def _sizes(
    laver: bool, head_hidden_size: int, head_output_size: int | None, shape: ModelShape, feature_size: int
) -> dict[str, int]:
    """Values of every whole tensor of the student but the encoder's, by key; of the layers the first."""
    parts = ModelParts(
        shape,
        encoder={},
        feature_size=feature_size,
        vision_head=(head_hidden_size, head_output_size or shape.hidden_size) if laver else None,
    )
    return {key: prod(weight.size) for key, weight in weight_table(parts).items()}
