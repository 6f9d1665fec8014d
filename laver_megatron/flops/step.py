"""FLOPs of one training step, as exact integers from shapes and counts.

Convention, which every figure made from this file uses:

- *Model* FLOPs: what the method needs, whatever the kernels do. Recomputed activations are left out
  (`hardware_flops` adds them), and so is what a dense attention kernel computes outside the mask.
- Only matrix products count: 2 m n k each. Norms, softmax, rotary, activations, losses and the optimizer don't.
- Only real tokens count, padding does not. Attention counts the exact mask area (the sum of span lengths over
  real queries), not the square of the sequence.
- The language head counts on every real LM token, not only on those that have a label, as in figures of others and in
  scaling laws; `num_label_tokens` counts it where its logits are needed, which is what is computed.
- Backward: one product for the gradient of the weights where they are trained, one for that of the input where
  something below needs it. So a trained decoder costs 3x its forward, a frozen one under a trained connector 2x
  (its attention 3x: both operands are activations), a frozen encoder 1x, the teacher 1x.
- Counts may be those of a micro-batch or of a global batch: everything is linear in them.

An "area" is a number of (query, key) pairs.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from laver_megatron.config.fields import Config
from laver_megatron.config.modules import MODULES
from laver_megatron.encoders.interface import EncoderShape
from laver_megatron.flops.encoder import EncoderFlops, EncoderWork, encoder_flops
from laver_megatron.hf.shape import ModelShape

PARTS = (
    "decoder_student",
    "attention",
    "lm_head",
    "reconstruction",
    "teacher",
    "vision_head",
    "gram",
    "connector",
    "encoder",
)
LAVER_TERMS = ("reconstruction", "teacher", "vision_head", "gram")


@dataclass(frozen=True)
class ModelFlops:
    """Forward FLOPs of each part per unit of work: one token, or one (query, key) pair. All layers together."""

    decoder_per_token: int
    mlp_per_token: int
    attention_per_pair: int
    lm_head_per_token: int
    vision_head_per_token: int
    gram_per_pair: int
    connector_first_per_token: int
    connector_second_per_token: int
    encoder: EncoderFlops


@dataclass(frozen=True)
class StepFlops:
    """Model FLOPs of a step, forward and backward, by part. `total` is the sum of the parts.

    Attributes:
        decoder_student: linear layers of the decoder on the LM tokens.
        attention: attention of the decoder on the LM tokens.
        lm_head: logits over the vocabulary.
        reconstruction: the student's decoder, attention included, on the masked visual tokens.
        teacher: the teacher's decoder, attention included, and its vision head; forward only.
        vision_head: the student's vision head.
        gram: inner products between the visual tokens of each image, student and teacher.
        connector: once, shared by student and teacher.
        encoder: once, shared by student and teacher.
        student_layers_forward: forward of the student's decoder layers on both streams; inside the parts above,
            kept for `hardware_flops`.
        student_attention_forward: the attention in it.
        student_mlp_forward: the MLPs in it.
    """

    decoder_student: int
    attention: int
    lm_head: int
    reconstruction: int
    teacher: int
    vision_head: int
    gram: int
    connector: int
    encoder: int
    student_layers_forward: int
    student_attention_forward: int
    student_mlp_forward: int

    @property
    def parts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in PARTS}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def laver_overhead(self) -> int:
        """What plain training on the same batches would not have cost."""
        return sum(self.parts[name] for name in LAVER_TERMS)


def matmul_flops(m: int, n: int, k: int) -> int:
    """One multiplication and one addition for each of the m n k terms."""
    return 2 * m * n * k


def decoder_layer_flops(shape: ModelShape) -> int:
    """Forward FLOPs of one decoder layer's linear layers for one token: QKV (grouped), projection, SwiGLU."""
    hidden, query_size = shape.hidden_size, shape.num_attention_heads * shape.kv_channels
    key_value_size = 2 * shape.num_query_groups * shape.kv_channels
    qkv = matmul_flops(1, query_size + key_value_size, hidden)
    projection = matmul_flops(1, hidden, query_size)
    return qkv + projection + mlp_flops(shape)


def mlp_flops(shape: ModelShape) -> int:
    """Of them those of SwiGLU's three matrices."""
    return 3 * matmul_flops(1, shape.ffn_hidden_size, shape.hidden_size)


def attention_flops(area: int, num_heads: int, head_size: int) -> int:
    """Forward FLOPs of one layer's attention over `area` pairs: the scores and the weighted sum of values.

    Grouped keys save memory, not products: every query head counts.
    """
    return 4 * area * num_heads * head_size


def vision_head_flops(hidden_size: int, head_hidden_size: int, output_size: int) -> int:
    """Forward FLOPs of the vision head for one token: hidden -> head hidden -> head hidden -> output."""
    return (
        matmul_flops(1, head_hidden_size, hidden_size)
        + matmul_flops(1, head_hidden_size, head_hidden_size)
        + matmul_flops(1, output_size, head_hidden_size)
    )


def model_flops(
    shape: ModelShape,
    *,
    vision_head_hidden_size: int = 2048,
    vision_head_output_size: int | None = None,
    encoder: EncoderShape | None = None,
    num_encoder_layers: int | None = None,
    connector_input_size: int | None = None,
) -> ModelFlops:
    """Forward FLOPs per token and per pair of every part of the model.

    Args:
        shape: the decoder.
        vision_head_hidden_size: width of the vision head's two hidden layers.
        vision_head_output_size: K; None is the decoder's hidden size.
        encoder: the image encoder, or None.
        num_encoder_layers: how many of its layers run, where the features are taken before the last; None: all.
        connector_input_size: width of the connector's input; None is that of the encoder's features, or without an
            encoder no connector at all.
    """
    hidden = shape.hidden_size
    output_size = hidden if vision_head_output_size is None else vision_head_output_size
    if encoder is not None:
        connector_input_size = connector_input_size or encoder.feature_size
    return ModelFlops(
        decoder_per_token=shape.num_layers * decoder_layer_flops(shape),
        mlp_per_token=shape.num_layers * mlp_flops(shape),
        attention_per_pair=shape.num_layers * attention_flops(1, shape.num_attention_heads, shape.kv_channels),
        lm_head_per_token=matmul_flops(1, shape.vocab_size, hidden),
        vision_head_per_token=vision_head_flops(hidden, vision_head_hidden_size, output_size),
        gram_per_pair=matmul_flops(1, 1, output_size),
        connector_first_per_token=matmul_flops(1, hidden, connector_input_size) if connector_input_size else 0,
        connector_second_per_token=matmul_flops(1, hidden, hidden) if connector_input_size else 0,
        encoder=encoder_flops(encoder, num_encoder_layers) if encoder else EncoderFlops(),
    )


def run_flops(config: Config, shape: ModelShape, encoder: EncoderShape | None) -> ModelFlops:
    """FLOPs of each part of a run's model per token and per pair."""
    target_size = None if encoder is None else encoder.target_size(config.objective.mim_target)
    return model_flops(
        shape,
        vision_head_hidden_size=config.objective.vision_head_hidden_size,
        vision_head_output_size=target_size or config.objective.vision_head_output_size,
        encoder=encoder,
        num_encoder_layers=None if encoder is None else encoder.num_layers_run(config.model.encoder_feature_layer),
    )


def step_flops(
    model: ModelFlops,
    *,
    num_tokens: int,
    lm_span_area: int,
    num_visual_tokens: int = 0,
    reconstruction_span_area: int = 0,
    num_images: int = 0,
    image_window_area: int = 0,
    num_label_tokens: int | None = None,
    laver: bool = True,
    gram: bool = True,
    frozen: Collection[str] = ("encoder",),
) -> StepFlops:
    """Model FLOPs of one training step over batches with these counts; the convention is at the top of the file.

    Args:
        model: from `model_flops`.
        num_tokens: real LM tokens, visual ones included.
        lm_span_area: their mask area (`model.spans.span_area` or `document_area`).
        num_visual_tokens: the visual tokens among them; each also goes once through the reconstruction stream and
            once through the teacher.
        reconstruction_span_area: sum over images of N^2.
        num_images: their number, which an encoder with class or register tokens asks for.
        image_window_area: pairs of visual tokens that share a window of the encoder's (`encoder_flops.window_area`).
        num_label_tokens: LM tokens that the LM head runs on; None: all.
        laver: False is plain LM training: no reconstruction stream, no teacher, no vision head, no Gram matrices.
        gram: False for `gram_loss: none`.
        frozen: names from `MODULES`. The token embedding and the LM head are frozen with the decoder, the [MASK]
            embedding with the heads.
    """
    unknown = set(frozen) - set(MODULES)
    if unknown:
        raise ValueError(f"unknown modules to freeze: {sorted(unknown)}; known are {list(MODULES)}")
    assert lm_span_area >= num_tokens >= num_visual_tokens, (lm_span_area, num_tokens, num_visual_tokens)
    assert reconstruction_span_area >= num_visual_tokens, (reconstruction_span_area, num_visual_tokens)
    trains = {name: name not in frozen for name in MODULES}
    images_need_gradient = trains["encoder"] or trains["connector"]
    lm_needs_gradient = images_need_gradient or trains["decoder"]
    masked_needs_gradient = lm_needs_gradient or trains["heads"]  # the [MASK] embedding

    num_head_tokens = num_tokens if num_label_tokens is None else num_label_tokens
    num_masked_stream = num_visual_tokens if laver else 0
    masked_area = reconstruction_span_area if laver else 0
    lm_linear = num_tokens * model.decoder_per_token
    lm_attention = lm_span_area * model.attention_per_pair
    masked_linear = num_masked_stream * model.decoder_per_token
    masked_attention = masked_area * model.attention_per_pair
    head = num_masked_stream * model.vision_head_per_token
    inner_products = masked_area * model.gram_per_pair if gram else 0

    return StepFlops(
        decoder_student=lm_linear * (1 + trains["decoder"] + lm_needs_gradient),
        attention=lm_attention * (1 + 2 * lm_needs_gradient),
        lm_head=num_head_tokens * model.lm_head_per_token * (1 + trains["decoder"] + lm_needs_gradient),
        reconstruction=masked_linear * (1 + trains["decoder"] + masked_needs_gradient)
        + masked_attention * (1 + 2 * masked_needs_gradient),
        teacher=masked_linear + masked_attention + head,
        vision_head=head * (1 + trains["heads"] + masked_needs_gradient),
        gram=inner_products * (1 + 2 * masked_needs_gradient) + inner_products,
        connector=_connector_flops(model, num_visual_tokens, trains),
        encoder=_encoder_flops(
            model, EncoderWork(num_images, num_visual_tokens, reconstruction_span_area, image_window_area), trains
        ),
        student_layers_forward=lm_linear + lm_attention + masked_linear + masked_attention,
        student_attention_forward=lm_attention + masked_attention,
        student_mlp_forward=(num_tokens + num_masked_stream) * model.mlp_per_token,
    )


def _connector_flops(model: ModelFlops, num_visual_tokens: int, trains: dict[str, bool]) -> int:
    first = model.connector_first_per_token * (1 + trains["connector"] + trains["encoder"])
    second_input = trains["connector"] or trains["encoder"]
    second = model.connector_second_per_token * (1 + trains["connector"] + second_input)
    return num_visual_tokens * (first + second)


def _encoder_flops(model: ModelFlops, work: EncoderWork, trains: dict[str, bool]) -> int:
    assert work.num_images or not (work.num_visual_tokens and model.encoder.num_prefix_tokens)
    embedding, behind = model.encoder.forward(work)  # pixels need no gradient
    return embedding * (1 + trains["encoder"]) + behind * (1 + 2 * trains["encoder"])


def hardware_flops(step: StepFlops, granularity: str | None = None, modules: Collection[str] | None = None) -> int:
    """Model FLOPs plus recomputation: a second forward of the student's decoder layers (`full`), or of some of their
    `modules` (`selective`; by default core_attn). Norms have no products.

    The teacher keeps no activations, so it is never recomputed. Still the exact mask area and real tokens only.
    """
    if granularity not in (None, "full", "selective"):
        raise ValueError(f"recompute must be full, selective or None, not {granularity!r}")
    if granularity != "selective":
        return step.total + (step.student_layers_forward if granularity else 0)
    of_module = {"core_attn": step.student_attention_forward, "mlp": step.student_mlp_forward, "layernorm": 0}
    return step.total + sum(of_module[module] for module in modules or ("core_attn",))


def tflops_per_gpu(flops: int, seconds: float, num_gpus: int) -> float:
    """10^12 FLOPs per second and device; `flops` are those of all `num_gpus` devices together."""
    return flops / seconds / num_gpus / 1e12


def document_area(num_tokens: int, image_sizes: Iterable[int], attention: str = "mixed") -> int:
    """Mask area of one document without its spans: the causal triangle, and under mixed attention each image's
    strict upper triangle on top. `image_sizes` are its images' numbers of visual tokens."""
    if attention not in ("mixed", "causal"):
        raise ValueError(f"attention must be mixed or causal, not {attention!r}")
    area = num_tokens * (num_tokens + 1) // 2
    if attention == "mixed":
        area += sum(size * (size - 1) // 2 for size in image_sizes)
    return area
