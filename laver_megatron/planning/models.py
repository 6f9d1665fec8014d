"""Shapes of the models that are planned for by name: Qwen2.5 as released, one larger of the family, and SigLIP2.

Qwen2.5's numbers are those of config.json in Qwen/Qwen2.5-<size>-Instruct on the Hugging Face hub, the last those of
Qwen/Qwen1.5-110B-Chat, the encoder's those of google/siglip2-so400m-patch14-384. A directory can be named
instead.
"""

from __future__ import annotations

from pathlib import Path

from laver_megatron.config.fields import ConfigError
from laver_megatron.encoders.interface import EncoderShape
from laver_megatron.hf.shape import ModelShape, read_model_shape

# layers, width, MLP width, query heads, key/value heads, words, tied
_QWEN = {
    "0.5b": (24, 896, 4864, 14, 2, 151936, True),
    "1.5b": (28, 1536, 8960, 12, 2, 151936, True),
    "3b": (36, 2048, 11008, 16, 2, 151936, True),
    "7b": (28, 3584, 18944, 28, 4, 152064, False),
    "14b": (48, 5120, 13824, 40, 8, 152064, False),
    "32b": (64, 5120, 27648, 40, 8, 152064, False),
    "72b": (80, 8192, 29568, 64, 8, 152064, False),
    "110b": (80, 8192, 49152, 64, 8, 152064, False),
}
REPOSITORIES = {size: f"Qwen/Qwen2.5-{size.upper()}-Instruct" for size in _QWEN} | {"110b": "Qwen/Qwen1.5-110B-Chat"}
# To do before training on these weights.
REMARKS = {
    "110b": "The tokenizer of Qwen1.5-110B-Chat lacks <|vision_start|>, <|vision_end|> and <|image_pad|>. Put "
    "Qwen2.5-72B-Instruct's beside the weights."
}
MODELS = {
    size: ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=hidden // heads,
        vocab_size=words,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
    )
    for size, (layers, hidden, ffn, heads, groups, words, tied) in _QWEN.items()
}

SIGLIP2 = EncoderShape(
    model_type="siglip_vision_model",
    feature_size=1152,
    num_layers=27,
    hidden_size=1152,
    intermediate_size=4304,
    patch_size=14,
    image_size=(384, 384),
    default_feature_layer=-2,
)
SIGLIP2_REPOSITORY = "google/siglip2-so400m-patch14-384"


def encoder_sizes(shape: EncoderShape) -> dict[str, tuple[int, ...]]:
    """Tensors of SigLIP's vision model in the order of its modules, its pooling head included."""
    hidden, middle = shape.hidden_size, shape.intermediate_size
    assert shape.model_type == "siglip_vision_model" and shape.num_tokens is not None
    square, vector = (hidden, hidden), (hidden,)
    sizes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (hidden, shape.num_channels, shape.patch_size, shape.patch_size),
        "embeddings.patch_embedding.bias": vector,
        "embeddings.position_embedding.weight": (shape.num_tokens, hidden),
    }
    mlp = {"fc1.weight": (middle, hidden), "fc1.bias": (middle,), "fc2.weight": (hidden, middle), "fc2.bias": vector}
    norm = {"weight": vector, "bias": vector}
    for layer in range(shape.num_layers):
        start = f"encoder.layers.{layer}."
        sizes |= {f"{start}layer_norm1.{name}": size for name, size in norm.items()}
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            sizes |= {f"{start}self_attn.{projection}.weight": square, f"{start}self_attn.{projection}.bias": vector}
        sizes |= {f"{start}layer_norm2.{name}": size for name, size in norm.items()}
        sizes |= {f"{start}mlp.{name}": size for name, size in mlp.items()}
    sizes |= {f"post_layernorm.{name}": size for name, size in norm.items()}
    sizes |= {"head.probe": (1, 1, hidden), "head.attention.in_proj_weight": (3 * hidden, hidden)}
    sizes |= {"head.attention.in_proj_bias": (3 * hidden,), "head.attention.out_proj.weight": square}
    sizes |= {"head.attention.out_proj.bias": vector}
    sizes |= {f"head.layernorm.{name}": size for name, size in norm.items()}
    return sizes | {f"head.mlp.{name}": size for name, size in mlp.items()}


def find_model(name: str) -> ModelShape:
    """A shape by its size's name, or that of a directory with config.json.

    Raises:
        ConfigError: neither.
    """
    if name.lower() in MODELS:
        return MODELS[name.lower()]
    if Path(name).is_dir():
        return read_model_shape(name)
    raise ConfigError([f"model {name!r} is not known; choose one of {', '.join(MODELS)}, or name a directory"])
