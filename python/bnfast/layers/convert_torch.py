"""Convert the NumPy layer to a PyTorch BatchNorm module and back; convert_keras.py lists what differs in meaning.

momentum=None means the same on both sides: the average over all batches, whose number is PyTorch's num_batches_tracked.
torch is imported only to write to a torch module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from .._arguments import checks
from .state import FREEZING_DEFAULTS, Layer, check_same_array, parameter_array, warn_of_variance, whole_number

__all__ = ["from_torch", "to_torch"]

LayerT = TypeVar("LayerT", bound=Layer)

NAMES = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
COUNT = "num_batches_tracked"
REQUIRED_VALUES = {  # of options that PyTorch does not have
    "activation": None,
    "virtual_batch_size": None,
    "nan_policy": "propagate",
    "renorm": False,
    "adjustment": None,
    "num_classes": None,
    **FREEZING_DEFAULTS,
}


def to_torch(layer: Layer, target: Any = None) -> Any:
    """Convert `layer` to a PyTorch module, or to the state dict of one.

    PyTorch's channel axis is always 1; the axis of `layer` is not converted.

    Args:
        target: a torch BatchNorm module with the same number of channels. Its weights, running statistics, eps and
            momentum are set.

    Returns:
        `target`; or, without one, {"state_dict": {"weight", "bias", "running_mean", "running_var"}, "eps", "momentum"}
        with NumPy arrays, and "num_batches_tracked" in the state dict if momentum is None.

    Raises:
        RuntimeError: `layer` is not built.
        ValueError: the layer uses what PyTorch does not have: an activation, several axes, ghost batches, a nan_policy,
            renorm, an adjustment, labels or a non-default freezing switch; or `target` has other weights or no running
            statistics.
        TypeError: dtypes differ.
    Warns:
        UserWarning: correction is 0, but PyTorch averages sample variances. Inference is the same.
    """
    state = layer.state_dict()
    if not isinstance(layer.axis, int):
        raise ValueError(f"axis must be one axis, as in PyTorch's BatchNorm. Received: {layer.axis}")
    for name, required in REQUIRED_VALUES.items():
        if (value := getattr(layer, name, required)) != required:
            raise ValueError(f"{name} must be {required!r}, as PyTorch's BatchNorm has no other. Received: {value!r}")
    momentum = None if layer.momentum is None else _complement(layer.momentum)
    if not layer.correction:
        warn_of_variance("PyTorch averages sample variances", layer.correction, 4)
    batches = state.pop("batches", None)
    if target is None:
        renamed = {NAMES[name]: array for name, array in state.items()}
        counted = {} if batches is None else {COUNT: batches}
        return {"state_dict": renamed | counted, "eps": layer.epsilon, "momentum": momentum}
    import torch

    tensors: dict[str, Any] = {name: getattr(target, theirs, None) for name, theirs in NAMES.items()}
    for name, tensor in tensors.items():
        check_same_array(name, state.get(name), tensor)
    if batches is not None and getattr(target, COUNT, None) is None:
        raise ValueError(f"target must have {COUNT}, as this layer has momentum=None. Received: {target!r}")
    with torch.no_grad():
        for name, array in state.items():
            tensors[name].copy_(torch.from_numpy(array))
        if batches is not None:
            getattr(target, COUNT).fill_(int(batches))
    target.eps, target.momentum = layer.epsilon, momentum
    return target


def from_torch(
    cls: type[LayerT],
    source: Any,
    *,
    axis: int = 1,
    eps: float | None = None,
    momentum: float | None = None,
) -> LayerT:
    """A layer with the settings and state of a PyTorch module, so that training can continue here.

    The layer has correction=1, because PyTorch's running_var averages sample variances: further training then gives the
    same statistics on both sides. float16 and bfloat16 tensors become float32.

    Args:
        source: a torch BatchNorm module, the result of `to_torch`, or a bare state dict.
        axis: channel axis of the new layer: 1 as in PyTorch, or -1 for channels_last data.
        eps, momentum: replace the source's, with PyTorch's meaning (momentum is the weight of the new value). A bare
            state dict has neither, so both must be given with it. If the source has momentum=None, so has the layer,
            with the source's batch count.

    Raises:
        ValueError: something is missing, or the module has track_running_stats=False.
        TypeError: `source` is neither a mapping nor a batch norm module.
    """
    state: Mapping[str, Any]
    if isinstance(source, Mapping):
        state = source.get("state_dict", source)
        if not isinstance(state, Mapping):
            raise TypeError(f"source['state_dict'] must be a mapping. Received: {type(state).__name__}")
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
        momentum=None if momentum is None else _complement(checks.real("momentum", momentum, 1.0)),
        epsilon=checks.real("eps", eps),
        center="beta" in arrays,
        scale="gamma" in arrays,
        correction=1,
    )
    vectors: dict[str, Any] = {name: parameter_array(name, array) for name, array in arrays.items()}
    layer.load_state_dict(vectors if momentum is not None else vectors | {"batches": whole_number(state[COUNT])})
    return layer


def _complement(momentum: float) -> float:
    """1 - momentum in decimal arithmetic, so that 0.1 becomes 0.9 and then 0.1 again, not 0.09999999999999998."""
    from decimal import Decimal  # not needed to import bnfast

    return float(1 - Decimal(repr(float(momentum))))
