import sys

import torch

from laver_megatron.runtime.lazy_compile import compiled_at_first_call


def test_megatrons_fused_functions_are_compiled_when_they_are_called(monkeypatch):
    from megatron.core.fusions import fused_bias_swiglu

    assert sys.modules["megatron.core.jit"].jit_fuser is compiled_at_first_call
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function.__name__) or function)
    function = compiled_at_first_call(fused_bias_swiglu.swiglu.__wrapped__)
    assert function.__name__ == "swiglu" and not compiled
    x_BF = torch.randn(3, 8)
    for _ in range(2):
        gate_BF, up_BF = x_BF.chunk(2, dim=-1)
        torch.testing.assert_close(function(x_BF), torch.nn.functional.silu(gate_BF) * up_BF)
    assert compiled == ["swiglu"]
