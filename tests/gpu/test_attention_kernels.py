"""The kernels `flex` (compiled) and `flash` on a GPU, forward and backward, against the dense kernel.

Letters: B packs, L tokens, A query heads, G key/value heads, D head width.
"""

from types import SimpleNamespace

import pytest
import torch

from laver_megatron.model.attention import SpanAttention, prepare
from laver_megatron.model.flash_attention import Pieces, varlen_backward, varlen_forward
from laver_megatron.model.spans import concatenate_spans, language_spans, reconstruction_spans
from tests.packs import pack, padding, stack
from tests.varlen import plain_backward, plain_forward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="both kernels need CUDA")

LAUNCHES = 5
LAYOUTS = {
    "one causal document": lambda: pack([512]),
    "packed documents": lambda: pack([100], [37], [1], [300], seq_length=512),
    "images": lambda: pack([30, (14, 14), 40, (16, 8), 20], [(4, 4), 5], seq_length=512),
    "holes of padding": lambda: pack([60, (10, 10), 7], padding(140), [130], seq_length=512),
    "odd length": lambda: pack([50, (10, 10), 7], padding(40), [130], [1, (3, 50), 2], seq_length=555),
    "less than a block": lambda: pack([3, (4, 4), 30], [9]),
    "one past a block": lambda: pack([129]),
    "image to the end of an odd length": lambda: pack([(12, 20)]),
    "two packs": lambda: stack(pack([300, (10, 10)]), pack([40, (16, 16)], seq_length=400)),
}


def attention(kernel, segments):
    return SpanAttention(SimpleNamespace(), 1, kernel=kernel, segments=segments)


def forward_and_gradients(kernel, segments, inputs, spans, weights):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = attention(kernel, segments)(*leaves, spans)
    return [output.detach(), *torch.autograd.grad((output * weights.to(output.dtype)).sum(), leaves)]


def random_inputs(length, num_packs, heads, groups, width, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, num_packs, n, width) for n in (heads, groups, groups)]
    inputs = [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]
    return inputs, torch.randn(length, num_packs, heads * width, generator=generator).cuda()


def assert_close_to_exact(spans, segments, heads, groups, width, dtype):
    """A kernel may be off from the fp64 result by no more than a few times what dense is off in the same dtype: in each
    of several launches, because a race does not show in every one."""
    length, num_packs = spans.shape[2], spans.shape[0]
    inputs, weights = random_inputs(length, num_packs, heads, groups, width, dtype)
    spans = spans.cuda()
    exact = forward_and_gradients("dense", segments, [x.double() for x in inputs], spans, weights)
    dense = forward_and_gradients("dense", segments, inputs, spans, weights)
    for kernel in ["flex"] + ["flash"] * (dtype == torch.bfloat16):
        for launch in range(LAUNCHES):
            ours = forward_and_gradients(kernel, segments, inputs, spans, weights)
            for name, truth, other, mine in zip(("output", "query", "key", "value"), exact, dense, ours, strict=True):
                assert mine.dtype == dtype and mine.shape == truth.shape
                scale = truth.norm()
                error, usual = (mine.double() - truth).norm() / scale, (other.double() - truth).norm() / scale
                # Relative Frobenius error; the floor is a few units in the last place of the dtype.
                allowed = max(4 * float(usual), 8 * torch.finfo(dtype).eps)
                assert error <= allowed, f"{kernel}, launch {launch}, {name}: {error:.1e}, dense {usual:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_language_stream(layout, dtype):
    packs = LAYOUTS[layout]()
    spans = language_spans(packs.document_BS, packs.image_BS, "mixed")
    assert_close_to_exact(spans, (spans.shape[2],), heads=4, groups=2, width=64, dtype=dtype)


@pytest.mark.parametrize("heads, groups, width", [(4, 4, 64), (7, 1, 64), (14, 2, 64), (8, 2, 128), (4, 2, 16)])
def test_grouped_query_attention(heads, groups, width):
    packs = LAYOUTS["images"]()
    spans = language_spans(packs.document_BS, packs.image_BS, "mixed")
    assert_close_to_exact(spans, (spans.shape[2],), heads, groups, width, torch.bfloat16)


@pytest.mark.parametrize("num_slots", [384, 200], ids=["whole blocks", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_language_and_reconstruction_stream_together(num_slots, dtype):
    packs = LAYOUTS["images"]()
    image_V = torch.full((1, num_slots), -1)
    image_V[0, :150], image_V[0, 150:190] = 0, 1
    language = language_spans(packs.document_BS, packs.image_BS, "mixed")
    spans = concatenate_spans(language, reconstruction_spans(image_V))
    assert_close_to_exact(spans, (512, num_slots), heads=4, groups=2, width=64, dtype=dtype)


def test_new_spans_are_not_mistaken_for_old_ones():
    """Many micro-batches through one compiled kernel: each with its own mask."""
    inputs, _ = random_inputs(256, 1, 4, 2, 64, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        cut = int(torch.randint(1, 255, (), generator=generator))
        packs = pack([cut], [256 - cut])
        spans = language_spans(packs.document_BS, packs.image_BS, "mixed").cuda()
        dense, flex = (attention(kernel, (256,))(*inputs, spans) for kernel in ("dense", "flex"))
        torch.testing.assert_close(flex, dense, atol=1e-4, rtol=1e-4)


def test_flash_does_not_wait_for_the_device():
    packs = LAYOUTS["images"]()
    on_host = language_spans(packs.document_BS, packs.image_BS, "mixed")
    inputs, weights = random_inputs(512, 1, 4, 2, 64, torch.bfloat16)
    spans = on_host.cuda()
    prepare("flash", on_host, spans, (512,))
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_gradients("flash", (512,), inputs, spans, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("groups, width", [(4, 64), (2, 64), (2, 128)])
def test_calls_of_flash(groups, width):
    """Each call by itself: the log-sum-exp's layout, and gradients of what was merged from elsewhere."""
    query, key, value = random_inputs(300, 1, 4, groups, width, torch.bfloat16)[0]
    heads = [x.squeeze(1) for x in (query, key, value)]
    gradient = torch.randn_like(heads[0])
    for causal in (True, False):
        pieces = Pieces(torch.tensor([0, 1, 130, 133, 300], dtype=torch.int32, device="cuda"), 167, causal)
        output, lse = varlen_forward(*heads, pieces)
        exact_output, exact_lse = plain_forward(*[x.double() for x in heads], pieces)
        torch.testing.assert_close(output.double(), exact_output, atol=0.02, rtol=0.02)
        torch.testing.assert_close(lse.double(), exact_lse, atol=1e-3, rtol=1e-3)
        given = (output / 2).to(output.dtype), lse + 1
        ours = varlen_backward(gradient, *heads, *given, pieces)
        exact = plain_backward(gradient.double(), *[x.double() for x in (*heads, *given)], pieces)
        for mine, truth in zip(ours, exact, strict=True):
            assert (mine.double() - truth).norm() <= 0.02 * truth.norm()
