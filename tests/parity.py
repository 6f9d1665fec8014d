"""The model beside Hugging Face's, on the same random weights: for one process and for any layout of several.

    checkpoints = write_checkpoints(directory, tied=True)     # once, on one rank
    config = parity_config(checkpoints, positions="2d", tensor_model_parallel_size=2)
    stages = build_model(config, checkpoints)                 # every rank
    ours = model_outputs(stages, micro_batches)               # every rank; None off the last pipeline stage
    if ours is not None:
        assert_parity(ours, reference_outputs(config, checkpoints, micro_batches))

The reference shares with the model only the checkpoint's files and the seed of the new parts: masks and
positions come from `tests.oracles`, the decoder from transformers.

Letters: B packs, S language tokens, V visual slots, N visual tokens of an image, H hidden, W vocabulary, K
width of the vision head's logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    Qwen2_5_VLTextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from laver_megatron.config.fields import Config
from laver_megatron.convert.verification.forward_pass import forward_pass
from laver_megatron.data.batch.packing import PackBatch
from laver_megatron.hf.shape import ModelShape, read_model_shape
from laver_megatron.runtime.backend import initialise_parallelism, shut_down_parallelism, use_backend
from laver_megatron.runtime.sharded_state import sharding_metadata
from tests import oracles
from tests.checkpoint_writer import prepare_checkpoint_writer
from tests.packs import pack, padding, stack

# The bound on every output, fp32: some 1e-6 of rounding per layer on values of order 1 to 10.
TOLERANCE = 1e-4

SEED = 7
ROPE_THETA = 1e6
IMAGE_SIZE = 32  # 4 x 4 patches of 8 pixels: 16 tokens an image
SEQ_LENGTH, VISUAL_SEQ_LENGTH = 64, 48


@dataclass(frozen=True)
class Checkpoints:
    """Hugging Face directories of a small Qwen2 and a small SigLIP."""

    model: Path
    encoder: Path

    @property
    def shape(self) -> ModelShape:
        return read_model_shape(self.model)


def write_checkpoints(
    directory: Path, *, tied: bool, num_key_value_heads: int = 2, num_layers: int = 4, max_shard_size: str = "5GB"
) -> Checkpoints:
    """Random checkpoints whose weights are large enough that a wrong mask, position or head shows: attention
    is far from uniform, biases and norm gains are not the zeros and ones of a fresh model."""
    torch.manual_seed(SEED)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=num_key_value_heads,
            rms_norm_eps=1e-5,
            rope_theta=ROPE_THETA,
            tie_word_embeddings=tied,
        )
    )
    encoder = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=8,
        )
    )
    for module in (model, encoder):
        _randomise(module)
    model.save_pretrained(directory / "model", max_shard_size=max_shard_size)
    encoder.save_pretrained(directory / "encoder")
    return Checkpoints(directory / "model", directory / "encoder")


@torch.no_grad()
def _randomise(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(0.0, 0.5)


def parity_config(checkpoints: Checkpoints, **changes) -> Config:
    """A run of the parity model; change the layout, attention, positions and so on by name."""
    defaults = {
        "model": str(checkpoints.model),
        "encoder": str(checkpoints.encoder),
        "data_path": ("none",),
        "run_dir": "none",
        "seq_length": SEQ_LENGTH,
        "visual_seq_length": VISUAL_SEQ_LENGTH,
        "train_iters": 1,
        "vision_head_hidden_size": 40,
        "vision_head_output_size": 48,
        "seed": SEED,
        "attention_kernel": "dense",
    }
    return Config.of(**{**defaults, **changes})


@pytest.fixture(scope="module")
def single_process() -> Iterator[None]:
    """Megatron's parallel groups in a process of its own. Import it into a conftest.py to use it."""
    use_backend()
    prepare_checkpoint_writer()
    initialise_parallelism(
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        timeout_minutes=1,
        seed=SEED,
    )
    yield
    shut_down_parallelism()


MicroBatches = list[tuple[PackBatch, Tensor]]


def text_micro_batches() -> MicroBatches:
    """A micro-batch without any image: two packs of packed documents and padding."""
    packs = stack(pack([SEQ_LENGTH], seed=1), pack([20], padding(3), [33], seq_length=SEQ_LENGTH, seed=2))
    return [(packs, torch.zeros_like(packs.image_BS, dtype=torch.bool))]


def image_micro_batches() -> MicroBatches:
    """Two micro-batches of two packs: images first, last, adjacent, non-square, three, two, one and none a pack."""
    common = {"seq_length": SEQ_LENGTH, "image_size": IMAGE_SIZE}
    packs = [
        pack([3, (4, 4), 2, (2, 8), 7], padding(2), [(4, 4), 1], **common, seed=3),
        pack([(8, 2), 12], [7], **common, seed=4),
        pack([20], [30], **common, seed=5),
        pack([2, (4, 4), (4, 4)], [5, (1, 16)], **common, seed=6),
    ]
    micro_batches = []
    for first in (0, 2):
        both = stack(*packs[first : first + 2])
        drawn_BS = torch.rand(both.image_BS.shape, generator=torch.Generator().manual_seed(first)) < 0.4
        micro_batches.append((both, drawn_BS & (both.image_BS >= 0)))
    return micro_batches


@dataclass(frozen=True)
class Outputs:
    """What the model computes, whole on every rank that has it; the visual logits are compacted to the tokens
    of all images, in order (N summed). None where LaVer is off."""

    hidden_BSH: Tensor
    language_logits_BSW: Tensor
    student_logits_NK: Tensor | None
    teacher_logits_NK: Tensor | None


# --- ours ----------------------------------------------------------------------------------------------


def build_model(config: Config, checkpoints: Checkpoints) -> list:
    """This rank's stages with the checkpoint's weights, the teacher equal to the student."""
    from laver_megatron.hf.direct_start import load_hugging_face
    from laver_megatron.model.build import build_stages
    from laver_megatron.model.teacher import pair_by_name

    shape = checkpoints.shape
    stages = build_stages(config, shape, checkpoints.encoder, load_encoder=True)
    for stage in stages:
        stage.initialise_new_parts(config.training.seed)
    load_hugging_face(stages, checkpoints.model, sharding_metadata())
    with torch.no_grad():
        for stage in stages:
            for _, student, teacher in pair_by_name(stage) if config.objective.laver else ():
                teacher.copy_(student)
    return stages


def model_outputs(stages: list, micro_batches: MicroBatches) -> Outputs | None:
    """The forward pass that `verify` makes, with outputs gathered over the tensor-parallel ranks; None on ranks that
    are not on the last pipeline stage. Call on every rank."""
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    hidden, language, student, teacher = [], [], [], []

    def keep(batch, hidden_SBH: Tensor, output) -> None:
        hidden.append(hidden_SBH.transpose(0, 1))
        whole_RW = gather_from_tensor_model_parallel_region(output.language_logits_RW)
        language.append(whole_RW.unflatten(0, hidden_SBH.shape[:2]).transpose(0, 1))
        if stages[0].run_config.objective.laver:
            student.append(gather_from_tensor_model_parallel_region(output.student_logits_TK))
            teacher.append(gather_from_tensor_model_parallel_region(output.teacher_logits_TK))

    forward_pass(stages, micro_batches, keep)
    if not hidden:
        return None
    return Outputs(*(torch.cat(parts) if parts else None for parts in (hidden, language, student, teacher)))


# --- the reference -------------------------------------------------------------------------------------


class _InterleavedRotary(torch.nn.Module):
    """`2d`, which transformers does not have: pair f turns with the row if f is even, with the column if odd."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def forward(self, hidden: Tensor, position_3BL: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [
            position_3BL[1 + f % 2].double() * self.theta ** (-2 * f / self.head_dim) for f in range(self.head_dim // 2)
        ]
        angles_BLD = torch.stack(pairs + pairs, dim=-1)
        return angles_BLD.cos().to(hidden.dtype), angles_BLD.sin().to(hidden.dtype)


class Reference(torch.nn.Module):
    """transformers' Qwen2 (Qwen2.5-VL's text model for `mrope`), SigLIP, and the new parts as plain modules."""

    def __init__(self, config: Config, checkpoints: Checkpoints) -> None:
        super().__init__()
        from laver_megatron.model.heads import seeded_normal

        self.config = config
        self.language = Qwen2ForCausalLM.from_pretrained(
            checkpoints.model, attn_implementation="eager", dtype=torch.float32
        )
        self.text_model = self._text_model(checkpoints)
        self.encoder = SiglipVisionModel.from_pretrained(checkpoints.encoder)
        width, hidden = self.encoder.config.hidden_size, self.language.config.hidden_size
        middle, out = config.objective.vision_head_hidden_size, config.objective.vision_head_output_size or hidden
        linear, gelu = torch.nn.Linear, torch.nn.GELU
        self.connector = torch.nn.Sequential(linear(width, hidden), gelu(), linear(hidden, hidden))
        self.vision_head = torch.nn.Sequential(
            linear(hidden, middle), gelu(), linear(middle, middle), gelu(), linear(middle, out, bias=False)
        )
        with torch.no_grad():
            for prefix, layers, gain in (("connector", self.connector, 1), ("vision_head", self.vision_head, 2)):
                for number, layer in enumerate(layers[::2], start=1):
                    name = f"{prefix}.linear_{number}.weight"
                    std = (gain / layer.in_features) ** 0.5
                    layer.weight.copy_(seeded_normal(name, tuple(layer.weight.shape), std, config.training.seed))
                    if layer.bias is not None:
                        layer.bias.zero_()
        self.mask_token = torch.nn.Parameter(seeded_normal("mask_token", (hidden,), 0.02, config.training.seed))

    def _text_model(self, checkpoints: Checkpoints) -> torch.nn.Module:
        if self.config.model.positions != "mrope":
            if self.config.model.positions == "2d":
                shape = checkpoints.shape
                self.language.model.rotary_emb = _InterleavedRotary(shape.kv_channels, shape.rope_theta)
            return self.language.model
        settings = self.language.config.to_dict()
        head_dim = checkpoints.shape.kv_channels
        section = [head_dim * share // 128 for share in (16, 24, 24)]
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": section}
        model = Qwen2_5_VLTextModel._from_config(
            Qwen2_5_VLTextConfig(**{k: v for k, v in settings.items() if k not in ("model_type", "architectures")}),
            attn_implementation="eager",
        )
        # The parameters themselves, so that gradients arrive in `self.language`.
        for name, parameter in self.language.model.named_parameters():
            module = model.get_submodule(name.rpartition(".")[0])
            assert getattr(module, name.rpartition(".")[2]).shape == parameter.shape
            setattr(module, name.rpartition(".")[2], parameter)
        return model

    def decode(self, embeddings_BLH: Tensor, mask_BLL: Tensor, positions: list) -> Tensor:
        """Final hidden states of a sequence under an explicit mask; positions: [B][L] of (t, row, col) or None."""
        mask_B1LL = torch.zeros_like(mask_BLL, dtype=torch.float32).masked_fill(~mask_BLL, -torch.inf).unsqueeze(1)
        position_3BL = torch.tensor([[p or (0, 0, 0) for p in pack] for pack in positions]).permute(2, 0, 1)
        position_ids = position_3BL[0] if self.config.model.positions == "1d" else position_3BL
        return self.text_model(
            inputs_embeds=embeddings_BLH, attention_mask=mask_B1LL, position_ids=position_ids, use_cache=False
        ).last_hidden_state

    def visual_tokens(self, images: list[Tensor]) -> list[Tensor]:
        """Connector outputs `[N, H]` of each image."""
        layer = -2 if self.config.model.encoder_feature_layer is None else self.config.model.encoder_feature_layer
        return [
            self.connector(self.encoder(image[None], output_hidden_states=True).hidden_states[layer][0])
            for image in images
        ]

    def forward(self, packs: PackBatch, masked_BS: Tensor) -> Outputs:
        config = self.config
        embeddings_BSH = self.language.model.embed_tokens(packs.tokens_BS)
        student, teacher = [], []
        for b, images in enumerate(packs.pixels):
            for number, tokens_NH in enumerate(self.visual_tokens(images)):
                place_S = packs.image_BS[b] == number
                embeddings_BSH = embeddings_BSH.index_put((torch.tensor(b), place_S.nonzero()[:, 0]), tokens_NH)
                if config.objective.laver:
                    positions = [
                        oracles.image_positions(
                            packs.row_BS[b][place_S].tolist(), packs.col_BS[b][place_S].tolist(), config.model.positions
                        )
                    ]
                    everything = torch.ones(1, len(tokens_NH), len(tokens_NH), dtype=torch.bool)
                    hidden_NH = torch.where(masked_BS[b][place_S][:, None], self.mask_token, tokens_NH)
                    student.append(self.vision_head(self.decode(hidden_NH[None], everything, positions)[0]))
                    with torch.no_grad():
                        teacher.append(self.vision_head(self.decode(tokens_NH[None], everything, positions)[0]))
        hidden_BSH = self.decode(
            embeddings_BSH,
            oracles.language_mask(packs, config.model.attention),
            oracles.language_positions(packs, config.model.positions),
        )
        nothing = [torch.zeros(0, self.vision_head[-1].out_features)]
        return Outputs(
            hidden_BSH,
            self.language.lm_head(hidden_BSH),
            torch.cat(student or nothing) if config.objective.laver else None,
            torch.cat(teacher or nothing) if config.objective.laver else None,
        )


@torch.no_grad()
def reference_outputs(config: Config, checkpoints: Checkpoints, micro_batches: MicroBatches) -> Outputs:
    """The reference on all micro-batches; the layout in `config` is without meaning here."""
    reference = Reference(config, checkpoints).eval()
    parts = [reference(packs, masked_BS) for packs, masked_BS in micro_batches]
    joined = {}
    for name in Outputs.__dataclass_fields__:
        tensors = [getattr(part, name) for part in parts]
        joined[name] = None if tensors[0] is None else torch.cat(tensors)
    return Outputs(**joined)


def assert_parity(ours: Outputs, reference: Outputs, tolerance: float = TOLERANCE) -> None:
    """Every output within `tolerance` (absolute); the hidden states cover text, image and padding positions."""
    for name in Outputs.__dataclass_fields__:
        mine, theirs = getattr(ours, name), getattr(reference, name)
        assert (mine is None) == (theirs is None), name
        if mine is None:
            continue
        assert mine.shape == theirs.shape, (name, mine.shape, theirs.shape)
        assert theirs.numel() == 0 or theirs.std() > 0.1, f"{name} are too small for the tolerance to mean anything"
        worst = (mine.cpu() - theirs).abs().max().item() if theirs.numel() else 0.0
        assert worst <= tolerance, f"{name} differ by {worst:.2e}, more than {tolerance:.0e}"
