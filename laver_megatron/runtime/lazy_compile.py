"""Megatron-Core's fused functions are compiled when they are first called, not when they are imported.

`megatron.core.jit` decorates them with `torch.compile`, which imports the compiler: 2 s of CPU in every process, also
where no such function is ever called, as on the CPU.
"""

import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

_MODULE = "megatron.core.jit"


def defer_compilation() -> None:
    """Puts a module in the place of `megatron.core.jit`. Call before megatron.core is imported."""
    if _MODULE not in sys.modules:
        module = ModuleType(_MODULE, __doc__)
        vars(module).update(jit_fuser=compiled_at_first_call)
        sys.modules[_MODULE] = module


def compiled_at_first_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile(function)`, made when it is first called."""
    compiled: Callable[..., Any] | None = None

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            import torch

            compiled = torch.compile(function)
        return compiled(*arguments, **options)

    return call
