"""State of the NumPy layer into PyTorch's modules and out of them; convert.py says what carries over, and how.

PyTorch's momentum=None is ours: both average all batches, which PyTorch counts in num_batches_tracked.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from .._arguments import checks as _checks
from .convert_keras import SWITCHES, check_like, warn_of_variance, widened

if TYPE_CHECKING:
    from .batch_norm import BatchNormalization

__all__ = ["from_torch", "to_torch"]

NAMES = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
COUNT = "num_batches_tracked"
# What our layers have and PyTorch's have not, and the value at which it isn't missed.
REFUSED = {"activation": None, "virtual_batch_size": None, "nan_policy": "propagate", "renorm": False}
REFUSED |= {"adjustment": None, "num_classes": None, **SWITCHES}


def to_torch(layer: BatchNormalization, target: Any = None) -> Any:
    """`layer` in PyTorch's terms.

    Without a target: {"state_dict": {"weight", "bias", "running_mean", "running_var"}, "eps", "momentum"}, of NumPy
    arrays, with "num_batches_tracked" where momentum is None. With `target`, a torch BatchNorm module of as many
    channels: weights, running statistics, eps and momentum are set, and it is returned. PyTorch's channel axis is 1,
    whatever ours is.

    Raises:
        RuntimeError: `layer` isn't built.
        ValueError: the layer has what PyTorch's has not: an activation, several axes, ghosts, a nan_policy, renorm, an
            adjustment, labels or a switch that isn't the default; or `target` has other weights or no running
            statistics.
        TypeError: dtypes differ.
    Warns:
        UserWarning: correction=0; PyTorch goes on with sample variances. Inference is the same.
    """
    state = layer.state_dict()
    if not isinstance(layer.axis, int):
        raise ValueError(f"axis must be one axis, as in PyTorch's BatchNorm. Received: {layer.axis}")
    for name, plain in REFUSED.items():
        if (value := getattr(layer, name, plain)) != plain:
            raise ValueError(f"{name} must be {plain!r}, as PyTorch's BatchNorm has no other. Received: {value!r}")
    momentum = None if layer.momentum is None else _complement(layer.momentum)
    if not layer.correction:
        warn_of_variance("PyTorch averages sample variances", layer.correction)
    batches = state.pop("batches", None)
    if target is None:
        renamed = {NAMES[name]: array for name, array in state.items()}
        counted = {} if batches is None else {COUNT: batches}
        return {"state_dict": renamed | counted, "eps": layer.epsilon, "momentum": momentum}
    import torch

    tensors: dict[str, Any] = {name: getattr(target, theirs, None) for name, theirs in NAMES.items()}
    for name, tensor in tensors.items():
        check_like(name, state.get(name), tensor)
    with torch.no_grad():
        for name, array in state.items():
            tensors[name].copy_(torch.from_numpy(array))
        if batches is not None:
            getattr(target, COUNT).fill_(int(batches))
    target.eps, target.momentum = layer.epsilon, momentum
    return target


def from_torch(
    cls: type[BatchNormalization],
    source: Any,
    *,
    axis: int = 1,
    eps: float | None = None,
    momentum: float | None = None,
) -> BatchNormalization:
    """A layer that goes on where `source` stands: a torch BatchNorm module, what `to_torch` returns, or a bare state
    dict. The layer has correction=1, as PyTorch's running_var averages sample variances, so that training on gives
    the same statistics on both sides. float16 and bfloat16 tensors become float32.

    Args:
        axis: of the new layer; 1 as in PyTorch, or -1 for channels_last data.
        eps, momentum: in PyTorch's sense (momentum weighs the new value), in place of the source's. A bare state
            dict has neither, so both are needed with it. A source's momentum=None stays None, and its count goes along.

    Raises:
        ValueError: something is missing, or the module has track_running_stats=False.
        TypeError: `source` is neither a mapping nor a batch norm module.
    """
    state: Mapping[str, Any]
    if isinstance(source, Mapping):
        state = source.get("state_dict", source)
        known = eps is not None or source.get("eps") is not None
        if not known or (momentum is None and ("momentum" not in source or "state_dict" not in source)):
            raise ValueError(f"eps and momentum must be passed with a state dict. Received: {eps=}, {momentum=}")
        given = source.get("eps"), source.get("momentum")
    elif hasattr(source, "running_mean") and hasattr(source, "eps"):
        state = {name: getattr(source, name, None) for name in (*NAMES.values(), COUNT)}
        given = source.eps, source.momentum
    else:
        raise TypeError(f"source must be a torch BatchNorm module or a mapping. Received: {type(source).__name__}")
    eps, momentum = (theirs if ours is None else ours for ours, theirs in zip((eps, momentum), given, strict=True))
    arrays = {ours: state[name] for ours, name in NAMES.items() if state.get(name) is not None}
    needed = ["running_mean", "running_var", *([COUNT] if momentum is None else [])]
    if any(state.get(name) is None for name in needed):
        received = [name for name in (*NAMES.values(), COUNT) if state.get(name) is not None]
        raise ValueError(f"source must have {' and '.join(needed)} (track_running_stats=True). Received: {received}")
    layer = cls(
        axis=axis,
        momentum=None if momentum is None else _complement(_checks.real("momentum", momentum, 1.0)),
        epsilon=_checks.real("eps", eps),
        center="beta" in arrays,
        scale="gamma" in arrays,
        correction=1,
    )
    vectors: dict[str, Any] = {name: widened(name, array) for name, array in arrays.items()}
    layer.load_state_dict(vectors if momentum is not None else vectors | {"batches": np.asarray(state[COUNT])})
    return layer


def _complement(momentum: float) -> float:
    """1 - momentum in decimal, so that 0.1 is 0.9 and back 0.1, not 0.09999999999999998."""
    return float(1 - Decimal(repr(float(momentum))))
