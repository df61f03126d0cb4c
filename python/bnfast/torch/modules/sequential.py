"""torch.nn.Sequential that computes a batch norm and the activation after it in one pass.

Between two modules of a Sequential only hooks see the tensor that passes. Where neither module has one, nobody can tell
the two passes from one, but for the time and the memory: values, gradients, state and errors are the same to the bit.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

from ..functional import is_plain_call
from ..tensors import PLAIN
from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["FusedSequential", "can_fuse", "fused_class", "fused_pairs", "plain_class"]

_ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.LeakyReLU: "leaky_relu"}
_PAIRS = {(norm, activation) for norm in (BatchNorm1d, BatchNorm2d, BatchNorm3d) for activation in _ACTIVATIONS}
_OWN_FORWARDS = {kind: kind.forward for kind in _ACTIVATIONS}
_OWN_CALL = nn.Module.__call__
_OWN = {
    name: inspect.getattr_static(nn.Sequential, name)
    for name in ("forward", "__call__", "__iter__", "__new__", "__reduce__", "__reduce_ex__")
}
# In half precision two passes round twice, and a gate that reads the rounded value in between may differ.
_DTYPES = (torch.float32, torch.float64)


class FusedSequential(nn.Sequential):  # type: ignore[misc]
    """What `fused_class` adds to a class of Sequentials: another `forward`, and pickles by that class."""

    def forward(self, input: Any) -> Any:
        """The modules in turn. A batch norm and the activation after it are one step, where no hook looks between."""
        if not _fuses(input):
            return super().forward(input)
        modules = list(self._modules.values())
        at = 0
        while at < len(modules):
            if _is_pair(modules[at : at + 2]) and _fuses(input):
                norm, activation = modules[at : at + 2]
                input = norm._activated(input, _ACTIVATIONS[type(activation)], _slope(activation))
                at += 2
            else:
                input = modules[at](input)
                at += 1
        return input

    def __reduce__(self) -> Any:
        return _new, (plain_class(type(self)),), self.__getstate__()

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script compiles the Sequential as it was."""
        made: nn.Module = object.__new__(plain_class(type(self)))
        made.__dict__.update(self.__dict__)
        return made


_FUSED: dict[type, Any] = {}  # one class per class of Sequentials, so that types compare equal


def fused_class(kind: type[nn.Sequential]) -> type[FusedSequential]:
    """The subclass of `kind`, of its name, that fuses."""
    if kind not in _FUSED:
        own = {"__module__": __name__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        _FUSED.setdefault(kind, type(kind.__name__, (FusedSequential, kind), own))
    made: type[FusedSequential] = _FUSED[kind]
    return made


def plain_class(kind: type[FusedSequential]) -> type[nn.Sequential]:
    """The class that `fused_class` made `kind` of."""
    return kind.__bases__[1]


def _new(kind: type[nn.Sequential]) -> FusedSequential:
    return object.__new__(fused_class(kind))


def _fuses(x: Any) -> bool:
    return type(x) in PLAIN and x.dtype in _DTYPES and is_plain_call() and nn.Module.__call__ is _OWN_CALL


def _is_pair(modules: Sequence[nn.Module]) -> bool:
    """Whether these are a batch norm and an activation that nobody sees between."""
    return (
        tuple(map(type, modules)) in _PAIRS
        and type(modules[1]).forward is _OWN_FORWARDS[type(modules[1])]
        and 0 <= _slope(modules[1]) < math.inf  # the kernels' range
        and not any(map(_is_watched, modules))
    )


def _slope(activation: nn.Module) -> float:
    return float(getattr(activation, "negative_slope", 0.0))


def _is_watched(module: nn.Module) -> bool:
    """Whether a call does more than the forward of the module's class, as torch.nn.Module's own call looks it up."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )


def fused_pairs(module: FusedSequential) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The batch norms and activations that a call takes together, as the modules are now."""
    for pair in pairwise(module._modules.values()):
        if _is_pair(pair):
            yield pair


def can_fuse(module: nn.Module) -> bool:
    """Whether `module` is a Sequential in which an activation stands right after a batch norm of bnfast's.

    Derived classes are taken, too, unless they have a way of their own to be called, built or pickled.
    """
    kind = type(module)
    return (
        isinstance(module, nn.Sequential)
        and not isinstance(module, FusedSequential)
        and "forward" not in module.__dict__
        and all(inspect.getattr_static(kind, name) is value for name, value in _OWN.items())
        and any(tuple(map(type, pair)) in _PAIRS for pair in pairwise(module._modules.values()))
    )
