"""FLOPs of every kind of encoder against PyTorch's counter on transformers' own class, for images of several sizes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from laver_megatron.data.batch.packing import image_grids
from laver_megatron.demo.encoders import KINDS, save_encoder
from laver_megatron.encoders import build_encoder, open_preprocessor, read_encoder
from laver_megatron.flops.encoder import EncoderWork, encoder_flops, window_area
from laver_megatron.flops.step import model_flops, step_flops
from laver_megatron.hf.shape import ModelShape
from tests.encoders import pictures
from tests.packs import pack

DECODER = ModelShape(
    num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=2, kv_channels=4,
    vocab_size=16, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True, max_position_embeddings=64,
)  # fmt: skip


def prepared(directory):
    """Encoder with attention that the counter sees, images and their work."""
    encoder = build_encoder(directory, None, torch.float32, load_weights=True)
    if hasattr(encoder, "model"):
        encoder.model.set_attn_implementation("eager")
    preprocessor = open_preprocessor(directory)
    grids = [preprocessor.grid(*image.size) for image in pictures()]
    return encoder, [preprocessor(image) for image in pictures()], EncoderWork.of_grids(grids, read_encoder(directory))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [True, False])
def test_a_step_matches_the_counter(tmp_path, kind, frozen):
    save_encoder(tmp_path / "encoder", kind)
    encoder, images, work = prepared(tmp_path / "encoder")
    shape = read_encoder(tmp_path / "encoder")
    layer = getattr(encoder, "feature_layer", -1)
    if kind in ("siglip", "clip"):  # the last layer and the pooling head run for nothing, and do not count
        encoder.feature_layer, layer = -1, -1
        if hasattr(encoder.model, "head"):
            encoder.model.use_head = False
    encoder.requires_grad_(not frozen)
    with FlopCounterMode(display=False) as counter:
        features = encoder(images)
        if features.requires_grad:
            features.sum().backward()
    assert features.requires_grad == (not frozen and kind != "patches") and layer == -1
    model = model_flops(DECODER, encoder=shape)
    step = step_flops(
        model,
        num_tokens=work.num_visual_tokens,
        lm_span_area=work.area,
        num_visual_tokens=work.num_visual_tokens,
        reconstruction_span_area=work.area,
        num_images=work.num_images,
        image_window_area=work.window_area,
        frozen=("encoder",) if frozen else (),
    )
    assert counter.get_total_flops() == step.encoder
    assert (step.encoder == 0) == (kind == "patches")
    assert model.connector_first_per_token == 2 * 8 * shape.feature_size


@pytest.mark.parametrize("num_layers", [0, 1, 2, 3])
def test_fewer_layers(tmp_path, num_layers):
    """Of Qwen's three layers the second sees the whole image."""
    save_encoder(tmp_path / "encoder", "qwen2_5_vl")
    shape = read_encoder(tmp_path / "encoder")
    some, whole = encoder_flops(shape, num_layers), encoder_flops(shape)
    assert some.layers_per_token * 3 == whole.layers_per_token * num_layers
    assert some.attention_per_pair == (whole.attention_per_pair if num_layers > 1 else 0)
    assert some.attention_per_window_pair == 4 * 64 * (0, 1, 1, 2)[num_layers]


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (5, 3), (3, 9), (8, 2)])
def test_windows_match_a_loop(grid):
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    pairs = sum((a // 4, b // 4) == (c // 4, d // 4) for a, b in places for c, d in places)
    assert window_area([grid], 4) == pairs
    assert window_area([grid, grid], 4) == 2 * pairs and window_area([grid], None) == 0


def test_grids_of_packs():
    first, second = pack([3, (2, 3), (1, 4), 2], [(5, 1)], seq_length=24), pack([21, (1, 1), 2])
    assert image_grids(first) == [(2, 3), (1, 4), (5, 1)]
    tables = {name for name in vars(first) if name.endswith("_BS")}
    both = type(first)(
        **{name: torch.cat([getattr(first, name), getattr(second, name)]) for name in tables}, pixels=[], keys=[]
    )
    assert image_grids(both) == [(2, 3), (1, 4), (5, 1), (1, 1)]
