"""The bytes that the planner computes and a dry run counts are those of the ranks of real runs, each and exactly."""

import pytest

from laver_megatron.encoders import encoder_tensor_sizes, read_encoder
from laver_megatron.hf.shape import read_model_shape
from laver_megatron.planning.dry_run import dry_run, state_bytes
from laver_megatron.planning.memory import state_of_rank
from tests.distributed.build import make_config, make_trainer
from tests.distributed.harness import Layout

RUNS = [
    (Layout(tp=2, dp=2, sp=True), {"bf16": True, "mim_target": "features", "centre_momentum": None}),
    (Layout(tp=2, pp=2, sp=True), {"bf16": True, "freeze": ()}),
    (Layout(pp=2, vpp_layers=1, dp=2), {"bf16": True}),
    (Layout(dp=4), {"freeze": ("encoder", "decoder")}),
    (Layout(pp=2, first_layers=1, dp=2), {"freeze": ()}),
    (Layout(pp=2, dp=2), {"freeze": ("encoder", "decoder"), "laver": False, "bf16": True}),
    (Layout(tp=4), {"laver": False}),
    (Layout(), {"mim_target": "pixels", "centre_momentum": None}),
]


def measure(layout, config):
    """Job: what this rank holds after setup."""
    trainer = make_trainer(config)
    return state_bytes(trainer.stages, trainer.chunks, trainer.optimizer, trainer.teacher)


# Only a last stage holds a head of its own.
WITH_A_HEAD = RUNS[1:3]
ALIKE = pytest.mark.slow(reason="the head's own bytes are there at two divisions of the pipeline")


@pytest.mark.parametrize(
    "layout, settings, tied",
    [
        *((*run, True) for run in RUNS),
        *(pytest.param(*run, False, marks=() if run in WITH_A_HEAD else ALIKE) for run in RUNS),
    ],
    ids=str,
)
def test_bytes_of_a_real_run(pool, assets, tmp_path, layout, settings, tied):
    model = assets.tied if tied else assets.untied
    config = make_config(assets, tmp_path, layout, load=f"hf:{model}", **settings)
    measured = pool.run(measure, layout, config)
    run = dry_run(config, read_model_shape(model), assets.encoder, layout.world_size)
    assert run.problems == ()
    # Megatron numbers ranks with TP innermost, then DP, then PP.
    reports = sorted(run.ranks, key=lambda rank: (rank.stage, rank.dp_rank, rank.tp_rank))
    assert [report.bytes for report in reports] == measured
    of_encoder = read_encoder(assets.encoder), encoder_tensor_sizes(assets.encoder)
    planned = [
        state_of_rank(config, read_model_shape(model), *of_encoder, layout.dp, report.stage, report.dp_rank)
        for report in reports
    ]
    assert planned == measured
    assert all(held.weights > 0 for held in measured)
