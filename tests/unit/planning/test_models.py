"""The shapes that plans are made for by name are those of the published checkpoints."""

import json
from math import prod

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig

from laver_megatron.config.fields import ConfigError
from laver_megatron.encoders import encoder_tensor_sizes, read_encoder
from laver_megatron.planning.hardware import GIB, GPUS, find_gpu
from laver_megatron.planning.models import MODELS, SIGLIP2, encoder_sizes, find_model

# Values in the published safetensors files, each once.
PUBLISHED = {
    "0.5b": 494_032_768,
    "1.5b": 1_543_714_304,
    "3b": 3_085_938_688,
    "7b": 7_615_616_512,
    "14b": 14_770_033_664,
    "32b": 32_763_876_352,
    "72b": 72_706_203_648,
    "110b": 111_209_914_368,
}


@pytest.mark.parametrize("size", MODELS)
def test_as_many_values_as_published(size):
    shape = MODELS[size]
    config = Qwen2Config(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[size]
    assert shape.kv_channels * shape.num_attention_heads == shape.hidden_size


def test_the_encoders_tensors_are_transformers_own(tmp_path):
    settings = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
        patch_size=14,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**settings.to_dict(), "model_type": "siglip_vision_model"}))
    assert read_encoder(tmp_path) == SIGLIP2
    built = {name.removeprefix("vision_model."): size for name, size in encoder_tensor_sizes(tmp_path).items()}
    assert list(built.items()) == list(encoder_sizes(SIGLIP2).items())
    assert sum(prod(size) for size in built.values()) == 428_225_600


def test_directories_serve_as_models(demo_dir):
    assert find_model(str(demo_dir / "model")).num_layers == 4
    with pytest.raises(ConfigError, match="'8b' is not known; choose one of 0.5b, 1.5b"):
        find_model("8b")


def test_gpus():
    assert find_gpu("h100-80gb") == GPUS["h100-80gb"]
    changed = find_gpu("h100-80gb", memory_gib=64, tflops=800, bandwidth_gb=100, node_size=4)
    assert (changed.memory_bytes, changed.peak_flops, changed.network_bandwidth) == (64 * GIB, 8e14, 1e11)
    assert (changed.node_size, changed.node_bandwidth) == (4, GPUS["h100-80gb"].node_bandwidth)
    other = find_gpu("mine", memory_gib=96, tflops=400, bandwidth_gb=25)
    assert (other.name, other.memory_bytes, other.peak_flops) == ("mine", 96 * GIB, 4e14)
    assert other.node_bandwidth == other.network_bandwidth == 25e9
    with pytest.raises(ConfigError, match="'h100' is not known; choose one of a100-40gb.*--gpu-tflops, --bandwidth"):
        find_gpu("h100", memory_gib=80)
    with pytest.raises(ConfigError, match="--gpu-tflops is -1"):
        find_gpu("h100-80gb", tflops=-1)
