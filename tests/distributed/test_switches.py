"""Switches that need more than one process and that no other file of this folder shows."""

import pytest

from laver_megatron.objective.micro_batch import TERMS
from laver_megatron.train import train_step
from tests.distributed.build import make_config, make_trainer
from tests.distributed.harness import Layout


def run(layout, config):
    """Job: (layers of the student and of the teacher on this rank, numbers of the first step)."""
    trainer = make_trainer(config)
    (stage,) = trainer.stages
    record = train_step(trainer)
    numbers = {name: record[name] for name in (*TERMS, "grad_norm")}
    return len(stage.decoder.layers), len(stage.teacher.decoder.layers), numbers


def test_the_last_stage_takes_the_layers_it_is_told(pool, assets):
    """Three layers and one instead of two and two; the numbers are those of the even split."""
    layout = Layout(pp=2)
    even = pool.run(run, layout, make_config(assets, "unused", layout))
    uneven = pool.run(run, layout, make_config(assets, "unused", layout, decoder_last_pipeline_num_layers=1))
    assert [result[:2] for result in even] == [(2, 2), (2, 2)]
    assert [result[:2] for result in uneven] == [(3, 3), (1, 1)]
    for result in uneven:
        assert result[2] == pytest.approx(even[0][2], rel=1e-5)
