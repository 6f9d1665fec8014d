"""Core attention over spans: one module, two kernels, for Megatron-Core's attention layer.

Letters: B packs, L tokens, A query heads on this rank, G key/value heads on this rank, D head width.

The spans travel where Megatron passes `attention_mask`: they are a tensor, so activation recompute can save
them, and nothing about a micro-batch is kept on the module, where a pipeline schedule would mix them up.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from laver_megatron.model.spans import spans_to_mask

FLEX_BLOCK_TOKENS = 128


def resolve_kernel(kernel: str) -> str:
    """`auto` is `flex` where there is CUDA and `dense` elsewhere; FlexAttention has no backward on the CPU."""
    if kernel == "auto":
        return "flex" if torch.cuda.is_available() else "dense"
    return kernel


class SpanAttention(MegatronModule):
    """Softmax attention of each query over its span of keys.

    kernel: `dense` computes with an explicit mask (the reference, and the CPU's kernel); `flex` uses
    FlexAttention's block sparsity (CUDA). segments: lengths of consecutive parts of the sequence that never
    see each other; `dense` computes them apart and so skips the pairs between them.
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
        if kernel not in ("dense", "flex"):
            raise ValueError(f"attention kernel must be 'dense' or 'flex', got {kernel!r}")
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
        query_BALD, key_BGLD, value_BGLD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        attend = self._dense if self.kernel == "dense" else self._flex
        context_BALD = attend(query_BALD, key_BGLD, value_BGLD, attention_mask)
        return context_BALD.permute(2, 0, 1, 3).flatten(2).contiguous()

    def _dense(self, query_BALD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, spans_B2L: Tensor) -> Tensor:
        outputs, start = [], 0
        for length in self.segments:
            part = slice(start, start + length)
            mask_B1LL = spans_to_mask(spans_B2L[:, :, part] - start).unsqueeze(1)
            outputs.append(
                scaled_dot_product_attention(
                    query_BALD[:, :, part],
                    key_BGLD[:, :, part],
                    value_BGLD[:, :, part],
                    attn_mask=mask_B1LL,
                    enable_gqa=True,
                )  # fmt: skip
            )
            start += length
        return torch.cat(outputs, dim=2)

    def _flex(self, query_BALD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, spans_B2L: Tensor) -> Tensor:
        return _flex_attention(query_BALD.is_cuda)(
            query_BALD.contiguous(), key_BGLD.contiguous(), value_BGLD.contiguous(),
            block_mask=cached_block_mask(spans_B2L), enable_gqa=True,
        )  # fmt: skip


_compiled_flex_attention: Callable[..., Tensor] | None = None


def _flex_attention(compiled: bool) -> Callable[..., Tensor]:
    global _compiled_flex_attention
    if not compiled:
        return flex_attention
    if _compiled_flex_attention is None:
        _compiled_flex_attention = torch.compile(flex_attention, dynamic=False)
    return _compiled_flex_attention


# All layers of a micro-batch share one block mask. An entry holds its spans, so as long as it is here no
# other tensor can have their address.
_block_masks: OrderedDict[tuple[int, int, torch.Size], tuple[Tensor, BlockMask]] = OrderedDict()
_MAX_BLOCK_MASKS = 64


def cached_block_mask(spans_B2L: Tensor) -> BlockMask:
    """`block_mask_from_spans`, computed once for the same tensor."""
    key = (spans_B2L.data_ptr(), spans_B2L._version, spans_B2L.shape)
    if key not in _block_masks:
        _block_masks[key] = (spans_B2L, block_mask_from_spans(spans_B2L))
        while len(_block_masks) > _MAX_BLOCK_MASKS:
            _block_masks.popitem(last=False)
    return _block_masks[key][1]


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
