"""Collectives of a group of one rank: called in every way in which torch's own can be."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from laver_megatron.runtime import lone_groups


@pytest.fixture(scope="module")
def group():
    """A group of one rank, and torch's own collectives: earlier tests may have replaced them."""
    made_here = not dist.is_initialized()
    if made_here:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group([0])
    if made_here:
        dist.destroy_process_group()


@pytest.fixture
def alone(group, monkeypatch):
    """The replacements by name, of collectives that must not be reached."""

    def refuse_reduce(tensor, op=ReduceOp.SUM, group=None, async_op=False):
        pytest.fail("reached")

    def refuse_scatter(output, input, op=ReduceOp.SUM, group=None, async_op=False):
        pytest.fail("reached")

    def refuse_gather(output_tensor, input_tensor, group=None, async_op=False):
        pytest.fail("reached")

    for collective in (refuse_reduce, refuse_scatter, refuse_gather):
        name = {"reduce": "all_reduce", "scatter": "reduce_scatter_tensor", "gather": "all_gather_into_tensor"}
        monkeypatch.setattr(dist, name[collective.__name__.removeprefix("refuse_")], collective)
    return {name: replacement for owner, name, replacement in lone_groups.local_collectives() if owner is dist}


@pytest.mark.parametrize(
    "rest",
    [
        lambda group: ((ReduceOp.SUM, group), {}),
        lambda group: ((ReduceOp.SUM, group, False), {}),
        lambda group: ((ReduceOp.MAX,), {"group": group}),
        lambda group: ((), {"op": ReduceOp.AVG, "group": group}),
        lambda group: ((), {}),
    ],
)
def test_reductions(alone, group, rest):
    args, kwargs = rest(group)
    tensor, output = torch.arange(3.0), torch.zeros(3)
    assert alone["all_reduce"](tensor, *args, **kwargs) is None
    assert alone["reduce_scatter_tensor"](output, tensor, *args, **kwargs) is None
    assert tensor.tolist() == output.tolist() == [0, 1, 2]


def test_gathers(alone, group):
    gather, tensor = alone["all_gather_into_tensor"], torch.arange(4.0)
    for args, kwargs in (((group,), {}), ((group, False), {}), ((), {"group": group}), ((), {})):
        output = torch.zeros(1, 4)
        assert gather(output, tensor, *args, **kwargs) is None
        assert output.tolist() == [[0, 1, 2, 3]]
    output = torch.zeros(4)
    assert gather(input_tensor=tensor, output_tensor=output) is None
    assert output.tolist() == [0, 1, 2, 3]


def test_asynchronous_ones_have_nothing_to_wait_for(alone, group):
    tensor = torch.arange(3.0)
    for work in (
        alone["all_reduce"](tensor, ReduceOp.SUM, group, True),
        alone["reduce_scatter_tensor"](torch.zeros(3), tensor, async_op=True),
        alone["all_gather_into_tensor"](torch.zeros(3), tensor, group, True),
    ):
        assert work.wait() and work.is_completed()


def test_wrong_arguments_are_errors_as_ever(alone, group):
    with pytest.raises(TypeError, match="unexpected keyword argument 'of'"):
        alone["all_reduce"](torch.zeros(1), of=group)


def test_larger_groups_get_all_arguments(group, monkeypatch):
    reached = []
    monkeypatch.setattr(lone_groups, "_is_alone", lambda group: False)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op=None, group=None, async_op=False: reached.append(group))
    [reduce] = [made for owner, name, made in lone_groups.local_collectives() if (owner, name) == (dist, "all_reduce")]
    reduce(torch.zeros(1), ReduceOp.SUM, group)
    assert reached == [group]
