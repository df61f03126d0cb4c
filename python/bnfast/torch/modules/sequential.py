"""torch.nn.Sequential that computes a batch norm and the activation after it in one pass.

Between two modules of a Sequential only hooks see the tensor that passes. Where neither module has one, nobody can tell
the two passes from one, but for the time and the memory: values, gradients, state and errors are the same to the bit.
(NaN in a gradient through ReLU6 is not: PyTorch's own vector and scalar code differ there.)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks
from torch.overrides import _get_current_function_mode_stack as _function_mode_stack
from torch.utils._device import DeviceContext  # of torch.set_default_device: batch norm makes no tensor by a factory

from ..functional import is_plain_call
from ..tensors import PLAIN
from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormForward

__all__ = ["PLAIN_CLASSES", "FusedSequential", "can_fuse", "fused_class", "fused_pairs"]

_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
_ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.LeakyReLU: "leaky_relu"}
# In half precision two passes round twice, and a gate that reads the rounded value in between may differ.
_DTYPES = (torch.float32, torch.float64)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_compiled_call_impl")
_function_modes = torch._C._len_torch_function_stack


def _code() -> tuple[Any, ...]:
    """What PyTorch would run between the modules: profilers and mocks replace some of it."""
    return (
        nn.Module.__call__,
        nn.Module._call_impl,
        nn.Sequential.forward,
        BatchNormForward.forward,
        nn.ReLU.forward,
        nn.Hardtanh.forward,
        nn.LeakyReLU.forward,
        F.relu,
        F.hardtanh,
        F.leaky_relu,
    )


_OWN_CODE = _code()


class FusedSequential(nn.Sequential):  # type: ignore[misc]
    """What `fused_class` adds to a class of Sequentials: another `forward`, and pickles by that class."""

    def forward(self, input):  # type: ignore[no-untyped-def]  # torch.fx writes annotations into its graphs
        """The modules in turn. A batch norm and the activation after it are one step, where nobody looks between."""
        if not _nobody_looks() or super().forward.__func__ is not nn.Sequential.forward:
            return super().forward(input)
        left = iter(self._modules.values())
        module = next(left, left)
        while module is not left:
            if not _is_norm(module):
                input = module(input)
                module = next(left, left)
                continue
            after = next(left, left)  # before the call: a batch norm runs no code which could replace the next module
            if _is_activation(after) and type(input) in PLAIN and input.dtype in _DTYPES:
                slope = getattr(after, "negative_slope", 0.0)
                input = module._activated(input, _ACTIVATIONS[type(after)], slope)
                module = next(left, left)
            else:
                input = module(input)
                module = after
        return input

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) not in PLAIN_CLASSES:  # derived by somebody else
            return super().__reduce_ex__(protocol)
        return _new, (PLAIN_CLASSES[type(self)],), self.__getstate__()

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script compiles the Sequential as it was."""
        fused = next(kind for kind in type(self).__mro__ if kind in PLAIN_CLASSES)  # somebody may have derived from it
        made: nn.Module = object.__new__(PLAIN_CLASSES[fused])
        made.__dict__.update(self.__dict__)
        return made


_FUSED: dict[type, Any] = {}  # by the class of Sequentials; one for each, so that types compare equal
PLAIN_CLASSES: dict[type, type[nn.Sequential]] = {}  # the way back


def fused_class(kind: type[nn.Sequential]) -> type[FusedSequential]:
    """The subclass of `kind`, of its name, that fuses."""
    if kind not in _FUSED:
        own = {"__module__": __name__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        PLAIN_CLASSES[_FUSED.setdefault(kind, type(kind.__name__, (FusedSequential, kind), own))] = kind
    made: type[FusedSequential] = _FUSED[kind]
    return made


def _new(kind: type[nn.Sequential]) -> FusedSequential:
    return object.__new__(fused_class(kind))


Sequential = fused_class(nn.Sequential)  # pickles of the class find it here


def _nobody_looks() -> bool:
    """Whether this is a plain eager call: no compiler, mode, global hook or replaced code."""
    return not (
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
        or (_function_modes() and any(type(mode) is not DeviceContext for mode in _function_mode_stack()))
        or not is_plain_call()
        or _code() != _OWN_CODE
    )


def _is_norm(module: Any) -> bool:
    return type(module) in _NORMS and not _is_watched(module)


def _is_activation(module: Any) -> bool:
    """Whether the kernels compute this activation, as it is now."""
    kind = type(module)
    if kind not in _ACTIVATIONS or _is_watched(module):
        return False
    if kind is nn.ReLU6:
        return (module.min_val, module.max_val) == (0, 6)
    slope = module.__dict__.get("negative_slope") if kind is nn.LeakyReLU else 1
    return type(slope) in (int, float) and 0 < slope <= 1  # with a slope of 0 PyTorch makes NaN of infinity


def _is_watched(module: nn.Module) -> bool:
    """Whether a call does more than the forward of the module's class, as torch.nn.Module's own call looks it up."""
    own = module.__dict__
    return any(map(own.get, _HOOKS)) or "forward" in own or "_call_impl" in own


def fused_pairs(module: FusedSequential) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The batch norms and activations that a plain call takes together, as the modules are now."""
    for norm, activation in pairwise(module._modules.values()):
        if _is_norm(norm) and _is_activation(activation):
            yield norm, activation


# A derived class is taken only where these are PyTorch's: ours has to be made, called and pickled in its place.
_CUSTOM = ("forward", "__call__", "__iter__", "__new__", "__init_subclass__", "__prepare_scriptable__", "__reduce__")
_OWN = {name: inspect.getattr_static(nn.Sequential, name, None) for name in (*_CUSTOM, "__reduce_ex__")}


def can_fuse(module: nn.Module) -> bool:
    """Whether `module` is a Sequential in which an activation stands right after a batch norm of bnfast's."""
    kind = type(module)
    return (
        isinstance(module, nn.Sequential)
        and not isinstance(module, FusedSequential)
        and not hasattr(module, "parametrizations")  # its class is one that PyTorch made for it
        and "forward" not in module.__dict__
        and type(kind) is type
        and all(inspect.getattr_static(kind, name, None) is value for name, value in _OWN.items())
        and any(
            type(norm) in _NORMS and type(activation) in _ACTIVATIONS
            for norm, activation in pairwise(module._modules.values())
        )
    )
