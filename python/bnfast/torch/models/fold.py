"""Merge batch norms into the convolution or Linear before them, for inference."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.hooks import RemovableHandle

from ..modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .accelerate import to_torch

__all__ = ["fold"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm1d, BatchNorm2d, BatchNorm3d)


def fold(module: ModuleT, example: Any = None) -> ModuleT:
    """A copy of `module` for inference, in which batch norms are merged into the convolution or Linear before them.

        weight' = weight*scale, bias' = (bias - running_mean)*scale + batch norm's bias,
        scale = batch norm's weight/sqrt(running_var + eps)

    A batch norm with running statistics is merged if it alone reads the output of a convolution or Linear, both are
    called once per call of the model, and have no hooks. A torch.nn.Identity takes its place. Every other module stays:
    the copy has the names and classes of `module`. It is in evaluation mode. torch.fx finds which module reads which.
    In a model that it can't trace, batch norms in torch.nn.Sequentials are merged if a call of the model on `example`
    calls the Sequential as a whole; without an example they stay, with a warning. torch.fx knows no shapes: if a Linear
    has as many outputs as its batch norm has channels, the batch norm is taken to read (N, C).

    Args:
        module: any torch.nn.Module, accelerated or not. It isn't changed.
        example: an input of the model, or a tuple of its arguments. Only for models that torch.fx can't trace.

    Returns:
        The copy. Its outputs differ by rounding: a few 1e-7 of the largest value in float32.

    Raises:
        TypeError: `module` is no torch.nn.Module.

    Example:
        >>> import bnfast.torch, torch
        >>> bnfast.torch.fold(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)))
        Sequential(
          (0): Linear(in_features=2, out_features=3, bias=True)
          (1): Identity()
        )
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module. Received: {type(module).__name__}")
    made: ModuleT = copy.deepcopy(module).eval()
    parts = _traceable(made)
    if parts != [("", made)] and any(_pairs(parts)):
        parts = _called_whole(made, parts, example)
    while pairs := [*_pairs(parts)]:
        for before, norm in pairs:
            _replace(made, before, _merged(made.get_submodule(before), made.get_submodule(norm)))
            _replace(made, norm, nn.Identity())
    return made


def _pairs(parts: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, str]]:
    """The names of (product, batch norm) that can be merged, each module in at most one pair."""
    for prefix, part in parts:
        nodes = torch.fx.Tracer().trace(part).nodes
        calls = Counter(id(part.get_submodule(n.target)) for n in nodes if n.op == "call_module")
        for node in nodes:
            before = node.args[0] if node.op == "call_module" and node.args else None
            if not isinstance(before, torch.fx.Node) or before.op != "call_module" or len(before.users) > 1:
                continue
            product, norm = part.get_submodule(before.target), part.get_submodule(node.target)
            if calls[id(product)] == calls[id(norm)] == 1 and _can_merge(product, norm):
                yield prefix + before.target, prefix + node.target


def _traceable(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model, if torch.fx can trace it; else its outermost Sequentials that it can trace."""
    found: list[tuple[str, nn.Module]] = []
    names = Counter(id(one) for _, one in module.named_modules(remove_duplicate=False))
    for name, part in module.named_modules():
        if any(name == outer[:-1] or name.startswith(outer) for outer, _ in found):
            continue
        if part is not module and (not isinstance(part, nn.Sequential) or names[id(part)] > 1):
            continue
        try:
            torch.fx.Tracer().trace(part)
        except Exception:  # data-dependent Python: torch.fx raises all kinds of errors
            continue
        if part is module:
            return [("", module)]
        found.append((name + ".", part))
    return found


def _called_whole(model: nn.Module, parts: list[tuple[str, nn.Module]], example: Any) -> list[tuple[str, nn.Module]]:
    """Those of the parts that a call of the model calls, and whose modules it calls through them alone."""
    if example is None:
        warnings.warn(
            f"fold: torch.fx can't trace {type(model).__name__}, so its batch norms stay. With an example input, "
            "fold(model, x), those in its Sequentials are merged.",
            stacklevel=3,
        )
        return []
    running: list[nn.Module] = []
    whole, reached_into = set(), set()

    def begin(part: nn.Module, _: Any) -> None:
        running.append(part)

    def end(part: nn.Module, _: Any, __: Any) -> None:
        running.remove(part)
        whole.add(part)

    def watch(part: nn.Module, inner: nn.Module) -> RemovableHandle:
        return inner.register_forward_pre_hook(lambda *_: None if part in running else reached_into.add(part))

    handles = [one.register_forward_pre_hook(begin) for _, one in parts]
    handles += [one.register_forward_hook(end) for _, one in parts]
    handles += [watch(part, inner) for _, part in parts for inner in part.modules() if inner is not part]
    with torch.no_grad():
        model(*(example if isinstance(example, tuple) else (example,)))
    for handle in handles:
        handle.remove()
    return [(name, part) for name, part in parts if part in whole - reached_into]


def _can_merge(product: nn.Module, norm: nn.Module) -> bool:
    if type(norm) not in _NORMS or norm.running_mean is None or norm.running_var is None:
        return False
    if type(product) is nn.Linear and not isinstance(norm, nn.BatchNorm1d):
        return False
    if type(product) is nn.Linear and product.out_features != norm.num_features:  # an input of shape (N, C, L)
        return False
    if type(product) not in (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED):
        return False
    if type(product) in _TRANSPOSED and product.groups > 1:  # PyTorch's fuse_conv_bn_eval scales the wrong axis
        return False
    return not any(_is_watched(one) for one in (product, norm))


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks, an assigned forward or a parametrization see or change what the module computes."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in module.__dict__ or not {"weight", "bias"} <= module._parameters.keys()


def _merged(product: Any, norm: Any) -> nn.Module:
    norm = to_torch(norm)
    if isinstance(product, nn.Linear):
        return fuse_linear_bn_eval(product, norm)
    return fuse_conv_bn_eval(product, norm, transpose=isinstance(product, _TRANSPOSED))


def _replace(module: nn.Module, name: str, made: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, made)
