"""Core attention over spans: one module, three kernels, for Megatron-Core's attention layer.

Letters: B packs, L tokens, A query heads on this rank, G key/value heads on this rank, D head width.

The spans travel where Megatron passes `attention_mask`: they are a tensor, so activation recompute can save
them, and nothing about a micro-batch is kept on the module, where a pipeline schedule would mix them up.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any, TypeVar

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from packaging.version import Version
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from laver_megatron.config.capabilities import HOPPER, find_capabilities
from laver_megatron.config.engine_checks import flash_problems
from laver_megatron.config.fields import Config
from laver_megatron.hf.shape import ModelShape
from laver_megatron.model.flash_attention import FlashAttention, flash_plans
from laver_megatron.model.tile_attention import Tile, TileAttention
from laver_megatron.runtime.transfer import on_device

Made = TypeVar("Made")

FLEX_BLOCK_TOKENS = 128
# Of `dense`: queries of a tile with a mask at most, and tokens with one span that are worth a tile without one.
TILE_QUERIES, LEAST_RECTANGLE = 64, 16


def resolve_kernel(config: Config, shape: ModelShape) -> str:
    """The kernel of a run on this machine. `auto` is `dense` without CUDA, else `flash` where it can compute the run,
    and `flex` where it cannot."""
    if config.model.attention_kernel != "auto":
        return config.model.attention_kernel
    machine = find_capabilities(on_cuda=torch.cuda.is_available())
    if machine.compute_capability is None:
        return "dense"
    return "flex" if any(flash_problems(config, shape, machine)) else "flash"


class SpanAttention(MegatronModule):
    """Softmax attention of each query over its span of keys.

    kernel: `dense` computes rectangles of the mask, explicit ones where a rectangle is not full (the reference, and the
    CPU's kernel); `flex` uses FlexAttention's block sparsity (CUDA); `flash` FlashAttention (CUDA, 16 bits).
    segments: lengths of the sequences, laid one after the other, of which none attends to another.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType | None = None,
        attention_type: str = "self",
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: object = None,
        *,
        kernel: str,
        segments: tuple[int, ...],
    ) -> None:
        super().__init__(config=config)
        if kernel not in ("dense", "flex", "flash"):
            raise ValueError(f"attention kernel must be 'dense', 'flex' or 'flash', got {kernel!r}")
        assert attention_type == "self" and softmax_scale is None
        self.kernel = kernel
        self.segments = segments

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object = None,
    ) -> Tensor:
        """query `[L, B, A, D]`, key and value `[L, B, G, D]`, attention_mask: spans int32 `[B, 2, L]`.
        Returns `[L, B, A * D]`."""
        assert attention_bias is None and packed_seq_params is None
        num_tokens = query.shape[0]
        if sum(self.segments) != num_tokens or attention_mask.shape[2] != num_tokens:
            raise ValueError(
                f"attention got {num_tokens} tokens and spans for {attention_mask.shape[2]}, "
                f"but was built for segments of {self.segments}"
            )
        attend = {"dense": self._dense, "flex": self._flex, "flash": self._flash}[self.kernel]
        return attend(query, key, value, attention_mask).flatten(2)

    def _dense(self, query_LBAD: Tensor, key_LBGD: Tensor, value_LBGD: Tensor, spans_B2L: Tensor) -> Tensor:
        tiles_of_packs = cached(dense_tiles, spans_B2L, query_LBAD.dtype)
        attend = _attend_on_gpu if query_LBAD.is_cuda else TileAttention.apply
        packs = [
            attend(query_LBAD[:, pack], key_LBGD[:, pack], value_LBGD[:, pack], tiles)
            for pack, tiles in enumerate(tiles_of_packs)
        ]
        return packs[0].unsqueeze(1) if len(packs) == 1 else torch.stack(packs, dim=1)

    def _flex(self, query_LBAD: Tensor, key_LBGD: Tensor, value_LBGD: Tensor, spans_B2L: Tensor) -> Tensor:
        query_BALD, key_BGLD, value_BGLD = (x.permute(1, 2, 0, 3) for x in (query_LBAD, key_LBGD, value_LBGD))
        context_BALD = _flex_attention(query_BALD.is_cuda)(
            query_BALD.contiguous(), key_BGLD.contiguous(), value_BGLD.contiguous(),
            block_mask=cached(block_mask_from_spans, spans_B2L), enable_gqa=True,
            kernel_options=_flex_options(query_BALD),
        )  # fmt: skip
        return context_BALD.permute(2, 0, 1, 3).contiguous()

    def _flash(self, query_LBAD: Tensor, key_LBGD: Tensor, value_LBGD: Tensor, spans_B2L: Tensor) -> Tensor:
        plans = cached(flash_plans, spans_B2L, self.segments)
        of_segments = (heads.split(self.segments) for heads in (query_LBAD, key_LBGD, value_LBGD))
        contexts = []
        for plan, *heads in zip(plans, *of_segments, strict=True):
            context_NAD = FlashAttention.apply(*(x.transpose(0, 1).flatten(0, 1) for x in heads), plan)
            contexts.append(context_NAD.unflatten(0, (len(spans_B2L), -1)).transpose(0, 1))
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


_compiled_flex_attention: Callable[..., Tensor] | None = None


def _flex_attention(compiled: bool) -> Callable[..., Tensor]:
    global _compiled_flex_attention
    if not compiled:
        return flex_attention
    if _compiled_flex_attention is None:
        _compiled_flex_attention = torch.compile(flex_attention, dynamic=False)
    return _compiled_flex_attention


def _flex_options(query_BALD: Tensor) -> FlexKernelOptions | None:
    """FlashAttention 4 as FlexAttention's back end on Hopper, where it is installed; else Triton."""
    if query_BALD.dtype.itemsize != 2 or not query_BALD.is_cuda or torch.cuda.get_device_capability()[0] != HOPPER[0]:
        return None
    try:
        found = Version(version("flash-attn-4"))
    except PackageNotFoundError:
        return None
    # Gradients of earlier ones are wrong on Hopper.
    return {"BACKEND": "FLASH"} if found >= Version("4.0.0b26") else None


# What all layers of a micro-batch share, also when they are recomputed. An entry holds its spans, so as long as it is
# here no other tensor can have their address.
_made: OrderedDict[tuple[Any, ...], tuple[Tensor, Any]] = OrderedDict()
_MAX_MADE = 16
# What was made from spans on the host; an entry goes with its spans on the device.
_prepared: dict[tuple[Any, ...], Any] = {}


def cached(make: Callable[..., Made], spans_B2L: Tensor, *arguments: Any) -> Made:
    """`make(spans_B2L, *arguments)`, computed once for the same tensor."""
    key = _key(make, spans_B2L, *arguments)
    if key in _prepared:
        return _prepared[key]
    if key not in _made:
        _made[key] = (spans_B2L, make(spans_B2L, *arguments))
        while len(_made) > _MAX_MADE:
            _made.popitem(last=False)
    return _made[key][1]


def prepare(
    kernel: str, spans_B2L: Tensor, on_device_B2L: Tensor, segments: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Makes from spans on the host what the kernel needs to know of them, so that layers need not wait for the device.

    on_device_B2L: the same spans as the layers will get them. dtype: of the layers' queries.
    """
    if kernel == "flex":  # its block mask is made on the device without waiting
        return
    device = on_device_B2L.device
    if kernel == "flash":
        key = _key(flash_plans, on_device_B2L, segments)
        _prepared[key] = flash_plans(spans_B2L, segments, device)
    else:
        key = _key(dense_tiles, on_device_B2L, dtype)
        _prepared[key] = dense_tiles(spans_B2L, dtype, device)
    weakref.finalize(on_device_B2L, _prepared.pop, key, None)


def _key(make: Callable[..., Any], spans_B2L: Tensor, *arguments: Any) -> tuple[Any, ...]:
    return make, spans_B2L.data_ptr(), spans_B2L._version, spans_B2L.shape, *arguments


def dense_tiles(spans_B2L: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> list[list[Tile]]:
    """The tiles of each pack, which together are its mask; masks on a device, by default that of the spans.

    The text that begins a document is a causal triangle, if it is longer than TILE_QUERIES. The tokens of an image have
    one span, so they and their keys are a rectangle without a mask. Other tokens are cut into TILE_QUERIES; their keys
    reach from the first start to the last end.
    """
    return [list(_tiles_of_pack(spans_2L, dtype, device or spans_B2L.device)) for spans_2L in spans_B2L]


def _tiles_of_pack(spans_2L: Tensor, dtype: torch.dtype, device: torch.device) -> Iterator[Tile]:
    starts_L, ends_L = spans_2L
    _, lengths = torch.unique_consecutive(spans_2L, dim=1, return_counts=True)
    runs = lengths.tolist()
    triangles = _causal_triangles(spans_2L)
    first = run = 0
    while run < len(runs):
        if first in triangles:
            end = triangles[first]
            run += end - first  # each of its tokens has a span of its own
            yield Tile(slice(first, end), slice(first, end), None, is_causal=True)
            first = end
            continue
        is_rectangle = runs[run] >= LEAST_RECTANGLE
        end, run = first + runs[run], run + 1
        while (
            not is_rectangle
            and run < len(runs)
            and runs[run] < LEAST_RECTANGLE
            and end + runs[run] - first <= TILE_QUERIES
            and end not in triangles
        ):
            end, run = end + runs[run], run + 1
        starts_Q, ends_Q = starts_L[first:end], ends_L[first:end]
        keys = slice(int(starts_Q.min()), int(ends_Q.max()))
        mask = None
        if not is_rectangle:
            key_K = torch.arange(keys.start, keys.stop, device=starts_L.device)
            seen_QK = (starts_Q[:, None] <= key_K) & (key_K < ends_Q[:, None])
            mask = torch.zeros(seen_QK.shape, dtype=dtype, device=starts_L.device).masked_fill(~seen_QK, -torch.inf)
            mask = on_device(mask, device)
        yield Tile(slice(first, end), keys, mask)
        first = end


def _causal_triangles(spans_2L: Tensor) -> dict[int, int]:
    """First and end of the texts that begin a document and are longer than TILE_QUERIES."""
    starts_L, ends_L = spans_2L
    place_L = torch.arange(len(starts_L), device=starts_L.device)
    is_text_L, begins_L = ends_L == place_L + 1, starts_L == place_L
    bounds = [*torch.nonzero(~is_text_L | begins_L)[:, 0].tolist(), len(starts_L)]
    texts = torch.nonzero(is_text_L & begins_L)[:, 0].tolist()
    ends = {first: end for first, end in pairwise(bounds) if end - first > TILE_QUERIES}
    return {first: ends[first] for first in texts if first in ends}


def _attend_on_gpu(query_LAD: Tensor, key_LGD: Tensor, value_LGD: Tensor, tiles: Sequence[Tile]) -> Tensor:
    """What TileAttention computes, with operations that CUDA provides as well."""
    contexts = []
    for tile in tiles:
        query, key, value = (
            heads[part].transpose(0, 1).unsqueeze(0)
            for heads, part in ((query_LAD, tile.queries), (key_LGD, tile.keys), (value_LGD, tile.keys))
        )
        context_1AQD = scaled_dot_product_attention(
            query, key, value, attn_mask=tile.mask, is_causal=tile.is_causal, enable_gqa=True
        )
        contexts.append(context_1AQD[0].transpose(0, 1))
    return torch.cat(contexts)


def block_mask_from_spans(spans_B2L: Tensor) -> BlockMask:
    """FlexAttention's BlockMask, built from the spans without ever forming the L x L mask.

    A block of queries and a block of keys is computed in full if every query's span covers the keys, with
    the mask if any span touches them, and not at all otherwise.
    """
    num_tokens = spans_B2L.shape[2]
    starts_BL, ends_BL = spans_B2L[:, 0], spans_B2L[:, 1]
    num_blocks = -(-num_tokens // FLEX_BLOCK_TOKENS)
    key_start_K = torch.arange(num_blocks, device=spans_B2L.device) * FLEX_BLOCK_TOKENS
    key_end_K = (key_start_K + FLEX_BLOCK_TOKENS).clamp(max=num_tokens)

    def by_query_block(pairs_BLK: Tensor, reduce: Callable[..., Tensor], fill: bool) -> Tensor:
        padded = torch.nn.functional.pad(pairs_BLK, (0, 0, 0, num_blocks * FLEX_BLOCK_TOKENS - num_tokens), value=fill)
        return reduce(padded.unflatten(1, (num_blocks, FLEX_BLOCK_TOKENS)), dim=2)

    touches_BLK = (starts_BL[:, :, None] < key_end_K) & (ends_BL[:, :, None] > key_start_K)
    # Only whole key blocks may skip the mask: the last one may hold positions past the end.
    whole_K = key_end_K - key_start_K == FLEX_BLOCK_TOKENS
    covers_BLK = (starts_BL[:, :, None] <= key_start_K) & (ends_BL[:, :, None] >= key_end_K) & whole_K
    full_BQK = by_query_block(covers_BLK, torch.all, fill=True)
    if num_tokens % FLEX_BLOCK_TOKENS:
        full_BQK[:, -1] = False
    partial_BQK = by_query_block(touches_BLK, torch.any, fill=False) & ~full_BQK

    def span_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx >= starts_BL[b, q_idx]) & (kv_idx < ends_BL[b, q_idx])

    def listed(blocks_BQK: Tensor) -> tuple[Tensor, Tensor]:
        """Number of key blocks of each query block, and their indices first in the row."""
        counts = blocks_BQK.sum(-1, dtype=torch.int32)[:, None]
        order = blocks_BQK.int().argsort(dim=-1, descending=True, stable=True).int()[:, None]
        return counts.contiguous(), order.contiguous()

    return BlockMask.from_kv_blocks(
        *listed(partial_BQK), *listed(full_BQK),
        BLOCK_SIZE=FLEX_BLOCK_TOKENS, mask_mod=span_mask, seq_lengths=(num_tokens, num_tokens),
    )  # fmt: skip
