"""What differs between versions of Megatron-Core; `make test-engine` runs this on the newest, too."""

import importlib.util
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from laver_megatron.runtime import engine
from laver_megatron.runtime.backend import shut_down_parallelism
from tests.distributed.harness import Layout, join


@pytest.mark.parametrize("has_triton", [False, True])
def test_kernels_of_triton_are_replaced_where_it_is_missing(monkeypatch, has_triton):
    monkeypatch.delitem(sys.modules, engine._PAGED_STASH, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace() if has_triton else None)
    engine.prepare_import()
    assert (engine._PAGED_STASH in sys.modules) is not has_triton
    sys.modules.pop(engine._PAGED_STASH, None)


def test_the_warning_of_recomputed_attention_is_silenced_and_no_other():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        settings = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
        TransformerConfig(**settings, recompute_granularity="selective", recompute_modules=["core_attn"])
        before = [str(warning.message) for warning in found]
        found.clear()
        engine.prepare_import()
        TransformerConfig(**settings, recompute_granularity="selective", recompute_modules=["core_attn"])
        warnings.warn("If you are using something else", UserWarning, stacklevel=1)
    [silenced] = [message for message in before if "core_attn recompute is really needed" in message]
    kept = [message for message in before if message != silenced]
    assert [str(warning.message) for warning in found] == [*kept, "If you are using something else"]


@pytest.fixture
def one_process():
    join(Layout(), seed=3)
    yield
    shut_down_parallelism()


def buckets(wrapped):
    """(First element, number of elements) of every bucket, and where each parameter lies."""
    (buffer,) = wrapped.buffers
    places = [tuple(buffer.param_index_map[parameter]) for parameter in wrapped.module.parameters()]
    return [(bucket.offset, bucket.grad_data.numel()) for bucket in buffer.buckets], places


@pytest.mark.parametrize("overlap, bucket_size, disable", [(False, 100, False), (True, 100, False), (True, 100, True)])
def test_buckets_are_those_that_megatron_chooses(one_process, caplog, overlap, bucket_size, disable):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    def module():
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        stage = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(6)))
        stage.config = config
        stage[3].requires_grad_(False)
        return stage

    def settings():
        return DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=overlap, bucket_size=bucket_size
        )

    stage = module()
    by_megatron = DistributedDataParallel(stage.config, settings(), stage, disable_bucketing=disable)
    caplog.clear()
    ours = engine.data_parallel(module(), settings(), disable_bucketing=disable)
    assert not caplog.records
    stage.pop(3), ours.module.pop(3)  # has no place
    assert buckets(ours) == buckets(by_megatron)
    assert (len(buckets(ours)[0]) > 1) is (overlap and not disable)


def test_what_is_replaced_for_a_block_is_put_back():
    """As it was: a static method stays one, whatever ended the block."""

    class Owner:
        @staticmethod
        def answer():
            return 1

    kept = vars(Owner)["answer"]
    with pytest.raises(OSError), engine.replaced(Owner, "answer", lambda: 2):
        assert Owner.answer() == 2
        raise OSError
    assert vars(Owner)["answer"] is kept and Owner().answer() == 1
