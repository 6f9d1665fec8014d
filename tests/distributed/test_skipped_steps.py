"""Steps that are not applied: a gradient that only one rank sees is seen by all, and the record names it."""

import json

import pytest
from megatron.core import parallel_state

from laver_megatron.model.overlap import complete_parameters
from laver_megatron.train import train, train_step
from tests.distributed.build import (
    PACKS_PER_STEP,
    SyntheticReader,
    assert_same_bits,
    before_the_update,
    make_config,
    make_trainer,
    snapshot,
    synthetic_data,
)
from tests.distributed.harness import Layout

# Held alike by all tensor-parallel ranks: the norm counts the copy of the first.
NORM, BIAS = "decoder.layers.1.pre_mlp_layernorm.weight", "connector.linear_2.bias"
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 9000}


def keys_of_step(step, packs=range(PACKS_PER_STEP)):
    reader = SyntheticReader("packs")
    return [sample.encoded.key for pack in packs for sample in reader._pack(step * PACKS_PER_STEP + pack)]


def one_nan(trainer, name):
    """After the reductions, one gradient of a parameter on a rank that holds a copy of it: the second tensor-parallel
    rank, of its data-parallel replicas the one whose optimizer has the parameter's first element."""
    named = dict(trainer.stages[0].named_parameters())
    assert not getattr(named[name], "tensor_model_parallel", False), f"{name} has no copies"

    def poison():
        for part in trainer.optimizer.chained_optimizers:
            if named[name] in part.model_param_gbuf_map and parallel_state.get_tensor_model_parallel_rank() == 1:
                owned = part._get_model_param_range_map(named[name])["param"]
                if owned.start == 0 < owned.end:
                    named[name].main_grad.view(-1)[0] = float("nan")

    return before_the_update(trainer, poison)


def step_over_a_copy(layout, config, name):
    """Job: a good step, one with a NaN in a copy, a good step; their records, and what is written of the second."""
    trainer = make_trainer(config)
    first = train_step(trainer)
    complete_parameters(trainer.chunks)  # gathered in the next step, where that overlaps
    before = snapshot(trainer)
    with one_nan(trainer, name):
        record = train_step(trainer)
    complete_parameters(trainer.chunks)
    assert_same_bits(snapshot(trainer), before)
    skipped = trainer.skipped
    after = train_step(trainer)
    assert trainer.skipped is None
    return first, record, after, skipped


ALIKE = pytest.mark.slow(reason="norms and biases are copies alike")
DIVISIONS = {
    "TP2": (Layout(tp=2), {}),
    "TP2-DP2": (Layout(tp=2, dp=2), {}),
    "TP2+SP-DP2-overlapping": (Layout(tp=2, dp=2, sp=True), OVERLAP),
}


@pytest.mark.parametrize(
    "layout, options, name",
    [
        pytest.param(
            *division,
            name,
            id=f"{key}-{name}",
            marks=() if (name == BIAS) == (key == "TP2-DP2") else ALIKE,
        )
        for key, division in DIVISIONS.items()
        for name in (NORM, BIAS)
    ],
)
def test_a_nan_in_a_copy_that_the_norm_leaves_out_changes_nothing(pool, assets, layout, options, name):
    config = make_config(assets, "unused", layout, freeze=(), **options)
    results = pool.run(step_over_a_copy, layout, config, name)
    for first, record, after, skipped in results:
        assert first["skipped_iterations"] == 0
        assert record["skipped_iterations"] == 1 and record["grad_norm"] != record["grad_norm"]
        assert record["loss"] == record["loss"], "the loss is finite: only the gradient says it"
        assert after["skipped_iterations"] == 1 and after["loss"] == after["loss"] and after["grad_norm"] > 0
        assert skipped["iteration"] == 2 and skipped["reason"] == "gradient norm not finite"
        (named,) = skipped["parameters"]
        assert named["name"] == name and named["ranks"] in ([1], [3]) and skipped["num_bad_gradients"] == 1
        assert skipped["micro_batches"] == [] and skipped["keys"] == keys_of_step(1)


def test_layers_are_named_as_in_the_whole_model(pool, assets):
    """Both stages have a layer of that name."""
    layout = Layout(tp=2, pp=2)
    config = make_config(assets, "unused", layout, freeze=())
    for *_, skipped in pool.run(step_over_a_copy, layout, config, NORM):
        named = {part["name"]: part["ranks"] for part in skipped["parameters"]}
        assert named == {NORM: [1], NORM.replace("layers.1", "layers.3"): [3]}


def train_here(layout, config, scale_at=None):
    """Job: `train` from wherever the run directory stands, with gradients blown up after one iteration. The error that
    ends it, this rank's state, and where it stands."""
    with synthetic_data():
        trainer = make_trainer(config)
        prepare = trainer.optimizer.prepare_grads

        def blow_up_and_prepare():
            if trainer.progress.iteration == scale_at:
                for chunk in trainer.chunks:
                    for buffer in chunk.buffers:
                        buffer.grad_data.mul_(1e6)
            return prepare()

        trainer.optimizer.prepare_grads = blow_up_and_prepare
        problem = ""
        try:
            train(trainer)
        except (ValueError, RuntimeError) as error:
            problem = f"{type(error).__name__}: {error}"
    return problem, snapshot(trainer), trainer.progress


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_micro_batch_whose_loss_is_not_finite_is_named(pool, assets, tmp_path):
    """The pixels of the first pack of the second step are NaN."""
    layout = Layout(tp=2, pp=2)
    config = make_config(assets, tmp_path, layout, data_path=("nan",), train_iters=3)
    for problem, *_ in pool.run(train_here, layout, config):
        assert problem == ""
    (record,) = lines_of(tmp_path / "skipped.jsonl")
    assert record["iteration"] == 2 and record["reason"] == "loss not finite" and record["loss"] is None
    assert record["parameters"] and record["num_bad_gradients"] > 4
    keys = keys_of_step(1, packs=range(2))
    assert record["micro_batches"] == [{"replica": 0, "micro_batch": 0, "keys": keys}] and record["keys"] == keys


# Far from what the small run does by itself, and far below 1e6 times its gradients.
SPIKES = {"spike_sigmas": 100.0, "spike_window": 3}


def test_a_spike_is_skipped_and_the_window_survives_a_restart(pool, assets, tmp_path):
    """A spike after four steps; the run is stopped after three, when the window has just filled."""
    layout = Layout(dp=2)
    common = {"train_iters": 6, "freeze": (), "spike_action": "skip", **SPIKES}
    whole = pool.run(train_here, layout, make_config(assets, tmp_path / "whole", layout, **common), 4)
    pool.run(train_here, layout, make_config(assets, tmp_path / "parts", layout, exit_interval=3, **common), 4)
    parts = pool.run(train_here, layout, make_config(assets, tmp_path / "parts", layout, **common), 4)
    for (problem, state, progress), (resumed_problem, resumed, resumed_progress) in zip(whole, parts, strict=True):
        assert problem == resumed_problem == ""
        assert_same_bits(resumed, state)
        assert progress.iteration == 6 and progress.skipped_iterations == 1
        assert len(progress.recent_norms) == 3 and max(progress.recent_norms) < 1e4
        assert resumed_progress.recent_norms == progress.recent_norms
        assert resumed_progress.recent_losses == progress.recent_losses
    for name in ("whole", "parts"):
        (record,) = lines_of(tmp_path / name / "skipped.jsonl")
        assert record["iteration"] == 5 and "gradient norm" in record["reason"] and record["grad_norm"] > 1e4
        assert record["keys"] == keys_of_step(4) and record["parameters"] == []
    plain = make_config(assets, tmp_path / "plain", layout, **(common | {"spike_action": "none"}))
    for problem, _, progress in pool.run(train_here, layout, plain, 4):
        assert problem == "" and progress.skipped_iterations == 0 and progress.recent_losses == ()


def test_a_spike_stops_the_run_with_the_state_before_it_saved(pool, assets, tmp_path):
    layout = Layout(dp=2)
    common = {"train_iters": 6, "freeze": (), **SPIKES}
    config = make_config(assets, tmp_path / "stopped", layout, spike_action="stop", **common)
    for problem, _, progress in pool.run(train_here, layout, config, 4):
        assert problem.startswith("RaisedByAll: iteration 5 is a spike: gradient norm") and progress.iteration == 4
    assert (tmp_path / "stopped" / "checkpoints" / "latest").read_text() == "4"
    assert [line["iteration"] for line in lines_of(tmp_path / "stopped" / "metrics.jsonl")] == [1, 2, 3, 4]
    (record,) = lines_of(tmp_path / "stopped" / "skipped.jsonl")
    assert record["iteration"] == 5 and record["keys"] == keys_of_step(4)
    # Without the spike it goes on as if nothing had been.
    resumed = pool.run(train_here, layout, config)
    whole = pool.run(train_here, layout, make_config(assets, tmp_path / "whole", layout, **common))
    for (problem, state, progress), (_, expected, _) in zip(resumed, whole, strict=True):
        assert problem == "" and progress.iteration == 6 and progress.skipped_iterations == 0
        assert_same_bits(state, expected)
