"""Weight decay moves what a trained encoder's features depend on, and nothing else of it."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from laver_megatron import train
from laver_megatron.encoders import encoder_tensor_sizes, idle_parameters, read_encoder
from laver_megatron.encoders.transformer import TransformerFamily
from tests.distributed.build import (
    make_config,
    make_trainer,
    moment_shards,
    student_shards,
    synthetic_data,
    whole_tensors,
)
from tests.distributed.encoders import KINDS, NATIVE, save_encoder
from tests.distributed.harness import Layout

FOUR = Layout(tp=2, dp=2)
ALIKE = pytest.mark.slow(reason="kinds with idle parameters are as siglip, those without as qwen")
# Its gradient is rounding alone where positions are not rotary.
KEY_BIASES = ("k_proj.bias", "key.bias")


def three_steps(layout, config):
    """Job: the weights before and after."""
    trainer = make_trainer(config)
    before = student_shards(trainer)
    for _ in range(3):
        train.train_step(trainer)
    return before, student_shards(trainer)


@pytest.mark.parametrize(
    "kind, layout, bf16",
    [
        *(pytest.param(kind, Layout(), False, id=f"{kind}-one") for kind in ("siglip", *KINDS)),
        *(pytest.param(kind, FOUR, True, id=f"{kind}-four-bf16") for kind in ("siglip", "qwen2_5_vl")),
        *(
            pytest.param(kind, FOUR, True, id=f"{kind}-four-bf16", marks=ALIKE)
            for kind in KINDS
            if kind != "qwen2_5_vl"
        ),
    ],
)
def test_what_features_do_not_depend_on_stands_still(pool, assets, tmp_path, kind, layout, bf16):
    encoder = assets.encoder
    if kind != "siglip":
        encoder = tmp_path / kind
        save_encoder(encoder, kind)
    config = make_config(
        replace(assets, encoder=encoder),
        "unused",
        layout,
        data_path=("grids" if kind in NATIVE else "packs",),
        freeze=(),
        weight_decay=0.1,
        bf16=bf16,
        lr=1e-2,  # a step that bf16 shows
    )
    results = pool.run(three_steps, layout, config)
    before, after = (whole_tensors([result[i] for result in results], rtol=1e-5) for i in range(2))
    idle = set(idle_parameters(read_encoder(encoder), encoder_tensor_sizes(encoder), None))
    assert bool(idle) == (kind not in ("qwen2_5_vl", "patches"))
    for key, start in before.items():
        if key.removeprefix("encoder.model.") in idle:
            assert torch.equal(after[key], start), key
        elif not key.endswith(KEY_BIASES):
            assert not torch.equal(after[key], start), key


def write(layout, config):
    """Job: as versions wrote it that trained all parameters of an encoder; moments of the optimizer."""
    with mock.patch.object(TransformerFamily, "is_idle", lambda *_: False), synthetic_data():
        trainer = train.setup(config)
        train.train(trainer)
    return student_shards(trainer), moment_shards(trainer, "exp_avg"), moment_shards(trainer, "exp_avg_sq")


def load(layout, config):
    """Job: what a run begins with, and a step."""
    trainer = make_trainer(config)
    begins = student_shards(trainer), moment_shards(trainer, "exp_avg"), moment_shards(trainer, "exp_avg_sq")
    train.train_step(trainer)
    return *begins, student_shards(trainer)


def test_a_checkpoint_in_which_all_parameters_trained(pool, assets, tmp_path):
    """It loads: what trains goes on as it was, the rest stays where the checkpoint has it."""
    config = make_config(assets, tmp_path, Layout(), freeze=(), weight_decay=0.1, exit_interval=2)
    wrote = [whole_tensors([shards]) for shards in pool.run(write, Layout(), config)[0]]
    results = pool.run(load, FOUR, config.replace(**FOUR.settings))
    found = [whole_tensors([result[i] for result in results], rtol=1e-5) for i in range(4)]
    names = idle_parameters(read_encoder(assets.encoder), encoder_tensor_sizes(assets.encoder), None)
    idle = {f"encoder.model.{name}" for name in names}
    for key, weight in wrote[0].items():
        assert torch.equal(found[0][key], weight), key
        for moment, then in zip(found[1:3], wrote[1:], strict=True):
            # The distributed optimizer keeps no moments of what does not train.
            assert torch.equal(moment[key], torch.zeros_like(weight) if key in idle else then[key]), key
        if key in idle or not key.endswith(KEY_BIASES):
            assert torch.equal(found[3][key], weight) == (key in idle), key


def test_a_layer_further_down_is_refused(pool, assets, tmp_path):
    """Of its parameters the checkpoint has no moments."""
    config = make_config(assets, tmp_path, Layout(), freeze=(), exit_interval=1, encoder_feature_layer=1)
    pool.run(written_by, Layout(), config)
    (refused,) = pool.run(refusal, Layout(), config.replace(encoder_feature_layer=2, exit_interval=2))
    assert "lacks 48 of the tensors" in refused and "--encoder-feature-layer further down" in refused


def written_by(layout, config):
    """Job: trains."""
    with synthetic_data():
        train.train(train.setup(config))


def refusal(layout, config):
    """Job: the error of the setup."""
    with pytest.raises(ValueError) as caught:
        make_trainer(config)
    return str(caught.value)
