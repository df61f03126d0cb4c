"""PyTorch's own samples of inputs for its normalizations (OpInfo, ModuleInfo), and how results are compared.

The samples come with PyTorch's test suite, which needs the package expecttest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# |ours - PyTorch's| <= bound*(1 + |PyTorch's|). PyTorch sums channels_last float32 in float32, and halves in halves.
BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 8e-3}


@cache
def _samples() -> Any:
    pytest.importorskip("expecttest", reason="PyTorch's samples need it")
    from torch.testing._internal import common_methods_invocations, common_modules

    return common_methods_invocations, common_modules


def op_samples(name: str, dtype: torch.dtype) -> list[Any]:
    """The SampleInputs of an op, as torch.nn.functional names it."""
    operations, _ = _samples()
    (found,) = [o for o in operations.op_db if (o.name, o.variant_test_name) == (f"nn.functional.{name}", "")]
    return [*found.sample_inputs("cpu", dtype, requires_grad=True)]


def module_samples(name: str, dtype: torch.dtype) -> Iterator[tuple[bool, Any]]:
    """(training, ModuleInput) of a module of torch.nn's."""
    _, modules = _samples()
    (found,) = [one for one in modules.module_db if one.module_cls is getattr(torch.nn, name)]
    for training in (True, False):
        for one in found.module_inputs_func(found, "cpu", dtype, True, training):
            yield training, one


def close(ours: Any, theirs: Any, bound: float | None = None) -> None:
    """Asserts that two tensors, or sequences of them, are equal within `bound`, with equal dtypes and strides."""
    if isinstance(theirs, list | tuple):
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, bound)
        return
    if theirs is None:
        assert ours is None
        return
    assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
    limit = BOUNDS.get(theirs.dtype, 0) if bound is None else bound
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=limit, atol=limit, equal_nan=True)


def outcome(function: Callable[[], Any]) -> Any:
    """What a call returns, or the type and text of its error."""
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


def copied(value: Any) -> Any:
    """Tensors as fresh leaves; anything else as it is."""
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


class DispatchedOps(TorchDispatchMode):
    """A dispatch mode that keeps the names of the ops."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))
