"""The Adam that resumes, against torch's AdamW."""

import pytest
import torch

from laver_megatron.runtime.adam import ResumableAdam

SETTINGS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6}
SHAPES = [(7, 5), (11,), (1,), (3, 2, 4)]


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def grouped(params, weight_decay):
    """Two groups, of which only the first decays."""
    return [{"params": params[:2], "weight_decay": weight_decay}, {"params": params[2:], "weight_decay": 0.0}]


def run(optimizer, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS["lr"] / (1 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_same_as_torchs_fused_adamw_to_the_bit(weight_decay):
    ours, theirs = parameters(), parameters()
    run(ResumableAdam(grouped(ours, weight_decay), **SETTINGS), ours, range(10))
    run(torch.optim.AdamW(grouped(theirs, weight_decay), fused=True, **SETTINGS), theirs, range(10))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_same_as_the_formula_in_fp64(weight_decay):
    """Loshchilov and Hutter's AdamW, written out."""
    ours = parameters()
    run(ResumableAdam(grouped(ours, weight_decay), **SETTINGS), ours, range(10))
    beta1, beta2 = SETTINGS["betas"]
    values = [p.detach().double() for p in parameters()]
    first, second = [torch.zeros_like(v) for v in values], [torch.zeros_like(v) for v in values]
    for step in range(10):
        generator = torch.Generator().manual_seed(100 + step)
        lr = SETTINGS["lr"] / (1 + step)
        for i, shape in enumerate(SHAPES):
            gradient = torch.randn(shape, generator=generator).double()
            first[i] = beta1 * first[i] + (1 - beta1) * gradient
            second[i] = beta2 * second[i] + (1 - beta2) * gradient**2
            mean, square = first[i] / (1 - beta1 ** (step + 1)), second[i] / (1 - beta2 ** (step + 1))
            values[i] -= lr * (weight_decay if i < 2 else 0.0) * values[i]
            values[i] -= lr * mean / (square.sqrt() + SETTINGS["eps"])
    for mine, exact in zip(ours, values, strict=True):
        # fp32 rounding of ten steps, on values and steps of order 1 and 1e-3.
        torch.testing.assert_close(mine.double(), exact, atol=1e-6, rtol=1e-6)


def test_resumes_to_the_last_bit(tmp_path):
    straight, first, second = parameters(), parameters(), parameters()
    run(ResumableAdam(grouped(straight, 0.1), **SETTINGS), straight, range(10))
    optimizer = ResumableAdam(grouped(first, 0.1), **SETTINGS)
    run(optimizer, first, range(4))
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in first]}, tmp_path / "state.pt")

    state = torch.load(tmp_path / "state.pt")
    resumed = ResumableAdam(grouped(second, 0.5), lr=1.0, betas=(0.1, 0.1), eps=1.0)
    resumed.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for param, value in zip(second, state["params"], strict=True):
            param.copy_(value)
    assert [group["step"] for group in resumed.param_groups] == [4, 4]
    run(resumed, second, range(4, 10))
    for one, other in zip(straight, second, strict=True):
        assert torch.equal(one, other)


def test_state_is_shaped_like_fused_adams():
    """What Megatron-Core's distributed optimizer knows how to save: a step per group, two moments per parameter."""
    params = parameters()
    optimizer = ResumableAdam(grouped(params, 0.1), **SETTINGS)
    assert not optimizer.state and all("step" not in group for group in optimizer.param_groups)
    run(optimizer, params, range(3))
    for param in params:
        assert set(optimizer.state[param]) == {"exp_avg", "exp_avg_sq"}
        assert all(t.shape == param.shape and t.dtype == torch.float32 for t in optimizer.state[param].values())
    assert all(group["step"] == 3 and isinstance(group["step"], int) for group in optimizer.param_groups)


def test_parameters_do_not_share_a_step():
    """A parameter set of one and of many give each parameter the same values."""
    together, apart = parameters(), parameters()
    run(ResumableAdam(together, **SETTINGS), together, range(5))
    for index, param in enumerate(apart):
        optimizer = ResumableAdam([param], **SETTINGS)
        for step in range(5):
            generator = torch.Generator().manual_seed(100 + step)
            gradients = [torch.randn(shape, generator=generator) for shape in SHAPES]
            optimizer.param_groups[0]["lr"] = SETTINGS["lr"] / (1 + step)
            param.grad = gradients[index]
            optimizer.step()
        assert torch.equal(param, together[index])


def test_nothing_to_train():
    optimizer = ResumableAdam([{"params": []}], **SETTINGS)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1, "counted as on ranks that have something"
    state = optimizer.state_dict()
    again = ResumableAdam([{"params": []}], **SETTINGS)
    again.load_state_dict(state)
    again.step()


def test_parameters_without_gradient_stay():
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = ResumableAdam(params, **SETTINGS, weight_decay=0.1)
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [True, False, True, True]
    assert params[0] not in optimizer.state


def test_coupled_weight_decay_is_refused():
    with pytest.raises(ValueError, match="decoupled_weight_decay=True"):
        ResumableAdam(parameters(), adam_w_mode=False)
