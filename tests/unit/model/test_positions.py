"""Positions against a slow walk over the tokens, Megatron-Core's angles and transformers' Qwen2.5-VL."""

import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from laver_megatron.model.positions import (
    frequency_axes,
    language_positions,
    reconstruction_positions,
    rotary_angles,
)
from laver_megatron.runtime.backend import use_backend
from tests import oracles
from tests.packs import LAYOUTS

ALL = ["1d", "2d", "mrope"]


@pytest.mark.parametrize("positions", ALL)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_language_positions(layout, positions):
    packs = LAYOUTS[layout]()
    position_3BL = language_positions(packs.document_BS, packs.image_BS, packs.row_BS, packs.col_BS, positions)
    assert position_3BL.dtype == torch.int64 and position_3BL.shape == (3, *packs.document_BS.shape)
    for index, expected in enumerate(oracles.language_positions(packs, positions)[0]):
        if expected is not None:
            assert tuple(position_3BL[:, 0, index].tolist()) == expected, index
    assert position_3BL.min() >= 0 and position_3BL.max() < 2 * packs.document_BS.shape[1]


def test_example_of_the_docstring():
    packs = LAYOUTS["two images in a document"]()
    position_3BL = language_positions(packs.document_BS, packs.image_BS, packs.row_BS, packs.col_BS, "2d")
    assert position_3BL[0, 0, 2:10].tolist() == [2, 3, 3, 3, 3, 3, 3, 6]
    assert position_3BL[1, 0, 2:10].tolist() == [2, 3, 3, 3, 4, 4, 4, 6]
    assert position_3BL[2, 0, 2:10].tolist() == [2, 3, 4, 5, 3, 4, 5, 6]


@pytest.mark.parametrize("positions", ALL)
def test_reconstruction_positions(positions):
    # A 2 x 3 image, a 3 x 1 image, padding.
    image = torch.tensor([[0] * 6 + [1] * 3 + [-1] * 2])
    row = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 1, 2, 0, 0]])
    col = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0]])
    position_3BV = reconstruction_positions(image, row, col, positions)
    count = [0, 1, 2, 3, 4, 5, 0, 1, 2]
    expected = [count] * 3 if positions == "1d" else [[0] * 9, row[0, :9].tolist(), col[0, :9].tolist()]
    assert position_3BV[:, 0, :9].tolist() == expected


@pytest.mark.parametrize("positions", ALL)
def test_text_turns_as_in_plain_rope(positions):
    packs = LAYOUTS["text only"]()
    position_3BL = language_positions(packs.document_BS, packs.image_BS, packs.row_BS, packs.col_BS, positions)
    angles_LB1D = rotary_angles(position_3BL, 16, 1e6, positions)
    index_L = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1, 2])
    plain = torch.outer(index_L.double(), 1e6 ** (-torch.arange(0, 16, 2).double() / 16)).repeat(1, 2)
    # fp32 angles up to 6 rad.
    torch.testing.assert_close(angles_LB1D[:10, 0, 0].double(), plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("head_dim, section", [(128, [16, 24, 24]), (64, [8, 12, 12]), (16, [2, 3, 3])])
def test_mrope_angles_are_megatrons(head_dim, section):
    use_backend()
    from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding

    packs = LAYOUTS["wide and tall images"]()
    position_3BL = language_positions(packs.document_BS, packs.image_BS, packs.row_BS, packs.col_BS, "mrope")
    device = torch.cuda.current_device()
    theirs = MultimodalRotaryEmbedding(head_dim, 1.0, rotary_base=1_000_000)(position_3BL.to(device), section)
    ours = rotary_angles(position_3BL.to(device), head_dim, 1e6, "mrope")
    assert ours.dtype == torch.float32 and ours.shape == theirs.shape
    # The same product in fp32, by multiplication here and by a matrix product there.
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_2d_angles():
    """Even pairs turn with the row, odd pairs with the column, every pair at its own frequency."""
    position_3BL = torch.tensor([[[9]], [[2]], [[5]]])
    angles_D = rotary_angles(position_3BL, 8, 100.0, "2d")[0, 0, 0]
    pairs = [2.0, 5 / 100**0.25, 2 / 100**0.5, 5 / 100**0.75]
    torch.testing.assert_close(angles_D, torch.tensor(pairs * 2))


def test_axes_of_the_frequencies():
    assert frequency_axes(64, "mrope").bincount().tolist() == [16, 24, 24]
    assert frequency_axes(64, "mrope").diff().min() >= 0
    assert frequency_axes(8, "2d").tolist() == [1, 2] * 4
    with pytest.raises(ValueError, match="'1d', '2d' or 'mrope', got '3d'"):
        frequency_axes(8, "3d")


def test_positions_are_those_of_qwen2_5_vl():
    """transformers' get_rope_index on a prompt of text and two images (grids before its 2 x 2 merge)."""
    packs = LAYOUTS["two images in a document"]()
    length = 3 + 6 + 2 + 6 + 4
    image_BS = packs.image_BS[:, :length]
    config = Qwen2_5_VLConfig()
    config.vision_config.spatial_merge_size = 2
    model = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = config
    theirs, _ = model.get_rope_index(
        packs.tokens_BS[:, :length],
        mm_token_type_ids=(image_BS >= 0).int(),
        image_grid_thw=torch.tensor([[1, 4, 6], [1, 6, 4]]),
    )
    ours = language_positions(packs.document_BS, packs.image_BS, packs.row_BS, packs.col_BS, "mrope")
    assert torch.equal(ours[:, :, :length], theirs)
