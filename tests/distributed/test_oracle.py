"""Two whole training steps beside an implementation of the method that shares nothing with the package's.

The oracle is one process of plain PyTorch in fp64, written from the method alone: a Qwen2 decoder with an explicit
dense mask and explicit rotary angles for every pack, each image decoded by itself for the reconstruction, the three
losses as means over the whole global batch, gradients by autograd, clipped AdamW, the teacher's average and centre.
From the package it takes the packs (their tokens, places and pixels), the masks of a step (held by
tests/unit/objective/test_masking.py and tests/unit/test_switches.py) and the start values of the new parts; the
decoder's weights come from the checkpoint's file. Images have four sizes, some documents none.

Letters: N tokens of an image, L of a sequence, H hidden, D of a head, K the vision head's logits.
"""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from laver_megatron.objective.masking import mask_visual_tokens
from laver_megatron.train import train_step
from tests import oracles
from tests.distributed.build import (
    GRIDS,
    PACKS_PER_STEP,
    PATCH_SIZE,
    SyntheticReader,
    gradient_shards,
    make_config,
    make_trainer,
    relative_distance,
    student_shards,
    teacher_shards,
    whole_tensors,
)
from tests.distributed.encoders import save_encoder
from tests.distributed.harness import Layout

NUM_STEPS = 2
NEW_PARTS = ("connector.", "vision_head.", "mask_token")
# Nothing at a value where a mistake would not show: weights of the losses other than 1, gradients clipped to another
# norm than the default, decay on. Epsilon lies above the rounding of gradients: without it Adam would turn gradients of
# rounding alone into whole steps.
SETTINGS = {
    "data_path": ("grids",), "mim_weight": 0.7, "gram_weight": 1.3, "clip_grad": 0.3, "weight_decay": 0.1,
    "adam_eps": 1e-3, "mask_sampling": "bernoulli", "ema_momentum": 0.8, "micro_batch_size": 2,
}  # fmt: skip
# fp32 against fp64: some 1e-7 for every operation of four layers; the temperatures multiply what logits have of it by
# 10 and 25. Seen, with AVX512 and without any vector instructions: 7e-8 in the language loss, 6e-7 in the visual ones,
# 7e-7 in the norm, 6e-6 in a tensor's gradient, 3e-6 of what a tensor moved.
TOLERANCES = {"lm_loss": 1e-6, "mim_loss": 5e-6, "gram_loss": 5e-6, "loss": 5e-6, "grad_norm": 5e-6}
GRADIENT, DISPLACEMENT = 2e-5, 1e-5


# --- the oracle ----------------------------------------------------------------------------------------


class Oracle:
    """All weights under the names of their files; `teacher` has those of decoder and vision head."""

    def __init__(self, model_dir, new_parts, config):
        self.config = config
        self.shape = SimpleNamespace(**json.loads((model_dir / "config.json").read_text()))
        self.theta = self.shape.rope_parameters["rope_theta"]
        loaded = {**load_file(model_dir / "model.safetensors"), **new_parts}
        self.student = {name: tensor.double().requires_grad_() for name, tensor in loaded.items()}
        self.teacher = {
            name: tensor.detach().clone()
            for name, tensor in self.student.items()
            if name.startswith(("model.layers.", "model.norm.", "vision_head."))
        }
        self.moments = {name: [torch.zeros_like(t), torch.zeros_like(t)] for name, t in self.student.items()}
        self.centre_K = torch.zeros(len(new_parts["vision_head.linear_3.weight"]), dtype=torch.float64)

    def decode(self, weights, hidden_LH, mask_LL, positions):
        """Final hidden states of one sequence; positions: (t, row, column) of every token."""
        heads, groups = self.shape.num_attention_heads, self.shape.num_key_value_heads
        size = self.shape.hidden_size // heads
        # Pair f of a head turns by the row if f is even, by the column if it is odd.
        angles_LD = torch.tensor(
            [[p[1 + f % 2] * self.theta ** (-2 * f / size) for f in range(size // 2)] * 2 for p in positions],
            dtype=torch.float64,
        )

        def norm(x_LH, name):
            scale_L1 = (x_LH.square().mean(-1, keepdim=True) + self.shape.rms_norm_eps).rsqrt()
            return weights[name] * x_LH * scale_L1

        def turned(x_LnD):
            first, second = x_LnD.chunk(2, dim=-1)
            return x_LnD * angles_LD.cos()[:, None] + torch.cat([-second, first], dim=-1) * angles_LD.sin()[:, None]

        for i in range(self.shape.num_hidden_layers):
            layer = f"model.layers.{i}."
            x_LH = norm(hidden_LH, f"{layer}input_layernorm.weight")
            q, k, v = (
                F.linear(x_LH, weights[f"{layer}self_attn.{p}_proj.weight"], weights[f"{layer}self_attn.{p}_proj.bias"])
                for p in "qkv"
            )
            q, k, v = turned(q.unflatten(-1, (heads, size))), turned(k.unflatten(-1, (groups, size))), v
            v = v.unflatten(-1, (groups, size))
            outputs = []
            for head in range(heads):
                group = head * groups // heads
                scores_LL = q[:, head] @ k[:, group].T / math.sqrt(size)
                outputs.append(scores_LL.masked_fill(~mask_LL, -torch.inf).softmax(-1) @ v[:, group])
            hidden_LH = hidden_LH + F.linear(torch.cat(outputs, dim=-1), weights[f"{layer}self_attn.o_proj.weight"])
            x_LH = norm(hidden_LH, f"{layer}post_attention_layernorm.weight")
            gate, up = (F.linear(x_LH, weights[f"{layer}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
            hidden_LH = hidden_LH + F.linear(F.silu(gate) * up, weights[f"{layer}mlp.down_proj.weight"])
        return norm(hidden_LH, "model.norm.weight")

    @staticmethod
    def linear(weights, name, x):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    @staticmethod
    def patches(pixels_3HW):
        """The features of the encoder without weights, which are the pixels of every patch."""
        patches = [
            pixels_3HW[:, top : top + PATCH_SIZE, left : left + PATCH_SIZE].flatten()
            for top in range(0, pixels_3HW.shape[1], PATCH_SIZE)
            for left in range(0, pixels_3HW.shape[2], PATCH_SIZE)
        ]
        return torch.stack(patches).double()

    def connect(self, patches_NE):
        middle = F.gelu(self.linear(self.student, "connector.linear_1", patches_NE))
        return self.linear(self.student, "connector.linear_2", middle)

    def predict(self, weights, hidden_NH):
        middle = F.gelu(self.linear(weights, "vision_head.linear_1", hidden_NH))
        return self.linear(
            weights, "vision_head.linear_3", F.gelu(self.linear(weights, "vision_head.linear_2", middle))
        )

    def reconstruct(self, student_NK, teacher_NK, patches_NE):
        """The loss of every visual token of an image, masked or not."""
        objective = self.config.objective
        if objective.mim_target == "latent" and objective.mim_loss is None:
            target_NK = ((teacher_NK - self.centre_K) / objective.teacher_temperature).softmax(-1)
            return -(target_NK * (student_NK / objective.student_temperature).log_softmax(-1)).sum(-1)
        target_NK = {"latent": teacher_NK, "features": patches_NE, "pixels": patches_NE}[objective.mim_target]
        if objective.mim_target != "features":
            unbiased, eps = (False, 1e-5) if objective.mim_target == "latent" else (True, 1e-6)
            target_NK = target_NK - target_NK.mean(-1, keepdim=True)
            squares_N1 = target_NK.square().sum(-1, keepdim=True)
            target_NK = target_NK / (squares_N1 / (target_NK.shape[-1] - unbiased) + eps).sqrt()
        far_NK = (student_NK - target_NK).abs()
        return torch.where(far_NK < 1, far_NK**2 / 2, far_NK - 0.5).mean(-1)

    def losses(self, packs, masked_BS):
        """(L_LM, L_MIM, L_CGA) of a global batch, and the teacher's logits of all visual tokens."""
        language, reconstruction, gram, of_teacher = [], [], [], []
        head = self.student.get("lm_head.weight", self.student["model.embed_tokens.weight"])
        mask_BLL = oracles.language_mask(packs, "mixed")
        positions = oracles.language_positions(packs, "2d")
        for b, images in enumerate(packs.pixels):
            hidden_LH = self.student["model.embed_tokens.weight"][packs.tokens_BS[b]]
            for number, pixels in enumerate(images):
                places = (packs.image_BS[b] == number).nonzero()[:, 0]
                patches_NE = self.patches(pixels)
                tokens_NH = self.connect(patches_NE)
                hidden_LH = hidden_LH.index_put((places,), tokens_NH)
                masked_N = masked_BS[b][places]
                everything_NN = torch.ones(len(places), len(places), dtype=torch.bool)
                grid = oracles.image_positions(packs.row_BS[b][places].tolist(), packs.col_BS[b][places].tolist(), "2d")
                hidden_NH = torch.where(masked_N[:, None], self.student["mask_token"], tokens_NH)
                student_NK = self.predict(self.student, self.decode(self.student, hidden_NH, everything_NN, grid))
                with torch.no_grad():
                    teacher_NK = self.predict(self.teacher, self.decode(self.teacher, tokens_NH, everything_NN, grid))
                reconstruction.append(self.reconstruct(student_NK, teacher_NK, patches_NE)[masked_N])
                unit_student_NK, unit_teacher_NK = F.normalize(student_NK, dim=-1), F.normalize(teacher_NK, dim=-1)
                excess_NN = unit_student_NK @ unit_student_NK.T - unit_teacher_NK @ unit_teacher_NK.T
                gram.append(excess_NN.clamp(min=0).square().sum() / len(places) ** 2)
                of_teacher.append(teacher_NK)
            hidden_LH = self.decode(self.student, hidden_LH, mask_BLL[b], [p or (0, 0, 0) for p in positions[b]])
            labelled = packs.labels_BS[b] >= 0
            language.append(
                F.cross_entropy(F.linear(hidden_LH, head)[labelled], packs.labels_BS[b][labelled], reduction="none")
            )
        means = [torch.cat(language).mean(), torch.cat(reconstruction).mean(), torch.stack(gram).mean()]
        return means, torch.cat(of_teacher)

    def step(self, step, packs):
        """One iteration: its numbers, and the gradients before clipping."""
        config = self.config
        masked_BS = mask_visual_tokens(
            packs.image_BS, packs.sample_id_BS, packs.image_number_BS, mask_ratio=config.objective.mask_ratio,
            sampling=config.objective.mask_sampling, seed=config.training.seed, step=step,
        )  # fmt: skip
        (language, reconstruction, gram), teacher_TK = self.losses(packs, masked_BS)
        loss = language + config.objective.mim_weight * reconstruction + config.objective.gram_weight * gram
        gradients = dict(zip(self.student, torch.autograd.grad(loss, list(self.student.values())), strict=True))
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        rate = config.training.lr * (1 + math.cos(math.pi * step / config.training.train_iters)) / 2
        with torch.no_grad():
            for name, weight in self.student.items():
                gradient = gradients[name] * min(1.0, config.training.clip_grad / float(norm))
                first, second = self.moments[name]
                first.mul_(config.training.adam_beta1).add_((1 - config.training.adam_beta1) * gradient)
                second.mul_(config.training.adam_beta2).add_((1 - config.training.adam_beta2) * gradient**2)
                first, second = (
                    first / (1 - config.training.adam_beta1 ** (step + 1)),
                    second / (1 - config.training.adam_beta2 ** (step + 1)),
                )
                decay = config.training.weight_decay * weight if weight.dim() > 1 else 0
                weight -= rate * (first / (second.sqrt() + config.training.adam_eps) + decay)
            for name, average in self.teacher.items():
                average.mul_(config.objective.ema_momentum).add_(
                    (1 - config.objective.ema_momentum) * self.student[name]
                )
            if (kept := config.objective.centre_momentum) is not None:
                self.centre_K = kept * self.centre_K + (1 - kept) * teacher_TK.mean(0)
        numbers = {"lm_loss": language, "mim_loss": reconstruction, "gram_loss": gram, "loss": loss, "grad_norm": norm}
        numbers = {name: float(value.detach()) for name, value in numbers.items()}
        return {**numbers, "num_masked_tokens": int(masked_BS.sum())}, gradients

    def fused(self, tensors):
        """A dictionary of weights or of gradients under the names of the checkpoint: query, key and value rows group by
        group, gate above up."""
        found = {name: tensor for name, tensor in tensors.items() if name.startswith(NEW_PARTS)}
        for theirs, ours in (
            ("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
            ("lm_head.weight", "output_layer.weight"),
            ("model.norm.weight", "decoder.final_layernorm.weight"),
        ):
            if theirs in tensors:
                found[ours] = tensors[theirs]
        groups = self.shape.num_key_value_heads
        for i in range(self.shape.num_hidden_layers):
            theirs, ours = f"model.layers.{i}.", f"decoder.layers.{i}."
            for kind in ("weight", "bias"):
                q, k, v = (tensors[f"{theirs}self_attn.{p}_proj.{kind}"].chunk(groups) for p in "qkv")
                rows = [part for group in range(groups) for part in (q[group], k[group], v[group])]
                found[f"{ours}self_attention.linear_qkv.{kind}"] = torch.cat(rows)
            found[f"{ours}self_attention.linear_qkv.layer_norm_weight"] = tensors[f"{theirs}input_layernorm.weight"]
            found[f"{ours}self_attention.linear_proj.weight"] = tensors[f"{theirs}self_attn.o_proj.weight"]
            gate_up = [tensors[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up")]
            found[f"{ours}mlp.linear_fc1.weight"] = torch.cat(gate_up)
            found[f"{ours}mlp.linear_fc1.layer_norm_weight"] = tensors[f"{theirs}post_attention_layernorm.weight"]
            found[f"{ours}mlp.linear_fc2.weight"] = tensors[f"{theirs}mlp.down_proj.weight"]
        return {name: tensor.detach() for name, tensor in found.items()}


# --- beside it -----------------------------------------------------------------------------------------


def run(layout, config):
    """Job: two steps; their records and gradients, the weights before and after, the teacher and the centre after."""
    trainer = make_trainer(config)
    prepare, gradients = trainer.optimizer.prepare_grads, []

    def note_and_prepare():
        gradients.append(gradient_shards(trainer))
        return prepare()

    trainer.optimizer.prepare_grads = note_and_prepare
    before = student_shards(trainer)
    records = [train_step(trainer) for _ in range(NUM_STEPS)]
    return {
        "records": records,
        "gradients": gradients,
        "before": before,
        "student": student_shards(trainer),
        "teacher": teacher_shards(trainer),
        "centre": None if trainer.centre is None else trainer.centre.value_K.clone(),
    }


@pytest.fixture(scope="module")
def settings(assets, tmp_path_factory):
    """(model directory, configuration) of a checkpoint at a layout."""
    encoder = tmp_path_factory.mktemp("oracle") / "patches"
    save_encoder(encoder, "patches")

    def of(weights, layout, **changes):
        model_dir = getattr(assets, weights)
        config = make_config(
            replace(assets, encoder=encoder), "unused", layout, load=f"hf:{model_dir}", freeze=(), **SETTINGS, **changes
        )
        return model_dir, config

    return of


def test_the_batch_has_all_there_is():
    """Several grids, documents and packs without an image, several images in a document."""
    for step in range(NUM_STEPS):
        (packs,) = SyntheticReader("grids").read(step * PACKS_PER_STEP, PACKS_PER_STEP, PACKS_PER_STEP)
        sizes = {tuple(pixels.shape[1:]) for images in packs.pixels for pixels in images}
        assert sizes == {(rows * PATCH_SIZE, columns * PATCH_SIZE) for rows, columns in GRIDS}
        assert 0 in map(len, packs.pixels) and max(map(len, packs.pixels)) == 3
        documents = [
            bool((packs.image_BS[b][packs.document_BS[b] == document] >= 0).any())
            for b in range(PACKS_PER_STEP)
            for document in range(int(packs.document_BS[b].max()) + 1)
        ]
        assert {True, False} == set(documents)


@pytest.mark.parametrize(
    "weights, layout",
    [
        ("tied", Layout()),
        ("tied", Layout(tp=2, pp=2, sp=True)),
        ("untied", Layout(tp=2, pp=2, sp=True)),
        ("untied", Layout(pp=2, vpp_layers=1, dp=2)),
    ],
    ids=str,
)
def test_two_steps_are_those_of_the_method(pool, settings, weights, layout):
    check_two_steps(pool, layout, *settings(weights, layout))


@pytest.mark.parametrize(
    "changes, layout",
    [
        ({"mim_loss": "smooth-l1"}, Layout(tp=2, pp=2)),
        ({"mim_target": "features"}, Layout(tp=2, dp=2, sp=True)),
        ({"mim_target": "pixels"}, Layout(tp=2, sp=True)),
    ],
    ids=str,
)
def test_other_targets_and_losses(pool, settings, changes, layout):
    check_two_steps(pool, layout, *settings("tied", layout, centre_momentum=None, **changes))


def check_two_steps(pool, layout, model_dir, config):
    results = pool.run(run, layout, config)
    before = whole_tensors([result["before"] for result in results])
    oracle = Oracle(model_dir, {name: t for name, t in before.items() if name.startswith(NEW_PARTS)}, config)
    start, start_of_teacher = oracle.fused(oracle.student), oracle.fused(oracle.student | oracle.teacher)
    start, start_of_teacher = ({k: t.clone() for k, t in whole.items()} for whole in (start, start_of_teacher))
    assert before.keys() == start.keys()
    assert all(torch.equal(before[key], start[key].float()) for key in start)

    for step in range(NUM_STEPS):
        (packs,) = SyntheticReader("grids").read(step * PACKS_PER_STEP, PACKS_PER_STEP, PACKS_PER_STEP)
        expected, gradients = oracle.step(step, packs)
        record = results[0]["records"][step]
        assert record["num_masked_tokens"] == expected["num_masked_tokens"] > 0
        for name, tolerance in TOLERANCES.items():
            assert record[name] == pytest.approx(expected[name], rel=tolerance), f"{name} of step {step}"
        found = whole_tensors([result["gradients"][step] for result in results], rtol=1e-5)
        wanted = oracle.fused(gradients)
        assert found.keys() == wanted.keys()
        for key, gradient in found.items():
            assert relative_distance(gradient, wanted[key]) <= GRADIENT, f"gradient of {key}, step {step}"

    student, teacher = (whole_tensors([r[name] for r in results], rtol=1e-5) for name in ("student", "teacher"))
    wanted_student, wanted_teacher = oracle.fused(oracle.student), oracle.fused(oracle.student | oracle.teacher)
    assert teacher.keys() == {key for key in wanted_teacher if key.startswith(("decoder.", "vision_head."))}
    for name, found, wanted, first in (
        ("student's", student, wanted_student, start),
        ("teacher's", teacher, wanted_teacher, start_of_teacher),
    ):
        for key, tensor in found.items():
            moved = float((wanted[key] - first[key]).norm())
            # Each step rounds the weight itself to 24 bits, which of a gain near 1 is much beside what it moved.
            rounding = NUM_STEPS * 2**-24 * float(wanted[key].norm())
            assert float((tensor - wanted[key]).norm()) <= DISPLACEMENT * moved + rounding < 0.1 * moved, (
                f"{name} {key}"
            )
    centres = [result["centre"] for result in results if result["centre"] is not None]
    assert bool(centres) == (config.objective.centre_momentum is not None)
    if centres:
        assert relative_distance(torch.cat(centres[: layout.tp]), oracle.centre_K) <= 1e-5
