"""The kernels `dense` and `flex` against softmax written out, and the block mask against the mask it stands for.

Letters: B packs, L tokens, A query heads, G key/value heads, D head width.
"""

import math
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from laver_megatron.config.capabilities import Capabilities
from laver_megatron.model import attention
from laver_megatron.model.attention import (
    FLEX_BLOCK_TOKENS,
    TILE_QUERIES,
    SpanAttention,
    block_mask_from_spans,
    cached,
    dense_tiles,
    resolve_kernel,
)
from laver_megatron.model.spans import concatenate_spans, language_spans, reconstruction_spans, spans_to_mask
from tests.packs import LAYOUTS, pack, padding, stack

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def core(kernel, segments):
    return SpanAttention(SimpleNamespace(), 1, kernel=kernel, segments=segments)


def qkv(length, *, num_packs=1, heads=4, groups=2, width=16, requires_grad=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, num_packs, h, width) for h in (heads, groups, groups)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_(requires_grad) for s in shapes]


def naive(query, key, value, mask_BLL):
    """Softmax attention, one pack, head and query at a time; query head h reads key/value head h // (A / G)."""
    length, num_packs, heads, width = query.shape
    per_group = heads // key.shape[2]
    rows = []
    for i in range(length):
        outputs = []
        for b in range(num_packs):
            seen = mask_BLL[b, i].nonzero()[:, 0]
            for h in range(heads):
                scores = key[seen, b, h // per_group] @ query[i, b, h] / math.sqrt(width)
                outputs.append(scores.softmax(0) @ value[seen, b, h // per_group])
        rows.append(torch.cat(outputs).view(num_packs, heads * width))
    return torch.stack(rows)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_is_softmax_over_the_span(layout, groups):
    packs = LAYOUTS[layout]()
    spans = language_spans(packs.document_BS, packs.image_BS, "mixed")
    length = spans.shape[2]
    query, key, value = qkv(length, groups=groups)
    ours = core("dense", (length,))(query, key, value, spans)
    # fp32 sums over at most 32 keys.
    torch.testing.assert_close(ours, naive(query, key, value, spans_to_mask(spans)), atol=1e-5, rtol=1e-5)


def streams(num_packs=2):
    packs = stack(*[LAYOUTS[n]() for n in ("packed documents", "hole of padding")][:num_packs])
    language = language_spans(packs.document_BS, packs.image_BS, "mixed")
    image_BV = torch.tensor([[0] * 4 + [1] * 3 + [-1], [0] * 4 + [1] * 2 + [-1] * 2])[:num_packs]
    return language, reconstruction_spans(image_BV)


def test_segments_change_nothing_but_the_work():
    """Language and reconstruction part together: computed apart, computed as one, and written out."""
    spans = concatenate_spans(*streams())
    length = spans.shape[2]
    inputs = qkv(length, num_packs=2, requires_grad=True)
    whole = core("dense", (length,))(*inputs, spans)
    apart = core("dense", (20, 8))(*inputs, spans)
    torch.testing.assert_close(apart, whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(apart, naive(*inputs, spans_to_mask(spans)), atol=1e-5, rtol=1e-5)
    weights = torch.randn(apart.shape, generator=torch.Generator().manual_seed(1))
    of_whole, of_apart = (torch.autograd.grad((x * weights).sum(), inputs, retain_graph=True) for x in (whole, apart))
    for one, other in zip(of_whole, of_apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_dense_gradients_in_fp64():
    language, visual = streams(1)
    spans = concatenate_spans(language, visual)
    inputs = qkv(28, heads=2, groups=1, width=4, requires_grad=True, dtype=torch.float64)
    ours = core("dense", (20, 8))(*inputs, spans)
    theirs = naive(*inputs, spans_to_mask(spans))
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = [torch.autograd.grad((x * weights).sum(), inputs) for x in (ours, theirs)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-10)


# Packs that cross, touch and fill blocks of 128 tokens.
LONG = {
    "one block": lambda: pack([20, (8, 8), 44]),
    "less than a block": lambda: pack([3, (4, 4), 30], [9]),
    "several blocks, one document": lambda: pack([384]),
    "image over block edges": lambda: pack([100, (16, 16), 28]),
    "image of exactly a block": lambda: pack([128, (8, 16), 128]),
    "packed, odd length": lambda: pack([50, (10, 10), 7], padding(40), [130], [1, (3, 50), 2], seq_length=555),
    "one past a block": lambda: pack([129]),
    "image to the end of an odd length": lambda: pack([(12, 20)]),
    "mostly padding": lambda: pack([5], seq_length=300),
}

# Where in them a text longer than a tile begins a document.
TRIANGLES = {
    "several blocks, one document": [(0, 384)],
    "image over block edges": [(0, 100)],
    "image of exactly a block": [(0, 128)],
    "packed, odd length": [(197, 327)],
    "one past a block": [(0, 129)],
}


def long_spans(layout):
    packs = LONG[layout]()
    return language_spans(packs.document_BS, packs.image_BS, "mixed")


@pytest.mark.parametrize("layout", LONG)
def test_flex_forward_equals_dense(layout):
    spans = long_spans(layout)
    length = spans.shape[2]
    inputs = qkv(length, width=16)
    dense, flex = (core(kernel, (length,))(*inputs, spans) for kernel in ("dense", "flex"))
    # fp32 sums over up to 555 keys, in another order.
    torch.testing.assert_close(flex, dense, atol=1e-5, rtol=1e-5)


def listed_blocks(counts, indices, num_blocks):
    """bool [B, Q, K] from a BlockMask's lists, refusing blocks listed twice."""
    listed = torch.zeros(*counts.shape, num_blocks, dtype=torch.int)
    for place in torch.cartesian_prod(*[torch.arange(n) for n in counts.shape]).view(-1, counts.ndim).tolist():
        for number in range(int(counts[tuple(place)])):
            listed[(*place, int(indices[(*place, number)]))] += 1
    assert listed.max() <= 1
    return listed[:, 0].bool()


@pytest.mark.parametrize("layout", LONG)
def test_block_mask_stands_for_the_mask(layout):
    """Full blocks hold no forbidden pair and no position past the end, partial blocks every other allowed
    pair, no block is listed in vain, and inside partial blocks mask_mod is the mask."""
    spans = long_spans(layout)
    length, size = spans.shape[2], FLEX_BLOCK_TOKENS
    blocks = -(-length // size)
    mask = spans_to_mask(spans)
    whole = torch.zeros(1, blocks * size, blocks * size, dtype=torch.bool)
    whole[:, :length, :length] = mask
    tiles = whole.unflatten(1, (blocks, size)).unflatten(3, (blocks, size)).transpose(2, 3)
    block_mask = block_mask_from_spans(spans)
    full = listed_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, blocks)
    partial = listed_blocks(block_mask.kv_num_blocks, block_mask.kv_indices, blocks)
    assert torch.equal(full, tiles.all((3, 4)))
    assert torch.equal(partial, tiles.any(4).any(3) & ~full)
    assert torch.equal(block_mask.to_dense()[:, 0].bool(), full | partial)
    index = torch.arange(length)
    zero = torch.zeros((), dtype=torch.long)
    assert torch.equal(block_mask.mask_mod(zero, zero, index[:, None], index[None, :]), mask[0])
    # The backward pass walks the same blocks by columns.
    assert torch.equal(listed_blocks(block_mask.full_q_num_blocks, block_mask.full_q_indices, blocks), full.mT)
    assert torch.equal(listed_blocks(block_mask.q_num_blocks, block_mask.q_indices, blocks), partial.mT)
    assert block_mask.seq_lengths == (length, length)


def test_block_masks_of_several_packs():
    packs = stack(pack([300, (10, 10)]), pack([40, (16, 16)], seq_length=400))
    spans = language_spans(packs.document_BS, packs.image_BS, "mixed")
    inputs = qkv(400, num_packs=2)
    dense, flex = (core(kernel, (400,))(*inputs, spans) for kernel in ("dense", "flex"))
    torch.testing.assert_close(flex, dense, atol=1e-5, rtol=1e-5)
    assert block_mask_from_spans(spans).kv_num_blocks.shape == (2, 1, 4)


def test_what_layers_share_is_made_once_and_forgotten():
    attention._made.clear()
    spans = long_spans("one block")
    before = cached(block_mask_from_spans, spans)
    assert cached(block_mask_from_spans, spans) is before
    tiles = cached(dense_tiles, spans, torch.float32)
    assert cached(dense_tiles, spans, torch.float32) is tiles
    assert cached(dense_tiles, spans, torch.bfloat16) is not tiles
    spans[:, 1, 0] += 1
    assert cached(block_mask_from_spans, spans) is not before, "spans changed in place"
    kept = [long_spans("less than a block") for _ in range(attention._MAX_MADE)]
    for other in kept:
        cached(block_mask_from_spans, other)
    assert len(attention._made) == attention._MAX_MADE
    attention._made.clear()


@pytest.mark.parametrize("heads, groups, width", [(4, 4, 64), (4, 2, 64), (7, 1, 16), (2, 1, 128)])
@pytest.mark.parametrize("layout", LONG)
def test_tiles_on_the_cpu_as_pytorchs_own_attention_in_fp64(layout, heads, groups, width):
    """TileAttention, whose backward pass is written here, against autograd's through one mask of all pairs."""
    spans = long_spans(layout)
    length = spans.shape[2]
    inputs = qkv(length, heads=heads, groups=groups, width=width, requires_grad=True, dtype=torch.float64)
    ours = core("dense", (length,))(*inputs, spans)
    whole = scaled_dot_product_attention(
        *(x.permute(1, 2, 0, 3) for x in inputs), attn_mask=spans_to_mask(spans)[:, None], enable_gqa=True
    )
    theirs = whole.permute(2, 0, 1, 3).flatten(2)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    of_ours, of_theirs = (torch.autograd.grad((x * weights).sum(), inputs) for x in (ours, theirs))
    for mine, other in zip((ours, *of_ours), (theirs, *of_theirs), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("layout", LONG)
def test_tiles_are_the_mask(layout):
    """Every query in one tile; what a tile leaves out is masked; neither an image's rectangle has a mask, nor the
    triangle of a long text that begins a document."""
    spans = long_spans(layout)
    (tiles,) = dense_tiles(spans, torch.float32)
    drawn_LL = torch.zeros(spans.shape[2], spans.shape[2], dtype=torch.bool)
    for tile in tiles:
        whole = torch.ones_like(drawn_LL[tile.queries, tile.keys])
        full = whole.tril() if tile.is_causal else whole
        drawn_LL[tile.queries, tile.keys] = full if tile.mask is None else tile.mask == 0
        assert tile.mask is None or len(tile.mask) <= TILE_QUERIES
    assert torch.equal(drawn_LL, spans_to_mask(spans)[0])
    assert [tile.queries.start for tile in tiles[1:]] == [tile.queries.stop for tile in tiles[:-1]]
    triangles = [tile.queries for tile in tiles if tile.is_causal]
    assert triangles == [slice(*triangle) for triangle in TRIANGLES.get(layout, [])]
    has_image = layout not in ("several blocks, one document", "one past a block", "mostly padding")
    assert has_image == any(tile.mask is None and not tile.is_causal for tile in tiles)


@pytest.mark.parametrize("kernel", ["dense", "flex", "flash"])
def test_wrong_lengths_are_refused(kernel):
    spans = torch.stack([torch.zeros(1, 12), torch.ones(1, 12)], 1).int()
    with pytest.raises(ValueError, match=r"12 tokens and spans for 12, .* segments of \(8, 8\)"):
        core(kernel, (8, 8))(*qkv(12), spans)
    with pytest.raises(ValueError, match=r"12 tokens and spans for 10"):
        core(kernel, (12,))(*qkv(12), spans[:, :, :10])


def test_kernels_by_name(monkeypatch):
    def resolved(kernel, capability, *, bf16=True, width=64):
        monkeypatch.setattr(attention, "find_capabilities", lambda on_cuda: Capabilities(capability))
        config = SimpleNamespace(model=SimpleNamespace(attention_kernel=kernel), training=SimpleNamespace(bf16=bf16))
        return resolve_kernel(config, SimpleNamespace(kv_channels=width))

    for kernel in ("dense", "flex", "flash"):
        assert resolved(kernel, (9, 0)) == kernel
    assert resolved("auto", None) == "dense"
    assert resolved("auto", (8, 0)) == resolved("auto", (9, 0), width=128) == "flash"
    assert resolved("auto", (9, 0), bf16=False) == resolved("auto", (7, 5)) == "flex"
    assert resolved("auto", (9, 0), width=132) == resolved("auto", (9, 0), width=20) == "flex"
    with pytest.raises(ValueError, match="'dense', 'flex' or 'flash', got 'eager'"):
        core("eager", (4,))


@pytest.mark.parametrize(
    "found, capability, options",
    [
        (None, (9, 0), None),
        ("4.0.0b25", (9, 0), None),
        ("4.0.0b26", (9, 0), {"BACKEND": "FLASH"}),
        ("4.0.0", (9, 0), {"BACKEND": "FLASH"}),
        ("4.0.0", (8, 0), None),
        ("4.0.0", (10, 0), None),
    ],
)
def test_flash_attention_4_is_used_where_its_gradients_are_right(monkeypatch, found, capability, options):
    def version(package):
        if found is None:
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(attention, "version", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert attention._flex_options(on_gpu) == options
    assert attention._flex_options(SimpleNamespace(is_cuda=True, dtype=torch.float32)) is None
    assert attention._flex_options(SimpleNamespace(is_cuda=False, dtype=torch.bfloat16)) is None
