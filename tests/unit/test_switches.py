"""Every field of `Config` changes what it says and nothing else.

A run of two steps is taken apart into named pieces (`tests.switches`): what it started from, masks, hidden states
by kind of position, logits, the numbers of its record, gradients, moments and new weights by part, the teacher.
SWITCHES says for each setting which pieces it changes; all others stay the same to the last bit. The tests below
the table say by how much. The last test asks that no field is forgotten.
"""

import datetime
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import SiglipVisionModel

from laver_megatron import train
from laver_megatron.config.checks import validate
from laver_megatron.config.command_line import load_config
from laver_megatron.config.fields import PRESETS, Config, all_fields
from laver_megatron.config.modules import MODULES
from laver_megatron.data.batch import run_data
from laver_megatron.data.plan.plan import PackPlan
from laver_megatron.data.plan.sizes import SampleSizes
from laver_megatron.hf.shape import read_model_shape
from laver_megatron.model.attention import SpanAttention, _made
from laver_megatron.model.flash_attention import flash_plans
from laver_megatron.objective.language import IGNORE_LABEL
from laver_megatron.objective.masking import mask_visual_tokens
from laver_megatron.objective.micro_batch import TERMS
from laver_megatron.runtime.backend import shut_down_parallelism
from tests.distributed.build import IMAGES, PACKS_PER_STEP, SEQ_LENGTH, VISUAL_SEQ_LENGTH, make_assets, make_config
from tests.distributed.harness import Layout
from tests.switches import (
    NUM_STEPS,
    NUMBERS,
    PARTS,
    Run,
    averaged,
    changed,
    of_images,
    part_of,
    positions_of,
    run,
    stepped,
    trained,
    trainer_of,
)
from tests.varlen import plain_varlen  # noqa: F401

TESTS = Path(__file__).parents[1]
LANGUAGE = ("encoder", "connector", "embedding", "decoder")  # parts under the language loss
VISUAL = ("encoder", "connector", "decoder", "vision_head", "mask_token")  # and under the visual ones
NUM_TOKENS = 9  # of an image
NUM_IMAGES = 7  # of the first step
# fp32 numbers that are the same but for the order of sums.
ROUNDING = 1e-5

# --- the table -----------------------------------------------------------------------------------------

OF_LOSS = {"loss", "grad_norm"}
OF_STUDENT = {"student logits", "student_visual_similarity", "mim_loss", "gram_loss", *OF_LOSS}
OF_TEACHER = {"teacher logits", "teacher_visual_similarity", "teacher_entropy", "mim_loss", "gram_loss", *OF_LOSS}
OF_IMAGES = {"images", "text after", "lm_loss"}
EVERY_OUTPUT = OF_STUDENT | OF_TEACHER | OF_IMAGES | trained(*PARTS)


@dataclass(frozen=True)
class Switch:
    """Settings beside BASE, the pieces of the first step that they change, and, where the first step does not
    show it all, those of the second."""

    settings: dict
    first: set
    second: set | None = None

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())


SWITCHES = (
    # Text sees no difference unless it follows an image; the reconstruction stream is always bidirectional.
    Switch({"attention": "causal"}, OF_IMAGES | OF_LOSS | trained(*LANGUAGE)),
    Switch({"positions": "1d"}, EVERY_OUTPUT),
    Switch({"positions": "mrope"}, EVERY_OUTPUT),
    Switch({"encoder_feature_layer": -1}, EVERY_OUTPUT),
    Switch({"encoder_feature_layer": 0}, EVERY_OUTPUT),
    # Masks change what the student sees of images, not the teacher, not the language stream.
    Switch({"mask_ratio": 0.7}, {"mask_ratio", "masks", "num_masked_tokens"} | OF_STUDENT | trained(*VISUAL)),
    Switch(
        {"mask_ratio_schedule": "cosine"}, {"mask_ratio", "masks", "num_masked_tokens"} | OF_STUDENT | trained(*VISUAL)
    ),
    Switch({"mask_sampling": "bernoulli"}, {"masks", "num_masked_tokens"} | OF_STUDENT | trained(*VISUAL)),
    # The teacher's path changes; the student follows it one step later, its language stream another one.
    Switch(
        {"ema_momentum": 0.5},
        {"ema_momentum"} | averaged(*PARTS),
        {"ema_momentum"} | OF_TEACHER | trained(*VISUAL),
    ),
    Switch(
        {"ema_momentum_schedule": "cosine"},
        {"ema_momentum"} | averaged(*PARTS),
        {"ema_momentum"} | OF_TEACHER | trained(*VISUAL),
    ),
    Switch({"ema_interval": 2}, averaged(*PARTS), OF_TEACHER | trained(*VISUAL)),
    Switch({"ema_interval": 0.5}, averaged(*PARTS), OF_TEACHER | trained(*VISUAL)),
    # The composition of the loss.
    Switch({"mim_weight": 2.0}, OF_LOSS | trained(*VISUAL)),
    Switch({"mim_weight": 0.0}, OF_LOSS | trained(*VISUAL)),
    Switch({"gram_weight": 2.0}, OF_LOSS | trained(*VISUAL)),
    Switch({"gram_weight": 0.0}, OF_LOSS | trained(*VISUAL)),
    Switch({"gram_loss": "ga"}, {"gram_loss"} | OF_LOSS | trained(*VISUAL)),
    Switch({"gram_loss": "none"}, {"gram_loss"} | OF_LOSS | trained(*VISUAL)),
    Switch({"gram_reduction": "sum"}, {"gram_loss"} | OF_LOSS | trained(*VISUAL)),
    Switch({"student_temperature": 0.2}, {"mim_loss"} | OF_LOSS | trained(*VISUAL)),
    Switch({"teacher_temperature": 0.08}, {"mim_loss", "teacher_entropy"} | OF_LOSS | trained(*VISUAL)),
    # The centre of a step is used from the next on.
    Switch(
        {"centre_momentum": 0.9},
        {"centre"},
        {"centre", "mim_loss", "teacher_entropy"} | OF_LOSS | trained(*VISUAL),
    ),
    Switch({"vision_head_hidden_size": 48}, {"start of vision_head"} | OF_STUDENT | OF_TEACHER | trained(*VISUAL)),
    Switch({"vision_head_output_size": 48}, {"start of vision_head"} | OF_STUDENT | OF_TEACHER | trained(*VISUAL)),
    # Another head for another target; the same head against another measure.
    Switch({"mim_target": "features"}, {"start of vision_head"} | OF_STUDENT | OF_TEACHER | trained(*VISUAL)),
    Switch({"mim_target": "pixels"}, {"start of vision_head"} | OF_STUDENT | OF_TEACHER | trained(*VISUAL)),
    Switch({"mim_loss": "smooth-l1"}, {"mim_loss"} | OF_LOSS | trained(*VISUAL)),
    # The optimizer: the same gradients, other steps.
    Switch({"lr": 5e-4}, {"learning_rate"} | stepped(*PARTS)),
    Switch({"min_lr": 5e-4}, set(), {"learning_rate"} | stepped(*PARTS)),
    Switch({"lr_warmup_iters": 2}, {"learning_rate"} | stepped(*PARTS)),
    # The first step is at the whole rate whatever the style.
    Switch({"lr_decay_style": "linear"}, set(), {"learning_rate"} | stepped(*PARTS)),
    Switch({"lr_decay_style": "constant"}, set(), {"learning_rate"} | stepped(*PARTS)),
    Switch(
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4, "lr_wsd_decay_style": "minus_sqrt"},
        set(),
        {"learning_rate"} | stepped(*PARTS),
    ),
    Switch({"weight_decay": 0.1}, stepped(*PARTS) - {"new mask_token"}),
    Switch({"adam_beta1": 0.5}, {f"moments of {part}" for part in PARTS} | stepped(*PARTS)),
    Switch({"adam_beta2": 0.5}, {f"moments of {part}" for part in PARTS} | stepped(*PARTS)),
    Switch({"adam_eps": 1e-2}, stepped(*PARTS)),
    Switch({"clip_grad": 1.0}, {f"moments of {part}" for part in PARTS} | stepped(*PARTS)),
    Switch({"clip_grad": 0.3}, {f"moments of {part}" for part in PARTS} | stepped(*PARTS)),
    # New parameters and masks; what was loaded stays. (The data's order: test_the_data_is_told.)
    Switch(
        {"seed": 1},
        {f"start of {part}" for part in ("connector", "vision_head", "mask_token")} | {"masks"} | EVERY_OUTPUT,
    ),
    Switch({"recompute_granularity": "full"}, set(), set()),
    Switch({"recompute_granularity": "selective"}, set(), set()),
    Switch({"recompute_granularity": "selective", "recompute_modules": ("mlp",)}, set(), set()),
    # Rates of parts: the same gradients, other steps of these parts alone.
    Switch({"encoder_lr": 5e-4}, stepped("encoder")),
    Switch({"connector_lr": 5e-4}, stepped("connector")),
    Switch({"decoupled_lr": 5e-4}, stepped("embedding")),
    Switch({"freeze": ("encoder",)}, {"grad_norm"} | trained("encoder")),
    Switch({"freeze": ("connector",)}, {"grad_norm"} | trained("connector")),
    Switch({"freeze": ("decoder",)}, {"grad_norm"} | trained("embedding", "decoder")),
    Switch({"freeze": ("heads",)}, {"grad_norm"} | trained("vision_head", "mask_token")),
)

SHOWN: set[str] = {name for switch in SWITCHES for name in switch.settings}


def shows(*names):
    """Marks a test as the one that shows what a field does."""
    SHOWN.update(names)
    return lambda test: test


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def of(assets):
    """Runs by their settings, each made once."""
    runs = {}

    def get(**settings) -> Run:
        key = tuple(sorted(settings.items()))
        if key not in runs:
            runs[key] = run(assets, **settings)
        return runs[key]

    return get


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_a_switch_changes_what_it_says_and_nothing_else(of, switch):
    base, other = of(), of(**switch.settings)
    assert changed(base, other, 0) == switch.first
    if switch.second is not None:
        assert changed(base, other, 1) == switch.second


def test_the_base_is_a_real_run(assets, of):
    """The comparison has something to compare, and two runs of the same settings are the same run."""
    base = of()
    again = run(assets)
    assert all(changed(base, again, step) == set() for step in range(NUM_STEPS))
    assert {part_of(name) for name in base.weights} == set(PARTS)
    record, batch = base.steps[0].record, base.steps[0].batch
    assert all(where_BS.any() for where_BS in positions_of(batch).values())
    assert batch.counts.images == NUM_IMAGES == sum(map(sum, IMAGES[0]))
    assert min(record[name] for name in ("lm_loss", "mim_loss", "gram_loss", "teacher_entropy")) > 1e-3
    assert all(gradient.any() for name, gradient in base.steps[0].gradients.items() if not above_features(name))


def above_features(name):
    """Features are taken before the encoder's last layer."""
    return name.startswith(("encoder.model.encoder.layers.1", "encoder.model.post_layernorm", "encoder.model.head"))


# --- the model -----------------------------------------------------------------------------------------


def test_mixed_attention_shows_at_every_visual_token_that_has_a_later_one(of):
    """Deeper layers carry it to the last token of an image and to the text after it, too."""
    base, causal = of().steps[0], of(attention="causal").steps[0]
    differs_BS = (base.hidden_LBH != causal.hidden_LBH)[:SEQ_LENGTH].any(-1).t()
    kinds = positions_of(base.batch)
    assert differs_BS[kinds["images"] | kinds["text after"]].all()


def test_feature_layers_are_the_encoders_hidden_states(assets, of):
    """0 is the embedding, -1 the last layer before the final norm. The connector's input is told by its gradient:
    layers above the features have none."""
    runs = {0: of(encoder_feature_layer=0), -2: of(), -1: of(encoder_feature_layer=-1)}
    learning = {}
    for layer, it in runs.items():
        names = [name for name, gradient in it.steps[0].gradients.items() if gradient.any()]
        learning[layer] = {".".join(name.split(".")[2:5:2]) for name in names if name.startswith("encoder.model.")}
    embedding = {"embeddings.weight", "embeddings.bias"}
    assert learning == {
        0: embedding,
        -2: embedding | {"encoder.0"},
        -1: embedding | {"encoder.0", "encoder.1"},
    }

    reference = SiglipVisionModel.from_pretrained(assets.encoder).eval()
    pixels = torch.randn(1, 3, reference.config.image_size, reference.config.image_size)
    embedding = reference.embeddings if hasattr(reference, "embeddings") else reference.vision_model.embeddings
    with trainer_of(assets, encoder_feature_layer=0) as trainer, torch.no_grad():
        assert torch.equal(trainer.stages[0].encoder(list(pixels)), embedding(pixels)[0])


@pytest.mark.parametrize("module", MODULES)
def test_frozen_modules_stay_and_all_others_move(of, module):
    frozen = {"decoder": ("embedding", "decoder"), "heads": ("vision_head", "mask_token")}.get(module, (module,))
    it = of(freeze=(module,))
    for name, start in it.weights.items():
        stays = part_of(name) in frozen or above_features(name)
        assert torch.equal(it.steps[-1].weights[name], start) == stays, name
    for name, start in it.teacher.items():
        assert torch.equal(it.steps[-1].teacher[name], start) == (part_of(name) in frozen), name
    assert not any(part_of(name) in frozen for name in it.steps[0].moments)


def test_by_default_the_encoder_is_frozen():
    assert Config.of(data_path=(), seq_length=1, visual_seq_length=1, train_iters=1, run_dir="").model.freeze == (
        "encoder",
    )


@shows("attention_kernel")
def test_kernels_agree(assets, plain_varlen):  # noqa: F811
    """`flex` has no backward on the CPU: the forward pass alone. `flash` has none, so it is written out. `auto` is
    `dense` here."""
    terms = {}
    for kernel in ("dense", "flex", "flash", "auto"):
        with trainer_of(assets, attention_kernel=kernel) as trainer, torch.no_grad():
            (stage,) = trainer.stages
            kernels = {module.kernel for module in stage.modules() if isinstance(module, SpanAttention)}
            assert kernels == {"dense" if kernel == "auto" else kernel}
            stage.eval()
            batch = trainer.training_data.at(0, mask_ratio=0.4, step=0)
            terms[kernel] = train.run_schedule(trainer, batch, forward_only=True)
            assert all(make is not flash_plans for make, *_ in _made), "a layer had to wait for the device"
    for kernel in ("flex", "flash"):
        torch.testing.assert_close(terms[kernel], terms["dense"], rtol=ROUNDING, atol=0)
    assert torch.equal(terms["auto"], terms["dense"])


@pytest.mark.parametrize(
    "granularity, modules, again",
    [
        (None, None, set()),
        ("full", None, {"attention", "mlp", "norms"}),
        ("selective", None, {"attention"}),
        ("selective", ("layernorm", "mlp"), {"mlp", "norms"}),
        ("selective", ("core_attn", "layernorm"), {"attention", "norms"}),
    ],
)
def test_recompute_runs_again_what_it_says(assets, granularity, modules, again):
    calls = Counter()
    with trainer_of(assets, recompute_granularity=granularity, recompute_modules=modules) as trainer:
        (stage,) = trainer.stages
        for owner, decoder in (("student", stage.decoder), ("teacher", stage.teacher.decoder)):
            for layer in decoder.layers:
                parts = {"attention": layer.self_attention.core_attention, "mlp": layer.mlp}
                for name, module in (parts | {"norms": layer.input_layernorm}).items():
                    module.register_forward_hook(lambda *_, key=(owner, name): calls.update([key]))
        train.train_step(trainer)
        num_layers = stage.shape.num_layers
    assert calls == {
        (owner, name): num_layers * (2 if owner == "student" and name in again else 1)
        for owner in ("student", "teacher")
        for name in ("attention", "mlp", "norms")
    }


def test_recomputed_norms_change_rounding_alone(of):
    """The gradient of a norm's input is summed in another order."""
    base, other = of().steps, of(recompute_granularity="selective", recompute_modules=("layernorm", "mlp")).steps
    for one, two in zip(base, other, strict=True):
        assert two.record["grad_norm"] == pytest.approx(one.record["grad_norm"], rel=1e-5)
        for name, gradient in one.gradients.items():
            tolerance = ROUNDING * float(gradient.norm()) + 1e-6 * one.record["grad_norm"]
            assert float((two.gradients[name] - gradient).norm()) <= tolerance, name


@shows("bf16")
def test_bf16_computes_in_bfloat16_with_fp32_masters(of):
    """The same start, rounded; the same data and masks; losses within bf16's three digits, and a teacher whose
    average moves although one step of it is below the resolution of bf16."""
    base, half = of(), of(bf16=True)
    assert {w.dtype for w in half.weights.values()} == {w.dtype for w in half.teacher.values()} == {torch.bfloat16}
    assert all(torch.equal(half.weights[name], start.bfloat16()) for name, start in base.weights.items())
    assert {g.dtype for g in half.steps[0].gradients.values()} == {torch.float32}
    assert {m.dtype for pair in half.steps[0].moments.values() for m in pair.values()} == {torch.float32}
    assert torch.equal(base.steps[0].batch.masked[0], half.steps[0].batch.masked[0])
    for name in ("lm_loss", "mim_loss", "teacher_entropy", "grad_norm"):
        values = half.steps[0].record[name], base.steps[0].record[name]
        assert values[0] != values[1] and values[0] == pytest.approx(values[1], rel=0.1), name


# --- masks and losses ----------------------------------------------------------------------------------


def masked_of_images(it):
    return [int(number) for number in of_images(it, lambda student, teacher, masked_N: masked_N.sum())]


def test_mask_settings_set_the_number_of_masked_tokens(of):
    assert masked_of_images(of().steps[0]) == [3] * NUM_IMAGES  # floor(0.4 * 9)
    assert masked_of_images(of(mask_ratio=0.7).steps[0]) == [6] * NUM_IMAGES
    numbers = masked_of_images(of(mask_sampling="bernoulli").steps[0])
    assert len(set(numbers)) > 1 and sum(numbers) == of(mask_sampling="bernoulli").steps[0].record["num_masked_tokens"]
    rising = of(mask_ratio_schedule="cosine").steps
    assert [it.record["num_masked_tokens"] for it in rising] == [0, 0]  # floor(0.4 (1 - cos(pi / 4)) / 2 * 9) = 0
    assert [it.record["mask_ratio"] for it in rising] == pytest.approx([0, 0.2 * (1 - math.cos(math.pi / 4))])
    assert rising[0].record["mim_loss"] == 0 == masked_of_images(rising[0])[0]
    # Nothing hidden, and a teacher that is the student: their Gram matrices differ by rounding.
    assert rising[0].record["gram_loss"] < 1e-10


def masks_of(config, batch, step, mask_ratio):
    (packs,) = batch.packs
    return mask_visual_tokens(
        packs.image_BS, packs.sample_id_BS, packs.image_number_BS, mask_ratio=mask_ratio,
        sampling=config.objective.mask_sampling, seed=config.training.seed, step=step,
    )  # fmt: skip


@pytest.mark.parametrize("sampling", ["fixed", "bernoulli"])
def test_every_step_draws_masks_of_its_own(assets, sampling):
    """Three steps, the last two on the same packs: an image that is seen again gets other masks."""
    with trainer_of(assets, mask_sampling=sampling) as trainer:
        batches, at = [], trainer.training_data.at
        trainer.training_data.at = lambda *args, **kwargs: batches.append(at(*args, **kwargs)) or batches[-1]
        for step in range(3):
            trainer.progress.consumed_packs = PACKS_PER_STEP * min(step, 1)
            train.train_step(trainer)
        for step, batch in enumerate(batches):
            (masked_BS,) = batch.masked
            assert torch.equal(masked_BS, masks_of(trainer.config, batch, step, 0.4)) and masked_BS.any()
    (first,), (second,) = (batch.packs for batch in batches[1:])
    assert torch.equal(first.sample_id_BS, second.sample_id_BS)
    for b, image_S in enumerate(first.image_BS):
        for image in image_S[image_S >= 0].unique():
            one, other = (batch.masked[0][b][image_S == image].tolist() for batch in batches[1:])
            assert one != other or sampling == "bernoulli", "84 ways to hide three of nine tokens, and the same twice"


def expected_mim(it, config):
    """(L_MIM, mean entropy of the teacher) from the step's logits, fp64, with the centre at 0."""

    def of_image(student_NK, teacher_NK, masked_N):
        target_NK = (teacher_NK / config.objective.teacher_temperature).softmax(-1)
        losses_N = -(target_NK * (student_NK / config.objective.student_temperature).log_softmax(-1)).sum(-1)
        entropies_N = -(target_NK * target_NK.clamp(min=1e-300).log()).sum(-1)
        return losses_N[masked_N], entropies_N

    losses, entropies = zip(*of_images(it, of_image), strict=True)
    return float(torch.cat(losses).mean()), float(torch.cat(entropies).mean())


def expected_gram(it, kind, reduction):
    def of_image(student_NK, teacher_NK, masked_N):
        unit_student_NK, unit_teacher_NK = (z / z.norm(dim=-1, keepdim=True) for z in (student_NK, teacher_NK))
        difference_NN = unit_student_NK @ unit_student_NK.T - unit_teacher_NK @ unit_teacher_NK.T
        squares_NN = (difference_NN.clamp(min=0) if kind == "cga" else difference_NN).square()
        return squares_NN.mean() if reduction == "mean" else squares_NN.sum()

    return float(torch.stack(of_images(it, of_image)).mean())


@pytest.mark.parametrize(
    "settings",
    [{}, {"student_temperature": 0.2}, {"teacher_temperature": 0.08}, {"mask_ratio": 0.7}, {"gram_loss": "ga"}]
    + [{"gram_reduction": "sum"}, {"mim_weight": 2.0}, {"gram_weight": 2.0}, {"gram_loss": "none"}],
    ids=str,
)
def test_losses_are_those_of_the_settings(of, settings):
    it = of(**settings)
    record, config = it.steps[0].record, it.config
    mim, entropy = expected_mim(it.steps[0], config)
    assert record["mim_loss"] == pytest.approx(mim, rel=ROUNDING)
    # Mostly sums of numbers near 0, and so less exact than its terms.
    assert record["teacher_entropy"] == pytest.approx(entropy, rel=1e-4)
    gram = (
        expected_gram(it.steps[0], config.objective.gram_loss, config.objective.gram_reduction)
        if config.objective.gram_loss != "none"
        else 0
    )
    assert record["gram_loss"] == pytest.approx(gram, rel=1e-4)
    assert_composition(it)


def assert_composition(it):
    """L = L_LM + w_MIM L_MIM + w_Gram L_Gram at every step."""
    for step in it.steps:
        record = step.record
        visual = it.config.objective.mim_weight * (record["mim_loss"] or 0) + it.config.objective.gram_weight * (
            record["gram_loss"] or 0
        )
        assert record["loss"] == pytest.approx(record["lm_loss"] + visual, rel=1e-6)


@pytest.mark.parametrize("weight", ["mim_weight", "gram_weight"])
def test_gradients_are_linear_in_the_weights(of, weight):
    none, one, two = (it.steps[0].gradients for it in (of(**{weight: 0.0}), of(), of(**{weight: 2.0})))
    grad_norm = of().steps[0].record["grad_norm"]
    for name in one:
        share = one[name] - none[name]
        scale = max(float(two[name].norm()), float(none[name].norm()))
        # Key biases do not move the encoder's softmax: their gradient is rounding alone.
        tolerance = ROUNDING * scale + 1e-7 * grad_norm
        assert float((two[name] - one[name] - share).norm()) <= tolerance, name


def test_without_gram_loss_the_gradients_are_those_of_weight_0(of):
    one, other = of(gram_loss="none").steps[0], of(gram_weight=0.0).steps[0]
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(gradient, other.gradients[name], rtol=ROUNDING, atol=1e-9)
    assert one.record["gram_loss"] == 0 and one.record["student_visual_similarity"] != 0


def test_the_centre_is_an_average_of_the_teachers_logits(assets, of):
    it = of(centre_momentum=0.9)
    centre_K = torch.zeros(1, dtype=torch.float64)
    for step in it.steps:
        mean_K = torch.cat(of_images(step, lambda student, teacher_NK, masked: teacher_NK)).mean(0)
        centre_K = 0.9 * centre_K + 0.1 * mean_K
        torch.testing.assert_close(step.centre_K.double(), centre_K, rtol=ROUNDING, atol=1e-7)
    assert of().steps[0].centre_K is None
    for momentum in (0.9, None):
        with trainer_of(assets, centre_momentum=momentum) as trainer:
            assert (trainer.state.centre is None) == (momentum is None)  # what checkpoints are made of


# --- the teacher ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, momenta",
    [
        ({}, [0.9, 0.9]),
        ({"ema_momentum": 0.5}, [0.5, 0.5]),
        # 1 - 0.1 (1 + cos(pi x)) / 2 at 1/4 and 2/4 of the run
        ({"ema_momentum_schedule": "cosine"}, [1 - 0.05 * (1 + math.cos(math.pi / 4)), 0.95]),
        ({"ema_interval": 2}, [None, 0.9]),
        ({"ema_interval": 0.5}, [None, 0.9]),
    ],
    ids=str,
)
def test_the_teacher_follows_at_its_momentum_and_interval(of, settings, momenta):
    it = of(**settings)
    expected = {name: start.double() for name, start in it.teacher.items()}
    assert all(torch.equal(start, it.weights[name]) for name, start in it.teacher.items())
    for step, momentum in zip(it.steps, momenta, strict=True):
        if momentum is None:
            assert all(torch.equal(step.teacher[name], it.teacher[name]) for name in expected)
            continue
        assert step.record["ema_momentum"] == pytest.approx(momentum)
        for name in expected:
            expected[name] = momentum * expected[name] + (1 - momentum) * step.weights[name].double()
            torch.testing.assert_close(step.teacher[name].double(), expected[name], rtol=1e-6, atol=1e-7)


# --- the optimizer -------------------------------------------------------------------------------------

OPTIMIZER_SETTINGS = [
    {}, {"lr": 5e-4}, {"min_lr": 5e-4}, {"lr_warmup_iters": 2}, {"lr_decay_style": "linear"},
    {"lr_decay_style": "constant"},
    {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4, "lr_wsd_decay_style": "minus_sqrt"},
    {"weight_decay": 0.1}, {"adam_beta1": 0.5},
    {"adam_beta2": 0.5}, {"adam_eps": 1e-2}, {"clip_grad": 1.0}, {"clip_grad": 0.3},
]  # fmt: skip


def expected_rate(step, config):
    if step < config.training.lr_warmup_iters:
        return config.training.lr * (step + 1) / config.training.lr_warmup_iters
    share = (step - config.training.lr_warmup_iters) / (config.training.train_iters - config.training.lr_warmup_iters)
    style = {"WSD": config.training.lr_wsd_decay_style}.get(
        config.training.lr_decay_style, config.training.lr_decay_style
    )
    decay = {
        "cosine": (1 + math.cos(math.pi * share)) / 2,
        "linear": 1 - share,
        "constant": 1,
        "minus_sqrt": 1 - share**0.5,
    }
    return config.training.min_lr + (config.training.lr - config.training.min_lr) * decay[style]


@pytest.mark.parametrize("settings", OPTIMIZER_SETTINGS, ids=str)
def test_weights_follow_adam_at_the_settings(of, settings):
    """AdamW in fp64 on the run's own gradients; only matrices decay. Its steps hardly know how long a gradient is: to
    what norm it was clipped is told by the moments."""
    it = of(**settings)
    config = it.config
    weights = {name: start.double() for name, start in it.weights.items()}
    first, second = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for step, done in enumerate(it.steps):
        norm = torch.cat([g.double().flatten() for g in done.gradients.values()]).norm()
        assert done.record["grad_norm"] == pytest.approx(float(norm), rel=ROUNDING)
        clip = min(1.0, config.training.clip_grad / float(norm)) if config.training.clip_grad else 1.0
        rate = expected_rate(step, config)
        assert done.record["learning_rate"] == pytest.approx(rate, rel=1e-12)
        for name, gradient in done.gradients.items():
            g = gradient.double() * clip
            first[name] = config.training.adam_beta1 * first[name] + (1 - config.training.adam_beta1) * g
            second[name] = config.training.adam_beta2 * second[name] + (1 - config.training.adam_beta2) * g.square()
            for moment, expected in (("exp_avg", first[name]), ("exp_avg_sq", second[name])):
                difference = (done.moments[name][moment].double() - expected).norm()
                assert float(difference) <= ROUNDING * float(expected.norm()), (moment, name)
            m = first[name] / (1 - config.training.adam_beta1 ** (step + 1))
            v = second[name] / (1 - config.training.adam_beta2 ** (step + 1))
            decay = config.training.weight_decay if gradient.dim() > 1 else 0
            weights[name] -= rate * (decay * weights[name] + m / (v.sqrt() + config.training.adam_eps))
            # A thousandth of a step, and rounding of the weight.
            torch.testing.assert_close(
                done.weights[name].double(), weights[name], rtol=1e-6, atol=1e-3 * config.training.lr
            )
    assert config.training.clip_grad == 0 or clip < 0.1, "nothing was clipped"


@pytest.mark.parametrize("beta", ["adam_beta1", "adam_beta2"])
def test_betas_show_after_the_first_step(of, beta):
    """Adam corrects the bias of its first moments: its first step knows no beta but by rounding."""
    base, other = of(), of(**{beta: 0.5})
    for step, is_same in ((0, True), (1, False)):
        for part in PARTS:
            names = [name for name in base.weights if part_of(name) == part]
            moved = [(of_run.steps[step].weights[n] - of_run.weights[n]) for of_run in (base, other) for n in names]
            one, two = (torch.cat([m.flatten() for m in half]) for half in (moved[: len(names)], moved[len(names) :]))
            assert (float((one - two).norm()) <= 1e-3 * float(one.norm())) == is_same, (part, step)


# --- LaVer off, the ablation rows, the presets ---------------------------------------------------------


@shows("laver")
def test_without_laver_a_step_is_plain_language_training(assets, of):
    """No teacher, vision head, [MASK], centre or visual stream; the trajectory is that of LaVer with weights 0."""
    plain, laver = of(laver=False, centre_momentum=0.9), of(mim_weight=0.0, gram_weight=0.0)
    assert {part_of(name) for name in plain.weights} == set(LANGUAGE) and plain.teacher == {}
    with trainer_of(assets, laver=False, centre_momentum=0.9) as trainer:
        assert trainer.teacher is None and trainer.centre is None
        assert not any("teacher" in name or "vision_head" in name for name, _ in trainer.stages[0].named_modules())
    for ours, theirs in zip(plain.steps, laver.steps, strict=True):
        assert ours.hidden_LBH.shape[0] == SEQ_LENGTH
        assert theirs.hidden_LBH.shape[0] == SEQ_LENGTH + VISUAL_SEQ_LENGTH
        assert ours.output.student_logits_TK is None and ours.output.teacher_logits_TK is None
        assert not ours.batch.masked[0].any() and ours.centre_K is None
        of_laver = [name for name in (*TERMS, "mask_ratio", "num_masked_tokens", "ema_momentum") if "loss" not in name]
        assert all(ours.record[name] is None for name in [*of_laver, "mim_loss", "gram_loss"])
        assert ours.record["loss"] == ours.record["lm_loss"] == pytest.approx(theirs.record["lm_loss"], rel=ROUNDING)
        assert ours.record["lm_loss"] == pytest.approx(expected_language_loss(ours), rel=ROUNDING)
        assert ours.record["grad_norm"] == pytest.approx(theirs.record["grad_norm"], rel=ROUNDING)
        for name in ("learning_rate", "num_tokens", "num_samples", "consumed_packs", "visual_token_share"):
            assert ours.record[name] == theirs.record[name], name
        for name, gradient in ours.gradients.items():
            difference = float((gradient - theirs.gradients[name]).norm())
            # Adam's first step takes rounding of gradients that are nearly 0 for whole steps.
            assert difference <= 1e-3 * float(gradient.norm()) + 1e-7 * ours.record["grad_norm"], name


def expected_language_loss(it):
    labels_N = it.batch.packs[0].labels_BS.t().flatten()
    labels_R = labels_N[labels_N != IGNORE_LABEL]
    return float(torch.nn.functional.cross_entropy(it.output.language_logits_RW[: len(labels_R)].double(), labels_R))


MIXED, TWO_D = {"attention": "mixed"}, {"positions": "2d"}
PLAIN = {"laver": False, "attention": "causal", "positions": "1d"}
# Rows of the paper's ablation: (settings, which losses are there).
ABLATIONS = {
    "baseline": (PLAIN, {"lm"}),
    "+ mixed attention": (PLAIN | MIXED, {"lm"}),
    "+ 2D-RoPE": (PLAIN | TWO_D, {"lm"}),
    "both": (PLAIN | MIXED | TWO_D, {"lm"}),
    "both + MIM": (MIXED | TWO_D | {"gram_loss": "none"}, {"lm", "mim"}),
    "both + MIM + GA": (MIXED | TWO_D | {"gram_loss": "ga"}, {"lm", "mim", "gram"}),
    "both + MIM + CGA": (MIXED | TWO_D | {"gram_loss": "cga"}, {"lm", "mim", "gram"}),
}


@pytest.mark.parametrize("row", ABLATIONS)
def test_rows_of_the_ablation_are_configurations(assets, of, row):
    settings, losses = ABLATIONS[row]
    it = of(**settings)
    assert validate(it.config, read_model_shape(assets.tied), world_size=1) == []
    assert_composition(it)
    for step in it.steps:
        assert {name for name in ("lm", "mim", "gram") if step.record[f"{name}_loss"]} == losses
        assert math.isfinite(step.record["grad_norm"])
    for name, gradient in it.steps[0].gradients.items():
        assert gradient.any() or above_features(name), name


def test_rows_of_the_ablation_differ_where_they_should(of):
    """Attention and positions change the language loss, the visual objective only what is learnt from it."""
    first = {row: of(**settings).steps[0].record for row, (settings, _) in ABLATIONS.items()}
    without = [first[row]["lm_loss"] for row in ("baseline", "+ mixed attention", "+ 2D-RoPE", "both")]
    assert len(set(without)) == 4
    with_laver = [first[row] for row in ("both + MIM", "both + MIM + GA", "both + MIM + CGA")]
    assert [record["lm_loss"] for record in with_laver] == pytest.approx([without[-1]] * 3, rel=ROUNDING)
    assert len({record["mim_loss"] for record in with_laver}) == 1
    # Squares of all differences are more than those of the positive ones.
    assert with_laver[1]["gram_loss"] > with_laver[2]["gram_loss"] > with_laver[0]["gram_loss"] == 0


@shows("preset")
def test_presets_are_their_settings(assets, of):
    """A preset gives its values and no others, the command line overrides it, and both run."""
    needed = ["--data-path=x", "--run-dir=x", "--seq-length=8", "--visual-seq-length=8", "--train-iters=9"]
    default = load_config(needed)
    for name, values in PRESETS.items():
        config = load_config([*needed, "--preset", name])
        assert config == default.replace(preset=name, **values)
        assert load_config([*needed, "--preset", name, "--mask-ratio", "0.4"]) == config.replace(mask_ratio=0.4)

    paper = of(**PRESETS["paper"])
    assert len(set(masked_of_images(paper.steps[0]))) > 1 and paper.steps[0].centre_K is None
    assert all(not torch.equal(paper.steps[0].teacher[name], start) for name, start in paper.teacher.items())
    assert_composition(paper)

    # 2% of 100 iterations: the teacher moves at the second step.
    official = of(**PRESETS["official-settings"] | {"mask_ratio": 1.0, "train_iters": 100})
    ratios = [step.record["mask_ratio"] for step in official.steps]
    assert ratios == pytest.approx([0, (1 - math.cos(math.pi / 100)) / 2])
    assert official.steps[0].centre_K is not None and official.steps[0].record["ema_momentum"] > 0.95
    for moved, step in zip((False, True), official.steps, strict=True):
        assert all(torch.equal(step.teacher[name], start) != moved for name, start in official.teacher.items())
    assert_composition(official)


# --- sizes and data ------------------------------------------------------------------------------------


@shows("micro_batch_size")
def test_micro_batches_divide_the_same_step(of):
    base, divided = of().steps, of(micro_batch_size=2).steps
    for one, other in zip(base, divided, strict=True):
        assert len(one.batch.packs) == 1 and len(other.batch.packs) == PACKS_PER_STEP // 2
        assert_same_numbers(one, other)


@shows("visual_seq_length")
def test_visual_slots_beyond_the_tokens_are_without_effect(of):
    base, longer = of().steps, of(visual_seq_length=40).steps
    for one, other in zip(base, longer, strict=True):
        assert other.hidden_LBH.shape[0] == one.hidden_LBH.shape[0] + 40 - VISUAL_SEQ_LENGTH
        assert_same_numbers(one, other)


def assert_same_numbers(one, other):
    for name in NUMBERS:
        # Entropies and Gram losses are small differences of larger numbers.
        assert other.record[name] == pytest.approx(one.record[name], rel=1e-4), name


@shows("global_batch_size")
def test_the_global_batch_counts_packs(of):
    whole, half = of().steps[0], of(global_batch_size=4, micro_batch_size=4).steps[0]
    assert (whole.record["consumed_packs"], half.record["consumed_packs"]) == (8, 4)
    assert torch.equal(half.batch.packs[0].tokens_BS, whole.batch.packs[0].tokens_BS[:4])
    assert torch.equal(half.batch.masked[0], whole.batch.masked[0][:4])
    assert half.record["num_samples"] == sum(map(len, IMAGES[0][:4]))


@shows("model", "encoder", "data_path", "valid_data_path", "seq_length", "num_workers", "distributed_timeout_minutes")
@shows("data_weights", "shuffle_window", "long_samples", "max_bad_fraction")
@shows("shard_cache", "shard_cache_gb", "allow_pipe", "max_image_tokens")
def test_readers_and_processes_are_told(assets, tmp_path):
    """Tokenizer, preprocessor, readers and process group get what the configuration says, by no other way."""
    paths = {"model": tmp_path / "model", "encoder": tmp_path / "encoder"}
    paths["model"].symlink_to(assets.tied)
    paths["encoder"].symlink_to(assets.encoder)
    settings = {"data_path": ("a", "b"), "valid_data_path": ("c",), "num_workers": 3, "seed": 5}
    settings |= {"data_weights": (1.0, 0.5), "shuffle_window": 70}
    settings |= {"long_samples": "drop_turns", "max_bad_fraction": 0.2}
    settings |= {"shard_cache": str(tmp_path / "cache"), "shard_cache_gb": 0.25, "allow_pipe": True}
    settings |= {name: str(path) for name, path in paths.items()}
    settings |= {"max_image_tokens": 100}
    told = {"seq_length": SEQ_LENGTH, "visual_seq_length": VISUAL_SEQ_LENGTH, "seed": 5, "num_workers": 3}
    told |= {"window": 70, "long_samples": "drop_turns", "max_bad_fraction": 0.2, "visual_multiple_of": 1}
    try:
        with (
            mock.patch.object(run_data, "load_tokenizer") as tokenizer,
            mock.patch.object(run_data, "open_preprocessor") as preprocessor,
            mock.patch.object(run_data, "open_reader") as open_reader,
        ):
            open_reader.return_value.fingerprint = "synthetic"
            train.setup(make_config(assets, "unused", **settings, distributed_timeout_minutes=7))
        tokenizer.assert_called_with(paths["model"])
        preprocessor.assert_called_with(paths["encoder"], 100)
        specs = [call.args[0] for call in open_reader.call_args_list]
        assert [spec.paths for spec in specs] == [("a", "b"), ("c",)]
        assert all(told.items() <= vars(spec).items() for spec in specs)
        assert [spec.weights for spec in specs] == [(1.0, 0.5), None]
        cache = specs[-1].cache
        assert (cache.folder, cache.max_bytes, cache.allow_pipe) == (tmp_path / "cache", 250_000_000, True)
        options = dist.group.WORLD._get_backend(torch.device("cpu")).options
        assert options._timeout == datetime.timedelta(minutes=7)
    finally:
        shut_down_parallelism()


def test_the_seed_orders_the_data():
    plans = [PackPlan([SampleSizes([10] * 40, [0] * 40, [0] * 40)], 64, 32, seed) for seed in (5, 5, 6)]
    orders = [[plan.pack(number) for number in range(plan.num_packs())] for plan in plans]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(sum(orders[0], ())) == sorted(sum(orders[2], ()))


# --- the loop ------------------------------------------------------------------------------------------

LOOPS = {
    # settings: (iterations, saved at, validated at)
    "base": ({}, 4, [4], []),
    "save_interval": ({"save_interval": 3}, 4, [3, 4], []),
    "exit_interval": ({"exit_interval": 3}, 3, [3], []),
    "save_interval_minutes": ({"save_interval_minutes": 1e-9}, 4, [1, 2, 3, 4], []),
    "exit_duration_minutes": ({"exit_duration_minutes": 1e-9}, 1, [1], []),
    "train_iters": ({"train_iters": 2}, 2, [2], []),
    "eval_interval": ({"eval_interval": 2, "valid_data_path": ("other-answers",)}, 4, [4], [2, 4]),
    "eval_interval 3": ({"eval_interval": 3, "valid_data_path": ("other-answers",)}, 4, [4], [3, 4]),
    "profile": ({"profile": True, "profile_step_start": 1, "profile_step_end": 3, "peak_tflops": 2.0}, 4, [4], []),
}


@shows("save_interval", "exit_interval", "eval_interval", "eval_iters", "run_dir", "train_iters")
@shows("log_interval", "tensorboard", "wandb_project", "profile", "profile_step_start", "profile_step_end")
@shows("peak_tflops", "save_interval_minutes", "exit_duration_minutes")
@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_saves_validates_and_ends_when_told(assets, of, tmp_path, name):
    """Nothing of that touches the training: the records are those of the base run."""
    settings, num_iterations, saved, validated = LOOPS[name]
    settings = {"eval_iters": 3, "log_interval": 2, "tensorboard": True, "wandb_project": "p"} | settings
    with (
        trainer_of(assets, str(tmp_path / "run"), **settings) as trainer,
        mock.patch.object(train, "RunLog") as run_log,
        mock.patch.object(train, "save") as save,
    ):
        iterations = []
        save.side_effect = lambda trainer, last: iterations.append((trainer.progress.iteration, last))
        read_at = []
        if trainer.validation_data is not None:
            at = trainer.validation_data.at
            trainer.validation_data.at = lambda *args, **kwargs: read_at.append(args[0]) or at(*args, **kwargs)
        train.train(trainer)
    log = run_log.return_value
    assert iterations == [(iteration, iteration == num_iterations) for iteration in saved]
    assert trainer.saver.directory == tmp_path / "run" / "checkpoints"
    assert (tmp_path / "run" / "config.yaml").read_text() == trainer.config.to_yaml()
    told = ("log_interval", "tensorboard", "wandb_project", "train_iters")
    assert {name: trainer.config.flat()[name] for name in told}.items() <= run_log.call_args.kwargs.items()
    records = [call.args[0] for call in log.log.call_args_list]
    assert [record["iteration"] for record in records] == list(range(1, num_iterations + 1))
    if "train_iters" not in LOOPS[name][0]:  # the schedules end there
        for record, step in zip(records, of().steps, strict=False):
            assert all(record[number] == step.record[number] for number in NUMBERS)
    with_peak = "peak_tflops" in settings
    assert all(
        (record["mfu"] is not None and 0 < record["mfu"] < record["mfu_full_square"]) == with_peak for record in records
    )
    profiles = sorted(path.name for path in (tmp_path / "run").glob("profile/*"))
    assert profiles == (["stage-0.md", "stage-0.trace.json.gz"] if "profile" in settings else [])
    if profiles:
        assert "iterations 2 to 3" in (tmp_path / "run" / "profile" / "stage-0.md").read_text()
    validations = [call.args for call in log.log_validation.call_args_list]
    assert [iteration for iteration, _ in validations] == validated
    # Three global batches an evaluation, always the same ones.
    assert read_at == [0, PACKS_PER_STEP, 2 * PACKS_PER_STEP] * len(validated)


def test_validation_knows_no_iteration(assets):
    """The same masks at every evaluation, those of the end of the schedule: what changes is the model alone."""
    settings = {"mask_ratio_schedule": "cosine", "valid_data_path": ("other-answers",), "eval_iters": 2}
    settings["centre_momentum"] = 0.9
    with trainer_of(assets, **settings) as trainer:
        batches, at = [], trainer.validation_data.at
        trainer.validation_data.at = lambda *args, **kwargs: batches.append(at(*args, **kwargs)) or batches[-1]
        results = []
        for iteration in (0, 3):
            trainer.progress.iteration = iteration
            results.append({name: value for name, value in train.evaluate(trainer).items() if "seconds" not in name})
        assert len(batches) == 4 and all(batch.counts.masked > 0 for batch in batches)
        for batch in batches:
            assert torch.equal(batch.masked[0], masks_of(trainer.config, batch, 0, trainer.config.objective.mask_ratio))
        # The same weights in the same memory.
        assert results[0] == results[1] and results[0].keys() == {*TERMS, "answer_accuracy"}
        assert not trainer.centre.sum_K.any() and not trainer.centre.value_K.any(), "the centre is training's"
        trainer.progress.iteration = 0
        train.train_step(trainer)
        assert train.evaluate(trainer)["lm_loss"] != results[0]["lm_loss"]


# What a validation's number is a mean over.
MEANS = {
    "lm_loss": "labels", "mim_loss": "masked", "gram_loss": "images", "student_visual_similarity": "images",
    "teacher_visual_similarity": "images", "teacher_entropy": "visual_tokens",
}  # fmt: skip


def test_validation_is_a_mean_over_all_its_batches(assets):
    """Of tokens or images, and not of the batches' means."""
    settings = {"valid_data_path": ("other-answers",), "eval_iters": 2, "mim_weight": 0.7, "gram_weight": 1.3}
    with trainer_of(assets, **settings) as trainer, torch.no_grad():
        result = train.evaluate(trainer)
        batches = [trainer.validation_data.at(PACKS_PER_STEP * i, mask_ratio=0.4, step=0) for i in range(2)]
        terms = [train.run_schedule(trainer, batch, forward_only=True).tolist() for batch in batches]
    for name, unit in MEANS.items():
        counts = [getattr(batch.counts, unit) for batch in batches]
        values = [of_batch[TERMS.index(name)] for of_batch in terms]
        mean = (values[0] * counts[0] + values[1] * counts[1]) / sum(counts)
        assert result[name] == pytest.approx(mean, rel=1e-6), name
        assert name == "lm_loss" or result[name] != pytest.approx(sum(values) / 2, rel=1e-5), name
    assert result["loss"] == pytest.approx(
        result["lm_loss"] + 0.7 * result["mim_loss"] + 1.3 * result["gram_loss"], rel=1e-6
    )


@shows("max_skipped_iterations")
@pytest.mark.parametrize("limit", [1, 3])
def test_skipped_iterations_in_a_row_end_the_run(assets, tmp_path, limit):
    with (
        trainer_of(assets, str(tmp_path), data_path=("all-nan",), max_skipped_iterations=limit) as trainer,
        mock.patch.object(train, "RunLog"),
        mock.patch.object(train, "save") as save,
    ):
        with pytest.raises(RuntimeError, match=rf"^{limit} iterations in a row .* at iteration {limit};"):
            train.train(trainer)
        assert trainer.progress.skipped_iterations == limit
        save.assert_not_called()


# --- completeness --------------------------------------------------------------------------------------

# Shown by other tests: (file, a text in it that uses the field).
ELSEWHERE = {
    "load": ("distributed/test_checkpoint.py", "load="),
    "finetune": ("distributed/test_checkpoint.py", "finetune=True"),
    "allow_change": ("unit/config/test_checks.py", "allow_change"),
    "strict_load": ("distributed/test_fallback.py", "strict_load=True"),
    "async_save": ("distributed/test_saving.py", "async_save=background"),
    "save_failure": ("distributed/test_saving.py", "save_failure=policy"),
    "keep_last": ("distributed/test_saving.py", "keep_last=2"),
    "keep_every": ("distributed/test_saving.py", "keep_every=3"),
    "keep_best": ("distributed/test_saving.py", "keep_best=True"),
    "arm": ("unit/studies/test_arms.py", 'config["arm"] == arm'),
    # Of the launcher.
    "restarts": ("unit/resilience/test_supervisor.py", "restarts=2"),
    "restart_same_step_limit": ("unit/resilience/test_supervisor.py", "restart_same_step_limit=2"),
    "node_timeout_minutes": ("faults/test_two_hosts.py", '"node_timeout_minutes": 0.5'),
    "elastic": ("faults/test_two_hosts.py", '"--elastic"'),
    # Refused on a CPU, or everywhere.
    "cuda_graph_impl": ("unit/config/test_engine_checks.py", '"cuda_graph_impl"'),
    "fine_grained_activation_offloading": ("unit/config/test_engine_checks.py", '"fine_grained_activation_offloading"'),
    "tp_comm_overlap": ("unit/config/test_engine_checks.py", '"tp_comm_overlap"'),
    "use_mup": ("unit/config/test_engine_checks.py", '"use_mup": True'),
    "optimizer": ("unit/config/test_engine_checks.py", '"optimizer": "muon"'),
    "use_precision_aware_optimizer": ("unit/config/test_engine_checks.py", "use_precision_aware_optimizer"),
    "fp8_format": ("unit/config/test_engine_checks.py", 'fp8_format="hybrid"'),
    "fp8_recipe": ("unit/config/test_engine_checks.py", "fp8_recipe=recipe"),
    "teacher_fp8": ("unit/config/test_engine_checks.py", "teacher_fp8=teacher"),
    "overlap_grad_reduce": ("distributed/test_engine_options.py", '"overlap_grad_reduce": True'),
    "overlap_param_gather": ("distributed/test_engine_options.py", '"overlap_param_gather": True'),
    "ddp_bucket_size": ("distributed/test_engine_options.py", '"ddp_bucket_size": 9000'),
    "decoder_last_pipeline_num_layers": ("distributed/test_switches.py", "decoder_last_pipeline_num_layers="),
    # What becomes of a spike.
    "spike_action": ("distributed/test_skipped_steps.py", 'spike_action="stop"'),
    "spike_sigmas": ("unit/resilience/test_spikes.py", "spike_sigmas=5.0"),
    "spike_window": ("unit/resilience/test_spikes.py", "spike_window=4"),
    "start_timeout_minutes": ("unit/resilience/test_phases.py", "start_timeout_minutes="),
    "save_timeout_minutes": ("unit/resilience/test_phases.py", "save_timeout_minutes="),
    "data_timeout_minutes": ("distributed/test_watchdog.py", '"--data-timeout-minutes"'),
    "step_timeout_minutes": ("distributed/test_watchdog.py", '"--step-timeout-minutes"'),
    "straggler_percent": ("distributed/test_watchdog.py", '"--straggler-percent"'),
    # The fields that `Layout` stands for.
    "tensor_model_parallel_size": ("distributed/test_layout_invariance.py", "Layout(tp=2"),
    "pipeline_model_parallel_size": ("distributed/test_layout_invariance.py", "Layout(pp=2"),
    "sequence_parallel": ("distributed/test_layout_invariance.py", "sp=True"),
    "num_layers_per_virtual_pipeline_stage": ("distributed/test_layout_invariance.py", "vpp_layers="),
    "decoder_first_pipeline_num_layers": ("distributed/test_layout_invariance.py", "first_layers="),
}


def test_no_field_is_forgotten():
    assert set(all_fields()) == SHOWN | ELSEWHERE.keys() and not SHOWN & ELSEWHERE.keys()
    assert Layout().settings.keys() <= ELSEWHERE.keys()
    for name, (file, text) in ELSEWHERE.items():
        assert text in (TESTS / file).read_text(), f"{file} says nothing of {name}"
