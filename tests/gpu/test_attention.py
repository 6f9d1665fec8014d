"""Every attention kernel on a GPU, forward and backward, against the dense one in fp64.

Letters: B packs, L tokens, A query heads, G key/value heads, D head width.
"""

from types import SimpleNamespace

import pytest
import torch

from laver_megatron.model.attention import SpanAttention
from laver_megatron.model.spans import concatenate_spans, language_spans, reconstruction_spans
from tests.gpu.kernels import BF16, FP32, with_dtypes
from tests.packs import pack, padding, stack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

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


def assert_close_to_exact(kernel, spans, segments, heads, groups, width, dtype, repeats=1):
    """A kernel may be off from the fp64 result by no more than a few times what dense is off in the same dtype."""
    length, num_packs = spans.shape[2], spans.shape[0]
    inputs, weights = random_inputs(length, num_packs, heads, groups, width, dtype)
    spans = spans.cuda()
    exact = forward_and_gradients("dense", segments, [x.double() for x in inputs], spans, weights)
    dense = forward_and_gradients("dense", segments, inputs, spans, weights)
    for launch in range(repeats):
        found = forward_and_gradients(kernel, segments, inputs, spans, weights)
        for name, truth, other, mine in zip(("output", "query", "key", "value"), exact, dense, found, strict=True):
            assert mine.dtype == dtype and mine.shape == truth.shape
            scale = truth.norm()
            error, usual = (mine.double() - truth).norm() / scale, (other.double() - truth).norm() / scale
            # Relative Frobenius error; the floor is a few units in the last place of the dtype.
            allowed = max(4 * float(usual), 8 * torch.finfo(dtype).eps)
            assert error <= allowed, f"launch {launch}, {name}: {error:.1e}, dense {usual:.1e}"


def with_reconstruction(packs, num_slots):
    """Spans of the language stream and of two images' reconstruction behind it, and the lengths of both."""
    image_V = torch.full((1, num_slots), -1)
    image_V[0, :150], image_V[0, 150:190] = 0, 1
    language = language_spans(packs.document_BS, packs.image_BS, "mixed")
    return concatenate_spans(language, reconstruction_spans(image_V)), (language.shape[2], num_slots)


@pytest.mark.parametrize("attention", ["mixed", "causal"])
@pytest.mark.parametrize("kernel, dtype", with_dtypes(FP32, BF16))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_language_stream(layout, kernel, dtype, attention):
    packs = LAYOUTS[layout]()
    spans = language_spans(packs.document_BS, packs.image_BS, attention)
    assert_close_to_exact(kernel, spans, (spans.shape[2],), heads=4, groups=2, width=64, dtype=dtype)


@pytest.mark.parametrize(
    "heads, groups, width", [(4, 4, 64), (7, 1, 64), (14, 2, 64), (8, 2, 128), (7, 7, 128), (28, 4, 128), (4, 2, 16)]
)
@pytest.mark.parametrize("kernel, dtype", with_dtypes(BF16))
def test_grouped_query_attention(kernel, dtype, heads, groups, width):
    packs = LAYOUTS["images"]()
    spans = language_spans(packs.document_BS, packs.image_BS, "mixed")
    assert_close_to_exact(kernel, spans, (spans.shape[2],), heads, groups, width, dtype)


@pytest.mark.parametrize("num_slots", [384, 200, 191], ids=["whole blocks", "part of a block", "odd"])
@pytest.mark.parametrize("kernel, dtype", with_dtypes(FP32, BF16))
def test_language_and_reconstruction_stream_together(kernel, dtype, num_slots):
    spans, segments = with_reconstruction(LAYOUTS["images"](), num_slots)
    assert_close_to_exact(kernel, spans, segments, heads=4, groups=2, width=64, dtype=dtype)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kernel, dtype", with_dtypes(BF16))
def test_every_launch_is_right(kernel, dtype, width):
    """A race shows in some launches alone, and where many blocks run at once."""
    packs = pack([300, (27, 27), 40, (27, 27), 20], [700, (14, 14), 31], seq_length=3001)
    spans, segments = with_reconstruction(packs, 1500)
    assert_close_to_exact(kernel, spans, segments, heads=16, groups=4, width=width, dtype=dtype, repeats=20)


@pytest.mark.parametrize("kernel, dtype", with_dtypes(FP32, BF16))
def test_new_spans_are_not_mistaken_for_old_ones(kernel, dtype):
    """Many micro-batches through one kernel: each with its own mask."""
    inputs, _ = random_inputs(256, 1, 4, 2, 64, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        cut = int(torch.randint(1, 255, (), generator=generator))
        packs = pack([cut], [256 - cut])
        spans = language_spans(packs.document_BS, packs.image_BS, "mixed").cuda()
        dense, other = (attention(name, (256,))(*inputs, spans) for name in ("dense", kernel))
        torch.testing.assert_close(other, dense, atol=tolerance, rtol=tolerance)
