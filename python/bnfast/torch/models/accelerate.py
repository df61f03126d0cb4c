"""Change the classes of a model's normalizations to bnfast's, and of Sequentials that hold them; and back."""

from __future__ import annotations

import inspect
from typing import TypeVar

import torch
from torch.nn.modules.lazy import LazyModuleMixin

from ..modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ..modules.group_norm import GroupNorm, LayerNorm
from ..modules.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from ..modules.sequential import PLAIN_CLASSES, can_fuse, fused_class
from ..modules.sync_batch_norm import SyncBatchNorm

__all__ = ["CLASSES", "accelerate", "to_torch", "why_unchanged"]

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)

CLASSES: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
    torch.nn.GroupNorm: GroupNorm,
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.InstanceNorm1d: InstanceNorm1d,
    torch.nn.InstanceNorm2d: InstanceNorm2d,
    torch.nn.InstanceNorm3d: InstanceNorm3d,
    torch.nn.SyncBatchNorm: SyncBatchNorm,
}
_BACK = {ours: theirs for theirs, ours in CLASSES.items()}
_OWN_FORWARDS = {theirs: inspect.getattr_static(theirs, "forward") for theirs in CLASSES}


def accelerate(module: ModuleT) -> ModuleT:
    """Let every normalization in `module` compute on bnfast's kernels, in place.

    Only classes change, to subclasses of their own: the module tree, names, parameters, buffers, state dict, hooks,
    training mode and optimizers that hold the parameters stay. Normalizations of other classes, also of subclasses of
    torch.nn's, are left as they are; `report` says why. `to_torch` undoes it.

    A torch.nn.Sequential in which a ReLU, ReLU6 or LeakyReLU stands right after a batch norm takes the two in one pass,
    in float32 and float64, with the same bits. In a call in which one of the two has a hook it takes them in turn.

    Args:
        module: any torch.nn.Module.

    Returns:
        `module` itself.

    Raises:
        TypeError: `module` is no torch.nn.Module.

    Example:
        >>> import bnfast.torch, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> bnfast.torch.accelerate(model)[1]
        BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
        >>> type(model[1]).__module__.split(".")[0]
        'bnfast'
    """
    for one in _modules(module):
        if type(one) in CLASSES and why_unchanged(one) is None:
            one.__class__ = CLASSES[type(one)]
    for one in _modules(module):
        if can_fuse(one):
            one.__class__ = fused_class(type(one))
    return module


def to_torch(module: ModuleT) -> ModuleT:
    """Undo `accelerate`: every normalization of bnfast's in `module` gets torch.nn's class again, in place.

    A model saved whole (torch.save(model), pickle) names its classes; after to_torch the file needs no bnfast. State
    dicts need no conversion.

    Returns:
        `module` itself.

    Raises:
        TypeError: `module` is no torch.nn.Module.

    Example:
        >>> import bnfast.torch, torch
        >>> model = bnfast.torch.accelerate(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
        >>> type(bnfast.torch.to_torch(model)[0]) is torch.nn.BatchNorm1d
        True
    """
    for one in _modules(module):
        if type(one) in _BACK:
            one.__class__ = _BACK[type(one)]
            one.__dict__.pop("_bnfast_reason", None)
        elif type(one) in PLAIN_CLASSES:
            one.__class__ = PLAIN_CLASSES[type(one)]
    return module


def _modules(module: torch.nn.Module) -> list[torch.nn.Module]:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module. Received: {type(module).__name__}")
    return list(module.modules())


def why_unchanged(module: torch.nn.Module) -> str | None:
    """Why `accelerate` leaves this normalization as it is, or None."""
    kind = type(module)
    if isinstance(module, LazyModuleMixin):
        return "it is lazy: call the model once, then accelerate it"
    if kind not in CLASSES:
        return f"{kind.__module__}.{kind.__qualname__} is a class of its own: what it computes is unknown"
    if "forward" in module.__dict__:
        return "its forward was assigned"
    if inspect.getattr_static(kind, "forward") is not _OWN_FORWARDS[kind]:
        return f"{kind.__name__}.forward was replaced"
    return None
