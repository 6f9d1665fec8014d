"""The kernel `flash` in fp64, with attention within pieces written out: its plans, the merge and the gradients.

Letters: B packs, L tokens, S language tokens, V visual slots, A query heads, G key/value heads, D head width.
"""

import gc
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from laver_megatron.model import attention, flash_attention
from laver_megatron.model.attention import SpanAttention, prepare
from laver_megatron.model.flash_attention import ALONE_TOKENS, flash_plans, varlen_backward, varlen_forward
from laver_megatron.model.spans import concatenate_spans, language_spans, reconstruction_spans
from tests.packs import LAYOUTS, pack, padding, stack
from tests.varlen import plain_varlen  # noqa: F401

pytestmark = pytest.mark.usefixtures("plain_varlen")
KERNELS = varlen_forward, varlen_backward  # as they are before the tests replace them


def core(kernel, segments):
    return SpanAttention(SimpleNamespace(), 1, kernel=kernel, segments=segments)


def output_and_gradients(kernel, segments, inputs, spans):
    output = core(kernel, segments)(*inputs, spans)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


def assert_equals_dense(spans, segments, *, heads=4, groups=2, width=8):
    generator = torch.Generator().manual_seed(0)
    num_packs, _, length = spans.shape
    inputs = [
        torch.randn(length, num_packs, n, width, generator=generator, dtype=torch.float64).requires_grad_()
        for n in (heads, groups, groups)
    ]
    flash, dense = (output_and_gradients(kernel, segments, inputs, spans) for kernel in ("flash", "dense"))
    for name, ours, theirs in zip(("output", "query", "key", "value"), flash, dense, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def visual_spans(packs, num_slots):
    """Spans of the reconstruction stream of packs: their images in order, then padding."""
    images = [row[row >= 0][:num_slots] for row in packs.image_BS]
    return reconstruction_spans(
        torch.stack([torch.nn.functional.pad(row, (0, num_slots - len(row)), value=-1) for row in images])
    )


@pytest.mark.parametrize("kind", ["mixed", "causal"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, kind):
    packs = LAYOUTS[layout]()
    language = language_spans(packs.document_BS, packs.image_BS, kind)
    spans = concatenate_spans(language, visual_spans(packs, 13))
    assert_equals_dense(spans, (language.shape[2], 13))


segments = st.one_of(st.integers(1, 30), st.tuples(st.integers(1, 6), st.integers(1, 6)))
documents = st.one_of(st.lists(segments, min_size=1, max_size=6), st.integers(1, 9).map(padding))


@st.composite
def drawn_packs(draw):
    packs = [draw(st.lists(documents, min_size=1, max_size=5)) for _ in range(draw(st.integers(1, 3)))]
    drawn = [pack(*content) for content in packs]
    longest = max(p.tokens_BS.shape[1] for p in drawn) + draw(st.integers(0, 20))
    return stack(*[pack(*content, seq_length=longest) for content in packs])


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    packs=drawn_packs(),
    heads_and_groups=st.sampled_from([(1, 1), (4, 4), (4, 2), (7, 1), (6, 2)]),
    num_slots=st.integers(1, 60),
    kind=st.sampled_from(["mixed", "causal"]),
)
@example(pack(padding(300)), (4, 2), 1, "mixed")
def test_any_packs(packs, heads_and_groups, num_slots, kind):
    heads, groups = heads_and_groups
    language = language_spans(packs.document_BS, packs.image_BS, kind)
    spans = concatenate_spans(language, visual_spans(packs, num_slots))
    assert_equals_dense(spans, (language.shape[2], num_slots), heads=heads, groups=groups)
    assert_equals_dense(language, (language.shape[2],), heads=heads, groups=groups)


@pytest.mark.parametrize("heads, groups, width", [(14, 2, 64), (4, 2, 128)])
def test_widths_of_published_models(heads, groups, width):
    packs = stack(
        pack([50, (10, 10), 7], padding(140), [30], [1, (3, 50), 2], seq_length=491),
        pack([(16, 16), 9], [1], [200], seq_length=491),
    )
    language = language_spans(packs.document_BS, packs.image_BS, "mixed")
    spans = concatenate_spans(language, visual_spans(packs, 257))
    assert_equals_dense(spans, (491, 257), heads=heads, groups=groups, width=width)


def test_as_few_calls_as_can_be():
    """Images of the reconstruction stream and causal text take one call; padding is not a piece for each token."""
    packs = pack([3, (2, 3), 2, (1, 2), 1], padding(2 * ALONE_TOKENS + 3), [1], [4], seq_length=300)
    language = language_spans(packs.document_BS, packs.image_BS, "mixed")
    mixed, visual = flash_plans(concatenate_spans(language, visual_spans(packs, 11)), (300, 11))
    (causal,) = flash_plans(language_spans(packs.document_BS, packs.image_BS, "causal"), (300,))
    assert mixed.documents.causal and mixed.triangles.causal and causal.documents.causal
    assert mixed.queries_Q.tolist() == [11, 7, 6, 5, 4, 3]
    assert mixed.keys_Q.tolist() == [12, 8, 7, 6, 5, 4]
    assert mixed.triangles.bounds_P.tolist() == [0, 1, 6] and mixed.triangles.longest == 5
    # The document, three pieces of what is alone, four tokens, padding to the end.
    assert mixed.documents.bounds_P.tolist() == [0, 14, 128, 256, 274, 278, 300]
    assert mixed.alone_N.tolist() == [*range(14, 274), *range(278, 300)]
    assert causal.triangles is None and torch.equal(causal.documents.bounds_P, mixed.documents.bounds_P)
    assert visual.triangles is None and not visual.documents.causal
    assert visual.documents.bounds_P.tolist() == [0, 6, 8, 11] and visual.alone_N.tolist() == [8, 9, 10]


@pytest.mark.parametrize(
    "starts, ends, refused",
    [
        ([0, 0, 1, 0], [1, 2, 3, 4], r"\[1, 3\) of token 2 of pack 0"),  # from within a document
        ([0, 0, 0, 0], [2, 3, 3, 4], r"\[0, 2\) of token 0"),  # two tokens ahead of one another, unevenly
        ([0, 0, 2, 2], [4, 4, 4, 4], r"\[0, 4\) of token 0"),  # beyond the document
        ([0, 0, 0, 0], [1, 1, 3, 4], r"\[0, 1\) of token 0"),  # the next not itself
        ([1, 1, 1, 1], [4, 4, 4, 4], r"\[1, 4\) of token 0"),  # not from the document's start
    ],
)
def test_other_spans_are_refused(starts, ends, refused):
    with pytest.raises(ValueError, match=f"flash cannot compute the span {refused}"):
        flash_plans(torch.tensor([[starts, ends]], dtype=torch.int32), (4,))


def test_spans_across_segments_are_refused():
    apart, across = ([[0, 0, start, start], [1, 2, 3, 4]] for start in (2, 0))
    assert len(flash_plans(torch.tensor([apart, apart]), (2, 2))) == 2
    for packs in ([apart, across], [across, apart]):
        with pytest.raises(ValueError, match=r"cannot compute the span \[-2, 1\) of token 0"):
            flash_plans(torch.tensor(packs), (2, 2))


@pytest.mark.parametrize("kernel", ["dense", "flash"])
def test_what_is_prepared_is_used_in_recomputation_too_and_goes_with_its_spans(monkeypatch, kernel):
    attention._made.clear()
    packs = pack([3, (2, 3), 2], seq_length=16)
    on_host = language_spans(packs.document_BS, packs.image_BS, "mixed")
    spans = on_host.clone()  # as if on the device
    prepare("flex", on_host, spans, (16,), torch.float32)
    assert not attention._prepared
    prepare(kernel, on_host, spans, (16,), torch.float32)
    monkeypatch.setattr(attention, "_made", None)  # nothing may be made in a layer
    inputs = [torch.randn(16, 1, 2, 8, requires_grad=True) for _ in range(3)]
    layer = core(kernel, (16,))
    for reentrant in (True, False):
        checkpoint(layer, *inputs, spans, use_reentrant=reentrant).sum().backward()
    del spans
    gc.collect()
    assert not attention._prepared


def test_kernels_are_called_as_pytorch_declares_them_and_nothing_waits(monkeypatch):
    """On the device that computes nothing: whatever asks for a value of a tensor fails there."""
    for name, kernel in zip(("varlen_forward", "varlen_backward"), KERNELS, strict=True):
        monkeypatch.setattr(flash_attention, name, kernel)
    packs = stack(pack([3, (2, 3), 2], padding(5)), pack([(2, 2), 5], [7]))
    language = language_spans(packs.document_BS, packs.image_BS, "mixed")
    on_host = concatenate_spans(language, visual_spans(packs, 9))
    spans = on_host.to("meta")
    prepare("flash", on_host, spans, (16, 9), torch.bfloat16)
    shapes = [(25, 2, heads, 64) for heads in (4, 2, 2)]
    inputs = [torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    output = core("flash", (16, 9))(*inputs, spans)
    assert output.shape == (25, 2, 256) and output.dtype == torch.bfloat16
    for leaf, gradient in zip(inputs, torch.autograd.grad(output.sum(), inputs), strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype
