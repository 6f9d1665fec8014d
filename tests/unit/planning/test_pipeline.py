"""Micro-batches in flight against Megatron's own schedule; messages and collectives by hand."""

from dataclasses import replace

import pytest
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

from laver_megatron.planning.memory import StateBytes
from laver_megatron.planning.pipeline import bubble, chunks_in_flight, layers_of_stages
from laver_megatron.planning.simulated_rank import simulated_rank
from laver_megatron.planning.throughput import pipeline_bytes, sent_bytes, tensor_parallel_bytes
from laver_megatron.planning.workload import Workload
from tests.small_run import SHAPE, settings

NUM_LAYERS = 8
WORK = Workload(768, 0, 1, 1, "mixed", None)
SHAPE_8 = SHAPE.__class__(**{**vars(SHAPE), "num_layers": NUM_LAYERS})


@pytest.mark.parametrize("chunk_layers", [None, 1, 2])
@pytest.mark.parametrize("num_micro_batches", [2, 4, 16])
def test_in_flight_is_megatrons_warm_up_and_one(chunk_layers, num_micro_batches):
    pp = 2
    config = settings(1, pipeline_model_parallel_size=pp, num_layers_per_virtual_pipeline_stage=chunk_layers)
    num_chunks = len(layers_of_stages(config, NUM_LAYERS)[0])
    for stage in range(pp):
        with simulated_rank(
            stage,
            pp,
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None,
        ):
            assert parallel_state.get_pipeline_model_parallel_rank() == stage
            total, _, warm_up, _ = get_pp_rank_microbatches(num_micro_batches, num_chunks, pp)
        assert chunks_in_flight(config, NUM_LAYERS, num_micro_batches, stage) == min(total, warm_up + 1)


def test_bubble():
    config = settings(1, pipeline_model_parallel_size=4)
    assert bubble(config, NUM_LAYERS, 8) == 3 / 8
    assert bubble(config.replace(num_layers_per_virtual_pipeline_stage=1), NUM_LAYERS, 8) == 3 / 16
    assert bubble(settings(1), NUM_LAYERS, 8) == 0


def test_uneven_layers():
    config = settings(1, pipeline_model_parallel_size=3, decoder_first_pipeline_num_layers=2)
    assert layers_of_stages(config, NUM_LAYERS) == [[2], [3], [3]]
    config = config.replace(decoder_last_pipeline_num_layers=1)
    assert layers_of_stages(config, NUM_LAYERS) == [[2], [5], [1]]


def test_what_stages_send():
    """`[S | V | V]` in bf16 forward, and as much back; over sequence-parallel ranks each its part."""
    config = settings(1, pipeline_model_parallel_size=4, bf16=True)
    tensor = (768 + 256 + 256) * 128 * 2
    assert [pipeline_bytes(config, SHAPE_8, WORK, stage) for stage in range(4)] == [
        tensor, 2 * tensor, 2 * tensor, tensor
    ]  # fmt: skip
    interleaved = config.replace(num_layers_per_virtual_pipeline_stage=1)
    # Two chunks on each of four stages have seven boundaries, and every message goes one way.
    sent = [pipeline_bytes(interleaved, SHAPE_8, WORK, stage) for stage in range(4)]
    assert sum(sent) == 2 * 7 * tensor
    scattered = config.replace(tensor_model_parallel_size=2, sequence_parallel=True)
    assert pipeline_bytes(scattered, SHAPE_8, WORK, 0) == tensor // 2
    plain = config.replace(laver=False)
    assert pipeline_bytes(plain, SHAPE_8, WORK, 0) == 768 * 128 * 2
    assert pipeline_bytes(settings(1), SHAPE_8, WORK, 0) == 0


def test_what_tensor_parallel_ranks_send():
    config = settings(1, tensor_model_parallel_size=4, laver=False)
    tensor = 768 * 128 * 4 * 3 // 4  # (r - 1) / r of it in each all-gather and reduce-scatter
    assert tensor_parallel_bytes(config, SHAPE_8, WORK, 0) == NUM_LAYERS * 8 * tensor + 2 * tensor
    scattered = config.replace(sequence_parallel=True)
    assert tensor_parallel_bytes(scattered, SHAPE_8, WORK, 0) == NUM_LAYERS * 10 * tensor + 2 * tensor
    full = scattered.replace(recompute_granularity="full")
    assert tensor_parallel_bytes(full, SHAPE_8, WORK, 0) == NUM_LAYERS * 14 * tensor + 2 * tensor
    with_laver = tensor_parallel_bytes(config.replace(laver=True), SHAPE_8, WORK, 0)
    student, teacher = (768 + 256) * tensor // 768, 256 * tensor // 768
    assert with_laver == NUM_LAYERS * (8 * student + 4 * teacher) + 2 * student
    assert tensor_parallel_bytes(settings(1), SHAPE_8, WORK, 0) == 0


def test_what_replicas_send():
    state = StateBytes(weights=2000, gradients=4000, optimizer=3000, teacher=2000, accumulators=1000)
    sent = sent_bytes(settings(1, bf16=True), SHAPE_8, WORK, state, 4, 8, 0)
    assert (sent.gradients, sent.weights, sent.teacher) == (3000, 1500, 500)
    assert sent_bytes(settings(1), SHAPE_8, WORK, state, 1, 8, 0).total == 0


def test_what_tied_embeddings_send():
    """The table of words in fp32, once to the other stage that has it; see Megatron's `finalize_model_grads`."""
    tied = replace(SHAPE_8, tie_word_embeddings=True)
    config = settings(1, pipeline_model_parallel_size=4, bf16=True)
    table = 512 * 128 * 4

    def sent(config, shape=tied):
        return [sent_bytes(config, shape, WORK, StateBytes(), 2, 8, stage).tied_embeddings for stage in (0, 1, 3)]

    assert sent(config) == [table, 0, table]
    assert sent(config.replace(tensor_model_parallel_size=2)) == [table // 2, 0, table // 2]
    assert sent(config, SHAPE_8) == sent(config.replace(freeze=("encoder", "decoder"))) == [0, 0, 0]
    assert sent(settings(1))[0] == 0
