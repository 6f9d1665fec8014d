"""Whether processes, layers and sequences can be divided as a configuration says: arithmetic on its numbers and the
model's shape. Each problem is a sentence with the numbers and what to do about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from laver_megatron.config.fields import Config
from laver_megatron.encoders import EncoderShape, with_target_size
from laver_megatron.hf.shape import ModelShape


def layout_problems(
    config: Config, shape: ModelShape | None, world_size: int, encoder: EncoderShape | None = None
) -> Iterator[str]:
    """All of them; what needs a shape that is not given is left out, and everything where a size is not positive, which
    its own check reports."""
    if not _is_countable(config):
        return
    yield from world_problems(config, world_size)
    yield from sequence_problems(config)
    if shape is not None:
        yield from _tensor_parallel_problems(config, shape, encoder)
        yield from _pipeline_problems(config, shape)
        yield from _position_problems(config, shape)


def num_replicas(config: Config, world_size: int) -> int | None:
    """Data-parallel replicas; None where the processes do not divide."""
    ranks = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    return world_size // ranks if ranks > 0 and world_size % ranks == 0 else None


def world_problems(config: Config, world_size: int) -> Iterator[str]:
    """Why so many processes cannot share the work."""
    parallel, data = config.parallel, config.data
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size % (tp * pp):
        yield (
            f"{world_size} processes cannot be divided into TP {tp} x PP {pp} = {tp * pp}; start a multiple "
            f"of {tp * pp}, or change --tensor-model-parallel-size or --pipeline-model-parallel-size"
        )
        return
    dp = world_size // (tp * pp)
    packs_at_once = data.micro_batch_size * dp
    if data.global_batch_size % packs_at_once:
        yield (
            f"global_batch_size {data.global_batch_size} is not a multiple of micro_batch_size "
            f"{data.micro_batch_size} x {dp} data-parallel replicas = {packs_at_once}"
        )
        return
    num_micro_batches = data.global_batch_size // packs_at_once
    if parallel.num_layers_per_virtual_pipeline_stage is not None and num_micro_batches % pp:
        yield (
            f"the interleaved schedule needs a multiple of {pp} (pipeline_model_parallel_size) "
            f"micro-batches, but an iteration has {num_micro_batches}; use a global_batch_size that is a "
            f"multiple of {packs_at_once * pp}"
        )


def sequence_problems(config: Config) -> Iterator[str]:
    """What is wrong with the lengths of the sequences, and how sequence parallelism splits them."""
    tp, seq, visual = config.parallel.tensor_model_parallel_size, config.data.seq_length, config.data.visual_seq_length
    if visual > seq:
        yield f"visual_seq_length {visual} is above seq_length {seq}: visual tokens are part of the sequence"
    if not config.parallel.sequence_parallel:
        return
    if tp == 1:
        yield "sequence_parallel needs tensor_model_parallel_size above 1; use --no-sequence-parallel"
    streams = {"seq_length": seq}
    # A proposed visual_seq_length is a multiple of the ranks.
    if config.objective.laver and visual:
        streams = {"seq_length + visual_seq_length": seq + visual, "visual_seq_length": visual}
    for name, length in streams.items():
        if length % tp:
            rest = f"{length} % {tp} = {length % tp}"
            yield f"sequence_parallel splits {name} = {length} between {tp} ranks, but {rest}"


def decoder_sizes(shape: ModelShape) -> dict[str, int]:
    """What tensor parallelism divides of the decoder, by a phrase for messages."""
    return {
        f"the model's {shape.num_attention_heads} attention heads": shape.num_attention_heads,
        f"its vocabulary of {shape.vocab_size}": shape.vocab_size,
        f"its ffn_hidden_size {shape.ffn_hidden_size}": shape.ffn_hidden_size,
    }


def tensor_parallel_faults(divided: Mapping[str, int], num_query_groups: int, tp: int) -> list[str]:
    """What keeps sizes and key/value heads from being divided over `tp` ranks; empty if nothing does."""
    faults = [f"does not divide {name}" for name, value in divided.items() if value % tp]
    if num_query_groups % tp and tp % num_query_groups:
        faults.append(f"neither divides nor is a multiple of its {num_query_groups} key/value heads")
    return faults


def _tensor_parallel_problems(config: Config, shape: ModelShape, encoder: EncoderShape | None) -> Iterator[str]:
    objective = with_target_size(config, encoder).objective
    tp = config.parallel.tensor_model_parallel_size
    divided = decoder_sizes(shape)
    if objective.laver:
        output_size = objective.vision_head_output_size or shape.hidden_size
        divided[f"vision_head_hidden_size {objective.vision_head_hidden_size}"] = objective.vision_head_hidden_size
        divided[f"the vision head's {output_size} logits"] = output_size
    if faults := tensor_parallel_faults(divided, shape.num_query_groups, tp):
        candidates = range(1, shape.num_attention_heads + 1)
        fits = [size for size in candidates if not tensor_parallel_faults(divided, shape.num_query_groups, size)]
        sizes = ", ".join(map(str, fits))
        yield f"tensor_model_parallel_size {tp} {', '.join(faults)}; sizes that fit this model: {sizes}"


def _pipeline_problems(config: Config, shape: ModelShape) -> Iterator[str]:
    parallel = config.parallel
    pp, layers = parallel.pipeline_model_parallel_size, shape.num_layers
    per_chunk = parallel.num_layers_per_virtual_pipeline_stage
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if first is not None or last is not None:
        yield from _uneven_split_problems(pp, layers, first, last, per_chunk)
    elif layers % pp:
        fits = ", ".join(str(size) for size in range(1, layers + 1) if layers % size == 0)
        yield (
            f"the model's {layers} layers do not divide into {pp} pipeline stages; use {fits} stages, or say "
            "how to split them: --decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers"
        )
    elif per_chunk is not None:
        per_stage = layers // pp
        fits = ", ".join(str(size) for size in range(1, per_stage) if per_stage % size == 0) or "none"
        if pp == 1:
            yield (
                f"num_layers_per_virtual_pipeline_stage {per_chunk} needs pipeline_model_parallel_size "
                "above 1: one stage has nothing to interleave with"
            )
        elif per_stage % per_chunk or per_stage == per_chunk:
            yield (
                f"num_layers_per_virtual_pipeline_stage {per_chunk} does not cut the {per_stage} layers of a "
                f"stage ({layers} layers, {pp} stages) into equal chunks, at least two; use {fits}"
            )


def _uneven_split_problems(
    pp: int, layers: int, first: int | None, last: int | None, per_chunk: int | None
) -> Iterator[str]:
    if per_chunk is not None:
        yield "num_layers_per_virtual_pipeline_stage and an uneven split of the layers exclude each other"
    if pp == 1:
        yield "an uneven split of the layers needs pipeline_model_parallel_size above 1"
        return
    split = f"first {first}" if last is None else f"last {last}" if first is None else f"first {first}, last {last}"
    rest = layers - (first or 0) - (last or 0)
    stages = pp - (first is not None) - (last is not None)
    if stages == 0 and rest:
        covered = layers - rest
        yield f"the uneven split ({split}) covers {covered} of the model's {layers} layers, with {pp} stages"
    elif stages and (rest < stages or rest % stages):
        yield (
            f"the uneven split ({split}) leaves {rest} of the model's {layers} layers for {stages} other "
            "pipeline stages; they must divide equally, one layer each at least"
        )


def _position_problems(config: Config, shape: ModelShape) -> Iterator[str]:
    if config.data.seq_length > shape.max_position_embeddings:
        yield (
            f"seq_length {config.data.seq_length} is above the model's max_position_embeddings "
            f"{shape.max_position_embeddings}: it has not learnt positions beyond; shorten the packs"
        )
    if shape.kv_channels % 2:
        yield f"the model's heads are {shape.kv_channels} wide; rotary positions need an even width"


def _is_countable(config: Config) -> bool:
    parallel, data = config.parallel, config.data
    sizes = (
        parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, data.micro_batch_size,
        data.global_batch_size, data.seq_length, config.objective.vision_head_hidden_size,
        parallel.num_layers_per_virtual_pipeline_stage, config.objective.vision_head_output_size,
    )  # fmt: skip
    return all(size is None or size >= 1 for size in sizes) and data.visual_seq_length >= 0
