"""Options of the engine that change how a step is computed: the numbers stay."""

import json
from collections import Counter

import pytest

from laver_megatron import train
from laver_megatron.model.overlap import complete_parameters
from laver_megatron.objective.micro_batch import TERMS
from tests.distributed.build import (
    make_config,
    make_trainer,
    relative_distance,
    snapshot,
    student_shards,
    synthetic_data,
    teacher_shards,
    whole_tensors,
)
from tests.distributed.harness import Layout

NUM_STEPS = 4
NUMBERS = (*TERMS, "grad_norm", "skipped_iterations")
# Few parameters, so that the small model has several buckets.
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 9000}


def run(layout, config):
    """Job: steps with an evaluation after the second; what communicated when, numbers and weights."""
    trainer = make_trainer(config)
    sent = Counter()
    note_collectives(trainer, sent)
    records, evaluations = [], []
    for step in range(NUM_STEPS):
        record = train.train_step(trainer)
        records.append({name: record[name] for name in NUMBERS if record[name] is not None})
        if step == 1 and trainer.validation_data is not None:
            evaluations.append({name: value for name, value in train.evaluate(trainer).items() if name in TERMS})
    sent = Counter(sent)
    complete_parameters(trainer.chunks)
    return {
        "records": records,
        "evaluations": evaluations,
        "sent": sent,
        "buckets": [len(chunk.bucket_groups) for chunk in trainer.chunks],
        "student": student_shards(trainer),
        "teacher": teacher_shards(trainer) if config.objective.laver else [],
    }


def note_collectives(trainer, sent):
    """Counts reductions that start within a backward pass, and gathers within a forward pass."""
    inside = set()

    def noting(function, name):
        def call(*args, **kwargs):
            inside.add(name)
            try:
                return function(*args, **kwargs)
            finally:
                inside.discard(name)

        return call

    def counting(function, name, phase):
        def call(*args, **kwargs):
            sent[f"{name} {'inside' if phase in inside else 'outside'}"] += 1
            return function(*args, **kwargs)

        return call

    for chunk in trainer.chunks:
        chunk.forward = noting(chunk.forward, "forward")
        chunk.finish_grad_sync = noting(chunk.finish_grad_sync, "finish")
        for group in chunk.bucket_groups:
            group.start_grad_sync = counting(group.start_grad_sync, "reduced", "finish")
            group.start_param_sync = counting(group.start_param_sync, "gathered", "forward")


@pytest.mark.parametrize(
    "layout, settings",
    [
        (Layout(dp=2), {"freeze": ()}),
        (Layout(tp=2, dp=2, sp=True), {"freeze": ()}),
        pytest.param(Layout(pp=2, dp=2), {"freeze": ()}, marks=pytest.mark.slow(reason="virtual stages have it, too")),
        (Layout(pp=2, dp=2, vpp_layers=1), {"freeze": ()}),
        (Layout(dp=2), {"freeze": ("encoder", "decoder"), "laver": False}),
        # Steps 2 and 4 are skipped: what is gathered after them is what was there.
        (Layout(dp=2), {"freeze": (), "data_path": ("every-other-nan",)}),
    ],
    ids=["DP2", "TP2+SP-DP2", "PP2-DP2", "PP2-VPP-DP2", "connector-only", "skipped"],
)
def test_overlapping_communication_changes_no_number(pool, assets, layout, settings):
    """On even steps one of two replicas sees no image: its encoder and connector have no gradient."""

    def launch(**options):
        config = make_config(
            assets,
            "unused",
            layout,
            micro_batch_size=2,
            valid_data_path=("packs",),
            eval_iters=1,
            **settings,
            **options,
        )
        return pool.run(run, layout, config)

    plain, overlapped = launch(), launch(**OVERLAP)
    for one, other in zip(plain, overlapped, strict=True):
        for mine, theirs in zip(
            [*one["records"], *one["evaluations"]], [*other["records"], *other["evaluations"]], strict=True
        ):
            assert theirs == pytest.approx(mine, rel=1e-5, nan_ok=True)
    for what in ("student", "teacher"):
        weights = whole_tensors([result[what] for result in plain])
        for key, weight in whole_tensors([result[what] for result in overlapped]).items():
            if not key.endswith("k_proj.bias"):  # does not move the encoder's softmax: its gradient is rounding alone
                assert relative_distance(weight, weights[key]) < 1e-5, key
    assert plain[0]["sent"]["reduced outside"] == plain[0]["sent"]["gathered inside"] == 0
    first = overlapped[0]
    assert first["sent"]["gathered inside"] > 0 == first["sent"]["gathered outside"]
    if "decoder" not in settings["freeze"]:
        assert first["buckets"][0] > 2 and first["sent"]["reduced outside"] > 0, "nothing overlapped"


def trained(layout, config):
    """Job: `train` from wherever the run directory stands; this rank's state."""
    with synthetic_data():
        trainer = train.setup(config)
        train.train(trainer)
    return snapshot(trainer)


def test_checkpoints_hold_gathered_parameters(pool, assets, tmp_path):
    """A run that is saved in the middle and goes on ends as one that was not."""
    layout = Layout(dp=2)

    def config(name, **changes):
        return make_config(assets, tmp_path / name, layout, train_iters=4, freeze=(), **OVERLAP, **changes)

    straight = pool.run(trained, layout, config("straight"))
    pool.run(trained, layout, config("parted", exit_interval=2))
    parted = pool.run(trained, layout, config("parted"))
    for one, other in zip(straight, parted, strict=True):
        different = {
            name: relative_distance(tensor.float(), other[name].float())
            for name, tensor in one.items()
            if not tensor.equal(other[name])
        }
        assert not different and one.keys() == other.keys()


# --- rates of parts ------------------------------------------------------------------------------------

RATES = {"encoder_lr": 2e-4, "connector_lr": 3e-3, "decoupled_lr": 5e-4, "weight_decay": 0.1}


def test_rates_of_parts_do_not_depend_on_the_layout_and_survive_a_checkpoint(pool, assets, tmp_path):
    def config(layout, name, **changes):
        settings = {"train_iters": 4, "freeze": (), **RATES, **changes}
        return make_config(assets, tmp_path / name, layout, **settings)

    one, other = Layout(), Layout(tp=2, pp=2, sp=True)
    pool.run(trained, one, config(one, "straight"))
    pool.run(trained, one, config(one, "parted", exit_interval=2))
    pool.run(trained, other, config(other, "parted"))
    weights = {}
    for name, layout in (("straight", one), ("parted", other)):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 4
        for record in map(json.loads, lines):
            for part in ("encoder", "connector", "decoupled"):  # lr is 1e-3
                expected = record["learning_rate"] * RATES[f"{part}_lr"] / 1e-3
                assert record[f"learning_rate_{part}"] == pytest.approx(expected)
        shards = pool.run(loaded, layout, config(layout, name))
        weights[name] = whole_tensors(shards)
    for key, weight in weights["straight"].items():
        if not key.endswith("k_proj.bias"):
            assert relative_distance(weights["parted"][key], weight) < 1e-4, key


def loaded(layout, config):
    """Job: the weights of a run's last checkpoint."""
    with synthetic_data():
        return student_shards(train.setup(config))


def test_a_run_goes_on_with_other_rates_and_betas(pool, assets, tmp_path):
    """A checkpoint written without rates of their own: the run that continues it has the groups of its settings."""
    layout = Layout()
    config = make_config(assets, tmp_path / "run", layout, train_iters=4, freeze=(), exit_interval=2)
    pool.run(trained, layout, config)
    (groups,) = pool.run(groups_of, layout, config.replace(connector_lr=3e-3, adam_beta1=0.5))
    assert sorted(group["lr_mult"] for group in groups) == [1.0, 1.0, pytest.approx(3.0), pytest.approx(3.0)]
    assert {(group["step"], group["betas"][0]) for group in groups} == {(2, 0.5)}


def groups_of(layout, config):
    """Job: the optimizer's groups after a start, without their parameters."""
    with synthetic_data():
        groups = train.setup(config).optimizer.param_groups
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]
