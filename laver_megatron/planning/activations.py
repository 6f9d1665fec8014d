"""Bytes that a pipeline stage keeps between forward and backward pass, by what keeps them.

Letters: B packs, S language tokens, V visual slots, L the student's sequence (S + V, or S without LaVer), H width.

Everything is per rank, and of one micro-batch unless it says otherwise. What autograd saves depends on the kernels:

    plain   on the CPU: dense attention, norms in fp32 and not fused. Held against
            autograd's saved tensors in the tests.
    fused   on a GPU with TransformerEngine: FlashAttention, fused norms and SwiGLU. Never measured.

Without gradients (the teacher, a frozen encoder) nothing is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from laver_megatron.config.fields import Config
from laver_megatron.hf.shape import ModelShape
from laver_megatron.planning.memory import FP32_BYTES, value_bytes
from laver_megatron.planning.pipeline import chunks_in_flight, layers_of_stages
from laver_megatron.planning.workload import Workload

_INT64_BYTES, _INT32_BYTES = 8, 4
# The square of an image's visual tokens, kept by the Gram loss: two inner products, their cosines, the clipped
# difference (fp32), and the diagonal (bool).
_GRAM_BYTES_PER_PAIR = 4 * FP32_BYTES + 1


@dataclass(frozen=True)
class ActivationBytes:
    """Of one rank, all its micro-batches in flight.

    Attributes:
        layers: the decoder's.
        inputs: embedding, encoder, connector and what came from the previous stage.
        heads: final norm and vision head.
        logits: the language model's, and their gradient.
        losses: the visual ones.
        workspace: one layer while it is recomputed or runs backward.
    """

    layers: int = 0
    inputs: int = 0
    heads: int = 0
    logits: int = 0
    losses: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True)
class Saved:
    """What autograd saves for each part in one micro-batch, arguments aside."""

    config: Config
    shape: ModelShape
    workload: Workload
    fused: bool

    @property
    def value_bytes(self) -> int:
        return value_bytes(self.config)

    @property
    def tp(self) -> int:
        return self.config.parallel.tensor_model_parallel_size

    @property
    def sequence_ranks(self) -> int:
        """Ranks that divide a sequence between the tensor-parallel parts."""
        return self.tp if self.config.parallel.sequence_parallel else 1

    @property
    def num_text_slots(self) -> int:
        """B S."""
        return self.config.data.micro_batch_size * self.config.data.seq_length

    @property
    def num_visual_slots(self) -> int:
        """B V."""
        return self.config.data.micro_batch_size * self.config.data.visual_seq_length

    @property
    def num_visual_tokens(self) -> int:
        return int(self.config.data.micro_batch_size * self.workload.num_visual_tokens)

    @property
    def num_labels(self) -> int:
        """At most: every token but the visual ones."""
        return self.num_text_slots - self.num_visual_tokens

    @property
    def num_tokens(self) -> int:
        """The student's, of the whole sequence, padding included: B L."""
        return self.num_text_slots + (self.num_visual_slots if self.config.objective.laver else 0)

    @property
    def num_local_tokens(self) -> int:
        """Those that lie on this rank between the tensor-parallel parts."""
        return self.num_tokens // self.sequence_ranks

    def norm(self) -> int:
        """A norm over H: its input and the scale; where it is not fused the input in fp32, and the result."""
        values = self.num_local_tokens * self.shape.hidden_size
        scale = FP32_BYTES * self.num_local_tokens
        return values * (self.value_bytes if self.fused else 2 * FP32_BYTES) + scale

    def layer(self) -> int:
        """One decoder layer, nothing recomputed."""
        hidden = self.num_local_tokens * self.shape.hidden_size * self.value_bytes
        return 2 * (self.norm() + hidden) + self.attention(selective=False) + self.mlp()

    def mlp(self) -> int:
        """Behind the MLP's input: gate and up, and SwiGLU's output."""
        return 3 * self.num_tokens * self.shape.ffn_hidden_size // self.tp * self.value_bytes

    def attention(self, *, selective: bool) -> int:
        """From the QKV projection to the output projection's input. selective: the core attention is recomputed."""
        config = self.config
        is_one_pack = config.data.micro_batch_size == 1
        shape, tp, width = self.shape, self.tp, self.value_bytes
        tokens = self.num_tokens
        query = tokens * shape.num_attention_heads * shape.kv_channels // tp * width
        key = tokens * max(shape.num_query_groups // tp, 1) * shape.kv_channels * width
        # Without a copy of its own the value keeps the whole projection alive. FlashAttention lays several packs one
        # behind the other, in copies; of one pack it takes views.
        has_copies = self.fused and not selective and not is_one_pack
        inputs = query + 2 * key if has_copies else 2 * query + 3 * key
        kept = inputs + query  # and the output projection's input
        if selective:
            return kept
        statistics = FP32_BYTES * tokens * shape.num_attention_heads // tp
        # FlashAttention's output is that input, where there is but one segment of one pack.
        is_input = self.fused and is_one_pack and not config.objective.laver
        return kept + statistics + (0 if is_input else query)

    def layers(self, num_layers: int) -> int:
        """Decoder layers under the configured recomputation."""
        # The spans, and the cosines and sines of the rotary angles, are the same for all layers.
        shared = self.num_tokens * (2 * _INT32_BYTES + self.shape.kv_channels * self.value_bytes)
        if self.config.parallel.recompute_granularity == "full":  # every layer's input
            return num_layers * self.num_local_tokens * self.shape.hidden_size * self.value_bytes + shared
        if not self.fused:  # and the masks: of text alone, which sees half of its document on average
            shared += self.num_labels * self.config.data.seq_length // 2 * self.value_bytes
        if self.config.parallel.recompute_granularity == "selective":
            return num_layers * (self.layer() - self._recomputed()) + shared
        return num_layers * self.layer() + shared

    def _recomputed(self) -> int:
        """What a layer does not keep because `recompute_modules` are computed again."""
        modules, dropped = self.config.engine.recompute_modules or ("core_attn",), 0
        if "core_attn" in modules:
            dropped += self.attention(selective=False) - self.attention(selective=True)
        # Fused norms are part of the linear layers behind them. Plain ones keep their input in either case.
        if "layernorm" in modules and not self.fused:
            dropped += 2 * self.norm()
        if "mlp" in modules:
            dropped += self.mlp()
        return dropped

    def input_side(self) -> int:
        """Embedding and connector of the first stage; with a trained encoder its layers, roughly."""
        config, work, width = self.config, self.workload, self.value_bytes
        if work.encoder is None:
            return 0
        # Whole images are divided over the ranks.
        most = -(-config.data.micro_batch_size * work.num_images // self.tp)
        own = most * work.image_tokens
        connector = own * (work.encoder.feature_size + 2 * self.shape.hidden_size) * width
        indices = _INT64_BYTES * (self.num_text_slots + 2 * self.num_visual_tokens)
        encoder = 0
        if "encoder" not in config.model.freeze:
            patches = own * work.encoder.merge_size**2
            per_layer = 10 * work.encoder.hidden_size + 2 * work.encoder.intermediate_size
            encoder = patches * work.encoder.num_layers * per_layer * width
        return connector + indices + encoder

    def received(self) -> int:
        """What a later stage got from the one before it: the student's part and the teacher's."""
        teacher = self.num_visual_slots if self.config.objective.laver else 0
        return (self.num_tokens + teacher) // self.sequence_ranks * self.shape.hidden_size * self.value_bytes

    def heads(self) -> int:
        """Final norm, the rows of its output that the heads read, and the vision head."""
        of_language = self.norm() + self.num_labels * self.shape.hidden_size * self.value_bytes
        if not self.config.objective.laver:
            return of_language
        hidden = self.num_visual_tokens * self.shape.hidden_size
        middle = self.num_visual_tokens * self.config.objective.vision_head_hidden_size
        return of_language + (hidden + 2 * (middle // self.tp + middle)) * self.value_bytes

    def logits(self) -> int:
        """Over this rank's words, at the labels."""
        return self.value_bytes * self.num_labels * self.shape.vocab_size // self.tp

    def losses(self) -> int:
        """Of the visual objective: masked tokens' logits, and what the Gram loss keeps of every image."""
        config, work = self.config, self.workload
        if not config.objective.laver:
            return 0
        output = (config.objective.vision_head_output_size or self.shape.hidden_size) // self.tp
        tokens = self.num_visual_tokens
        masked = int(config.objective.mask_ratio * tokens) * 2 * FP32_BYTES * output
        if config.objective.mim_target != "latent":
            masked += self.num_visual_tokens * output * self.tp * self.value_bytes  # gathered before it is divided
        if config.objective.gram_loss == "none":
            return masked
        in_fp32 = tokens * output * FP32_BYTES  # for the inner products
        return masked + in_fp32 + config.data.micro_batch_size * work.image_area * _GRAM_BYTES_PER_PAIR


def activations_of_stage(
    config: Config, shape: ModelShape, workload: Workload, num_micro_batches: int, stage: int, *, fused: bool
) -> ActivationBytes:
    """The most that a pipeline stage holds at once. num_micro_batches: of one iteration."""
    saved = Saved(config, shape, workload, fused)
    chunks = layers_of_stages(config, shape.num_layers)
    pp, in_flight = len(chunks), chunks_in_flight(config, shape.num_layers, num_micro_batches, stage)
    num_chunks = len(chunks[stage])
    is_first, is_last = stage == 0, stage == pp - 1
    # Under the interleaved schedule the first chunk alone has the input side: its share of what is in flight.
    first_chunks = -(-in_flight // num_chunks)
    received = in_flight - first_chunks if is_first else in_flight
    logits = losses = heads = 0
    if is_last:
        heads, losses = saved.heads(), saved.losses()
        logits = 2 * saved.logits()  # and their gradient
    return ActivationBytes(
        layers=in_flight * saved.layers(chunks[stage][0]),
        inputs=first_chunks * saved.input_side() * is_first + received * saved.received(),
        heads=heads,
        logits=logits,
        losses=losses,
        workspace=saved.layer(),
    )
