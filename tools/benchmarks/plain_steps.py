"""Steps to hold ours against, in plain PyTorch: Hugging Face's Qwen2, a reading of the official LaVer step, and bare
matrix products.

Letters: B packs, S tokens of a pack, N visual tokens of a pack, T visual tokens of all, H width, K logits.
"""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import Qwen2Config, Qwen2ForCausalLM

from laver_megatron.objective.language import IGNORE_LABEL
from tools.benchmarks.step_shapes import PATCH_SIZE, StepShape, make_packs

_MASK_RATIO, _MOMENTUM, _STUDENT_TEMPERATURE, _TEACHER_TEMPERATURE = 0.3, 0.95, 0.1, 0.04


def build_qwen(shape: StepShape, attention: str) -> Qwen2ForCausalLM:
    """Random weights on the CPU, fp32."""
    config = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        max_position_embeddings=max(shape.seq_length, 4096),
        tie_word_embeddings=shape.tied,
        rms_norm_eps=1e-6,
        use_cache=False,
        attn_implementation=attention,
    )
    return Qwen2ForCausalLM(config)


def unshifted(labels_BS: Tensor) -> Tensor:
    """Labels as transformers takes them: at the token itself."""
    moved_BS = torch.full_like(labels_BS, IGNORE_LABEL)
    moved_BS[:, 1:] = labels_BS[:, :-1]
    return moved_BS


class QwenStep:
    """Hugging Face's Qwen2ForCausalLM with SDPA, its causal mask and its own loss, fused AdamW, clipped at 1. It reads
    the packs' tokens as text: no images, no connector."""

    def __init__(self, shape: StepShape, device: torch.device, dtype: torch.dtype) -> None:
        self.model = build_qwen(shape, "sdpa").to(device, dtype).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)
        self.batches = []
        for number in range(shape.num_micro_batches):
            packs = make_packs(shape, shape.micro_batch_size, seed=number * shape.micro_batch_size)
            self.batches.append((packs.tokens_BS.to(device), unshifted(packs.labels_BS).to(device)))

    def __call__(self) -> None:
        # Where ours runs on a CPU, its mode rewrites devices; others must not pay for it.
        with torch._C.DisableTorchFunction():
            for tokens_BS, labels_BS in self.batches:
                loss = self.model(input_ids=tokens_BS, labels=labels_BS).loss / len(self.batches)
                loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            loss.item()


class OfficialReadingStep:
    """A reading of the official code's training step (github.com/Fir-lat/LaVer, model/laver/modeling_laver.py and
    train/sft), on its decoder's side, in plain PyTorch; not the official code itself:

    - eager attention over an explicit mask (mixed: an image's tokens see each other), attention weights kept,
    - the teacher runs first, on whole sequences, without gradients, its vision head on every position,
    - the student's batch is doubled: unmasked and masked sequences, text included,
    - logits of the unmasked half for every position, then a fp32 copy and a shifted copy,
    - the Gram matrix over all visual tokens of the micro-batch at once, unclipped.

    As ours in size, connector, optimizer, clipping, and an EMA update in every step. Its positions are 1D: the loop on
    the host that computes the 3D ones is left out.
    """

    def __init__(self, shape: StepShape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        qwen = build_qwen(shape, "eager").to(device, dtype).train()
        hidden, middle = shape.hidden_size, shape.vision_head_hidden_size
        connector = nn.Sequential(nn.Linear(3 * PATCH_SIZE**2, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        head = nn.Sequential(
            nn.Linear(hidden, middle), nn.GELU(),
            nn.Linear(middle, middle), nn.GELU(),
            nn.Linear(middle, hidden, bias=False),
        )  # fmt: skip
        self.student = nn.ModuleDict({"qwen": qwen, "connector": connector, "head": head}).to(device, dtype)
        self.teacher = nn.ModuleDict({"decoder": copy.deepcopy(qwen.model), "head": copy.deepcopy(head)})
        self.teacher.to(device, dtype).requires_grad_(False).eval()
        self.pairs = list(zip(self.teacher["decoder"].parameters(), qwen.model.parameters(), strict=True))
        self.pairs += zip(self.teacher["head"].parameters(), self.student["head"].parameters(), strict=True)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=2e-5, weight_decay=0.0, fused=True)
        self.batches = [
            make_packs(shape, shape.micro_batch_size, seed=number * shape.micro_batch_size)
            for number in range(shape.num_micro_batches)
        ]
        self.centre_K = torch.zeros(hidden, device=device, dtype=dtype)
        self.device = device

    def __call__(self) -> None:
        with torch._C.DisableTorchFunction():
            for packs in self.batches:
                loss = self._loss(packs.tokens_BS, packs.labels_BS, packs.image_BS, packs.pixels)
                (loss / len(self.batches)).backward()
            nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for teacher, student in self.pairs:
                    teacher.mul_(_MOMENTUM)
                    teacher.add_((1 - _MOMENTUM) * student)
            loss.item()

    def _loss(self, tokens_BS: Tensor, labels_BS: Tensor, image_BS: Tensor, pixels: list[list[Tensor]]) -> Tensor:
        tokens_BS, labels_BS, image_BS = (x.to(self.device) for x in (tokens_BS, unshifted(labels_BS), image_BS))
        qwen, teacher, head = self.student["qwen"], self.teacher, self.student["head"]
        embeddings = qwen.model.embed_tokens
        visual_BS = image_BS >= 0
        features_TH = self.student["connector"](self._patches(pixels))
        inputs_BSH = embeddings(tokens_BS).masked_scatter(visual_BS.unsqueeze(-1), features_TH)
        mask_B1SS = self._attention_mask(image_BS)
        with torch.no_grad():
            hidden_BSH = teacher["decoder"](inputs_embeds=inputs_BSH, attention_mask=mask_B1SS)[0]
            teacher_BSK = teacher["head"](hidden_BSH)
        hidden_BS = visual_BS & (torch.rand(image_BS.shape, device=self.device) < _MASK_RATIO)
        masked_BSH = inputs_BSH.clone()
        masked_BSH[hidden_BS] = embeddings.weight[0]
        outputs = qwen.model(
            inputs_embeds=torch.cat([inputs_BSH, masked_BSH]),
            attention_mask=torch.cat([mask_B1SS, mask_B1SS]),
            output_attentions=True,
        )
        plain_BSH, masked_BSH = outputs[0].chunk(2)
        student_BSK = head(masked_BSH)
        logits_BSW = qwen.lm_head(plain_BSH).float()
        shifted_TW = logits_BSW[:, :-1].contiguous().view(-1, self.shape.vocab_size)
        language = F.cross_entropy(shifted_TW, labels_BS[:, 1:].flatten(), ignore_index=IGNORE_LABEL)
        return language + self._visual_loss(student_BSK[visual_BS], teacher_BSK[visual_BS], hidden_BS[visual_BS])

    def _visual_loss(self, student_TK: Tensor, teacher_TK: Tensor, hidden_T: Tensor) -> Tensor:
        student_TK = student_TK / _STUDENT_TEMPERATURE
        target_TK = F.softmax((teacher_TK - self.centre_K) / _TEACHER_TEMPERATURE, dim=-1)
        per_token_T = torch.sum(-target_TK * F.log_softmax(student_TK, dim=-1), dim=-1)
        reconstruction = (per_token_T * hidden_T).sum() / hidden_T.sum().clamp(min=1)
        student_TK, teacher_TK = F.normalize(student_TK, dim=-1), F.normalize(teacher_TK, dim=-1)
        student_TT, teacher_TT = student_TK @ student_TK.T, teacher_TK @ teacher_TK.T
        student_TT.mean().item()  # logged
        self.centre_K = self.centre_K * 0.9 + teacher_TK.mean(0) * 0.1
        return reconstruction + F.mse_loss(student_TT, teacher_TT)

    def _attention_mask(self, image_BS: Tensor) -> Tensor:
        """Additive `[B, 1, S, S]`: causal, and within each image in both directions."""
        length = image_BS.shape[1]
        seen_BSS = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        same_BSS = (image_BS[:, :, None] == image_BS[:, None, :]) & (image_BS >= 0)[:, :, None]
        floor = torch.finfo(self.dtype).min
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        return torch.where(seen_BSS | same_BSS, zero, floor).unsqueeze(1)

    def _patches(self, pixels: list[list[Tensor]]) -> Tensor:
        """`[T, 3 * patch^2]`."""
        images = torch.stack([image for images in pixels for image in images]).to(self.device, self.dtype)
        return F.unfold(images, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2).flatten(0, 1)


class MatrixProducts:
    """Bare products of the LM step's shapes, forward and backward, of one layer and the LM head: how fast this machine
    multiplies. `flops` are those of a call."""

    def __init__(self, shape: StepShape, device: torch.device, dtype: torch.dtype) -> None:
        hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
        key_value_size = 2 * shape.num_query_groups * hidden // shape.num_attention_heads
        num_tokens = shape.micro_batch_size * shape.seq_length
        sizes = [
            (hidden + key_value_size, hidden), (hidden, hidden), (2 * ffn, hidden), (hidden, ffn),
            (shape.vocab_size, hidden),
        ]  # fmt: skip
        # The head once, a layer as often as keeps their shares.
        self.repeats = [shape.num_layers] * 4 + [1]
        self.flops = sum(6 * num_tokens * m * n * times for (m, n), times in zip(sizes, self.repeats, strict=True))
        self.operands = [
            tuple(torch.randn(*size, device=device, dtype=dtype) for size in ((num_tokens, n), (m, n), (num_tokens, m)))
            for m, n in sizes
        ]

    def __call__(self) -> None:
        with torch._C.DisableTorchFunction():
            for (inputs, weight, outputs), times in zip(self.operands, self.repeats, strict=True):
                gradient, weight_gradient = torch.empty_like(inputs), torch.empty_like(weight)
                for _ in range(times):
                    torch.mm(inputs, weight.T, out=outputs)
                    torch.mm(outputs, weight, out=gradient)
                    torch.mm(outputs.T, inputs, out=weight_gradient)


def wait_for(device: torch.device) -> float:
    """The time, after all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
