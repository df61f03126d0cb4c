"""Which tensors and calls the core can take, which it needs a copy of, and which are left to PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

__all__ = [
    "COMPUTE_DTYPES",
    "PLAIN",
    "dense",
    "foreign_call",
    "foreign_tensor",
    "is_batched",
    "is_channels_last",
    "is_symbolic",
    "memory_format",
    "output_like",
]

# The dtypes of the core, and in which dtype it takes parameters then.
COMPUTE_DTYPES = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
PLAIN = (Tensor, torch.nn.Parameter)
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_functorch_is_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state


def foreign_call() -> str | None:
    """Why this call is left to PyTorch's own kernel, whatever its tensors are; or None.

    These transformations run a function's derivative rules or record its operations in ways that an autograd.Function
    on raw memory can't follow.
    """
    if _functorch_is_active():
        return "a torch.func transformation (grad, vmap, jvp ...) is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if _tracing_state() is not None:
        return "torch.jit.trace is active"
    return None


def foreign_tensor(x: Tensor) -> str | None:
    """Why the core can't take x, or None."""
    if type(x) not in PLAIN and not is_symbolic(x):
        return f"the input is a {type(x).__name__}"
    if not x.is_cpu:
        return f"the input is on device {x.device}"
    if x.dtype not in COMPUTE_DTYPES:
        return f"the input has dtype {x.dtype}"
    if x.layout is not torch.strided or x.is_nested:
        return f"the input is nested or has layout {x.layout}"
    return None


def is_symbolic(x: Tensor) -> bool:
    """Whether x stands for a tensor while operations are recorded; such a tensor goes through dispatched ops."""
    return isinstance(x, (FakeTensor, FunctionalTensor))


def is_channels_last(x: Tensor) -> bool:
    """Whether x is dense in channels_last order and not in contiguous order."""
    last = _LAST.get(x.dim())
    return last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last)


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of PyTorch's output for x: channels_last if its strides are in that order, else contiguous."""
    rank = x.dim()
    if rank not in _LAST or x.is_contiguous() or not _strides_are_channels_last(x.shape, x.stride()):
        return torch.contiguous_format
    return _LAST[rank]


def _strides_are_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """PyTorch's rule (c10/core/MemoryFormat.h): strides grow from the channel axis over the last axes to axis 0."""
    if strides[1] == 0:
        return False
    least = 0
    for i in (1, *range(len(shape) - 1, 1, -1), 0):
        if shape[i] == 0 or strides[i] < least or (i == 0 and least == strides[1]):
            return False
        least = strides[i] * shape[i] if shape[i] > 1 else strides[i]
    return True


def dense(x: Tensor, like: torch.memory_format | None = None) -> Tensor:
    """x if it is dense in the memory format `like`, else a copy that is. The default is the one of `memory_format`."""
    return x.resolve_neg().contiguous(memory_format=memory_format(x) if like is None else like)


def output_like(x: Tensor) -> Tensor:
    """An uninitialized tensor with the strides that y has for this x."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty_like(x, memory_format=memory_format(x))


def is_batched(t: Tensor) -> bool:
    """Whether this stands for many tensors at once: torch.autograd.grad(is_grads_batched=True) makes such gradients."""
    return bool(functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t))
