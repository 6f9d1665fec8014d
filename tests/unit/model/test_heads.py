"""Connector and vision head against plain modules, and start values that no layout can change.

Letters: L B sequence and packs, H the decoder's width, K the vision head's output width.
"""

import pytest
import torch
from torch import nn

from laver_megatron.model.heads import Connector, VisionHead, seeded_normal


def test_seeded_normal_depends_on_name_and_seed_alone():
    drawn = seeded_normal("vision_head.linear_1.weight", (200, 100), 0.02, 5)
    torch.manual_seed(99)
    assert torch.equal(drawn, seeded_normal("vision_head.linear_1.weight", (200, 100), 0.02, 5))
    assert not torch.equal(drawn, seeded_normal("vision_head.linear_2.weight", (200, 100), 0.02, 5))
    assert not torch.equal(drawn, seeded_normal("vision_head.linear_1.weight", (200, 100), 0.02, 6))
    assert drawn.dtype == torch.float32 and drawn.device.type == "cpu"
    # 20000 draws: five standard errors are 3.5% of the mean's scale and 2.5% of the standard deviation.
    assert abs(drawn.mean()) < 0.035 * 0.02 and drawn.std() == pytest.approx(0.02, rel=0.025)


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    seeded_normal("a", (10,), 1.0, 1)
    assert torch.equal(torch.rand(4), expected)


def test_connector():
    connector = Connector(12, 20, torch.float32)
    connector.initialise("connector.", 1)
    plain = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 20))
    plain.load_state_dict(
        {
            f"{2 * i}.{kind}": getattr(getattr(connector, f"linear_{i + 1}"), kind)
            for i in (0, 1)
            for kind in ("weight", "bias")
        }
    )
    features_TE = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(connector(features_TE), plain(features_TE))  # fp32 rounding
    assert torch.equal(connector.linear_1.weight, seeded_normal("connector.linear_1.weight", (20, 12), 12**-0.5, 1))
    assert not connector.linear_1.bias.any() and not connector.linear_2.bias.any()


@pytest.fixture(scope="module")
def vision_head(single_process):
    """A head of widths 20, 24, 12 with biases that are not zero, and the same as a plain module."""
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=20, num_attention_heads=1, use_cpu_initialization=True)
    head = VisionHead(config, 24, 12).to(torch.cuda.current_device())
    head.initialise("vision_head.", 1)
    plain = nn.Sequential(nn.Linear(20, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 12, bias=False))
    with torch.no_grad():
        for i in (0, 1, 2):
            ours = getattr(head, f"linear_{i + 1}")
            if ours.bias is not None:
                assert not ours.bias.any()
                ours.bias.copy_(torch.randn(ours.bias.shape, generator=torch.Generator().manual_seed(i)))
                plain[2 * i].bias.copy_(ours.bias)
            plain[2 * i].weight.copy_(ours.weight)
    return head, plain


def test_vision_head_is_three_linear_layers(vision_head):
    head, plain = vision_head
    hidden_LBH = torch.randn(5, 2, 20, generator=torch.Generator().manual_seed(0))
    one, other = (hidden_LBH.clone().requires_grad_() for _ in range(2))
    device = torch.cuda.current_device()
    ours, theirs = head(one.to(device)), plain(other)
    assert ours.shape == (5, 2, 12)
    torch.testing.assert_close(ours.cpu(), theirs, atol=1e-6, rtol=1e-6)
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    (ours * weights.to(device)).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-5)
    for i in (0, 1, 2):
        gradient = getattr(head, f"linear_{i + 1}").weight.grad
        torch.testing.assert_close(gradient.cpu(), plain[2 * i].weight.grad, atol=1e-5, rtol=1e-5)


def test_vision_head_starts_from_named_values(vision_head):
    head, _ = vision_head
    for name, shape in (("linear_1", (24, 20)), ("linear_2", (24, 24)), ("linear_3", (12, 24))):
        expected = seeded_normal(f"vision_head.{name}.weight", shape, (2 / shape[1]) ** 0.5, 1)
        assert torch.equal(getattr(head, name).weight.cpu(), expected)
    assert head.linear_3.bias is None


def test_parts_of_a_split_head_make_the_whole(vision_head):
    """What each of two tensor-parallel ranks takes, put together again."""
    head, _ = vision_head

    class Group:
        def __init__(self, rank):
            self.here = rank

        def size(self):
            return 2

        def rank(self):
            return self.here

    whole = {n: getattr(head, n).weight.detach().clone() for n in ("linear_1", "linear_2", "linear_3")}
    groups = {n: getattr(head, n).tp_group for n in whole}
    parts = {n: [] for n in whole}
    for rank in (0, 1):
        for (name, axis), full in zip((("linear_1", 0), ("linear_2", 1), ("linear_3", 0)), whole.values(), strict=True):
            layer = getattr(head, name)
            layer.tp_group = Group(rank)
            layer.weight.data = torch.empty_like(full.chunk(2, axis)[rank])
        biases = [b.detach().clone() for b in (head.linear_1.bias, head.linear_2.bias)]
        head.initialise("vision_head.", 1)
        for name in whole:
            parts[name].append(getattr(head, name).weight.detach().clone())
        with torch.no_grad():
            head.linear_1.bias.copy_(biases[0])
            head.linear_2.bias.copy_(biases[1])
    for (name, axis), full in zip((("linear_1", 0), ("linear_2", 1), ("linear_3", 0)), whole.values(), strict=True):
        assert torch.equal(torch.cat(parts[name], axis), full)
        getattr(head, name).weight.data = full
        getattr(head, name).tp_group = groups[name]
