"""Every kind of encoder gives the same numbers under tensor and pipeline parallelism as in one process, frozen and
trained; those of native resolution on images of several sizes. (SigLIP: `test_layout_invariance`.)

Three steps of eight packs in fp32, LaVer on. The bands are those of `test_layout_invariance`, for the same reasons.
"""

from dataclasses import replace

import pytest
import torch

from laver_megatron import train
from laver_megatron.encoders import read_encoder
from tests.distributed.build import (
    assert_same_bits,
    gradient_shards,
    make_config,
    make_trainer,
    relative_distance,
    snapshot,
    student_shards,
    synthetic_data,
    whole_tensors,
)
from tests.distributed.encoders import KINDS, NATIVE, save_encoder
from tests.distributed.harness import Layout

NUM_STEPS = 2
TERMS = ("lm_loss", "mim_loss", "gram_loss", "loss", "grad_norm")
# (is frozen, layout)
COVERED = [(False, Layout(tp=2)), (True, Layout(pp=2))]
# Divided as CLIP's is, with a class token and layers whose hidden states are taken.
LIKE_CLIP = ("dinov2_with_registers", "aimv2")
CASES = [
    pytest.param(
        kind,
        is_frozen,
        layout,
        marks=pytest.mark.slow(reason="trained at TP2 x DP2 and PP2, and frozen at TP2, it has met every division")
        if kind != "patches" and ((is_frozen, layout) in COVERED or (kind in LIKE_CLIP and layout.dp == 1))
        else (),
        id=f"{kind}-{'frozen' if is_frozen else 'trained'}-{layout}",
    )
    for kind in KINDS
    for is_frozen in (True, False)
    for layout in (Layout(tp=2), Layout(pp=2), Layout(tp=2, dp=2))
    # Of plain patches nothing can be frozen; and what is frozen has nothing to sum over replicas.
    if not (kind == "patches" and not is_frozen) and not (is_frozen and kind != "patches" and layout.dp > 1)
]


def run(layout, config):
    """Job: two steps; their numbers, the first gradient, the weights before and after."""
    trainer = make_trainer(config)
    before, gradients, prepare = student_shards(trainer), [], trainer.optimizer.prepare_grads

    def prepare_and_note():
        if not gradients:
            gradients.extend(gradient_shards(trainer))
        return prepare()

    trainer.optimizer.prepare_grads = prepare_and_note
    records = [train.train_step(trainer) for _ in range(NUM_STEPS)]
    numbers = [[record[name] for name in TERMS] for record in records]
    return {
        "numbers": numbers,
        "gradients": gradients,
        "before": before,
        "after": student_shards(trainer),
        "layer": trainer.config.model.encoder_feature_layer,
    }


@pytest.fixture(scope="module")
def config_of(assets, tmp_path_factory):
    """config_of(kind, is_frozen, layout, run directory)"""
    directory = tmp_path_factory.mktemp("encoders")
    for kind in KINDS:
        save_encoder(directory / kind, kind)

    def config_of_(kind, is_frozen, layout, run_dir="unused", **changes):
        return make_config(
            replace(assets, encoder=directory / kind),
            run_dir,
            layout,
            data_path=("grids" if kind in NATIVE else "packs",),
            freeze=("encoder",) if is_frozen else (),
            micro_batch_size=2,
            lr=3e-4,
            adam_eps=1e-4,  # else gradients that are rounding alone, as of the biases of keys, would become whole steps
            **changes,
        )

    return config_of_


@pytest.fixture(scope="module")
def launch(pool, config_of):
    """launch(kind, is_frozen, layout) -> results of all ranks."""
    return lambda kind, is_frozen, layout: pool.run(run, layout, config_of(kind, is_frozen, layout))


@pytest.fixture(scope="module")
def reference(launch):
    found = {}

    def of(kind, is_frozen):
        if (kind, is_frozen) not in found:
            found[kind, is_frozen] = launch(kind, is_frozen, Layout())
        return found[kind, is_frozen]

    return of


@pytest.mark.parametrize("kind, is_frozen, layout", CASES)
def test_layouts_agree(launch, reference, kind, is_frozen, layout):
    results, expected = launch(kind, is_frozen, layout), reference(kind, is_frozen)
    for result in results:
        torch.testing.assert_close(
            torch.tensor(result["numbers"]), torch.tensor(expected[0]["numbers"]), rtol=1e-5, atol=0
        )
    gradients = whole_tensors([result["gradients"] for result in results], rtol=1e-5)
    wanted = whole_tensors([result["gradients"] for result in expected])
    assert gradients.keys() == wanted.keys()
    least = 1e-6 * expected[0]["numbers"][0][TERMS.index("grad_norm")]
    has_gradient = {key: bool(gradient.norm() > least) for key, gradient in wanted.items()}
    for key, gradient in gradients.items():
        if has_gradient[key]:
            assert relative_distance(gradient, wanted[key]) <= 1e-5, key
        else:
            assert gradient.norm() <= least, key
    before, after = (whole_tensors([result[when] for result in results], rtol=1e-5) for when in ("before", "after"))
    wanted_after = whole_tensors([result["after"] for result in expected])
    for key, start in before.items():
        if key.startswith("encoder.") and is_frozen:
            assert torch.equal(after[key], start), key
        elif has_gradient[key]:
            assert relative_distance(after[key] - start, wanted_after[key] - start) <= 1e-3, key


@pytest.mark.parametrize("kind", KINDS)
def test_what_trains(reference, kind):
    """A trained encoder's gradients reach its patch embedding; a frozen one has none, and the connector always has."""
    for is_frozen in {True, kind == "patches"}:
        gradients = whole_tensors([result["gradients"] for result in reference(kind, is_frozen)])
        of_encoder = [key for key in gradients if key.startswith("encoder.")]
        assert bool(of_encoder) == (kind != "patches")
        assert any(gradients[key].any() for key in of_encoder) != (is_frozen or kind == "patches")
        assert gradients["connector.linear_1.weight"].any()
        embedding = [key for key in of_encoder if "patch_embed" in key]
        assert is_frozen or all(gradients[key].any() for key in embedding)


def test_the_layer_that_is_taken(reference):
    """What a run writes down is the layer, and not that nobody chose one."""
    assert {kind: reference(kind, True)[0]["layer"] for kind in KINDS} == {
        "clip": -2,
        "dinov2_with_registers": -1,
        "aimv2": -1,
        "qwen2_5_vl": None,
        "patches": None,
    }


def train_on(layout, config):
    """Job: `train` from wherever the run directory stands; this rank's state afterwards."""
    with synthetic_data():
        trainer = train.setup(config)
        train.train(trainer)
    return snapshot(trainer)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "patches"])
def test_four_steps_are_two_and_two(pool, config_of, tmp_path, kind):
    """A checkpoint brings its encoder, also one without weights; and --finetune starts from it."""
    layout = Layout(tp=2)

    def config(name, **changes):
        return config_of(kind, False, layout, tmp_path / name, train_iters=4, **changes)

    straight = pool.run(train_on, layout, config("straight"))
    pool.run(train_on, layout, config("parted", exit_interval=2))
    parted = pool.run(train_on, layout, config("parted"))
    for state, wanted in zip(parted, straight, strict=True):
        assert_same_bits(state, wanted)
    written = tmp_path / "parted" / "checkpoints" / "iter_0000004" / "encoder" / "config.json"
    assert read_encoder(written.parent).is_native
    tuned = config("tuned", exit_interval=1).replace(
        load=str(tmp_path / "parted" / "checkpoints"), encoder=None, finetune=True
    )
    assert all(len(state) > 10 for state in pool.run(train_on, layout, tuned))
