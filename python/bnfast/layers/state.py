"""The state of a NumPy layer: the order of its arrays, loading them, and comparing them with another framework's.

`Layer` is what these functions and the converters (convert_keras.py, convert_torch.py) need of a layer, so that they
do not import the layer class, whose methods call them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from .._arguments import checks
from .._arguments.array_checks import parameter
from .._arguments.arrays import Array, as_array
from .renorm import RENORM_STATE

__all__ = [
    "FREEZING_DEFAULTS",
    "MOST_BATCHES",
    "STATE_ORDER",
    "Layer",
    "batch_count",
    "check_same_array",
    "load_state",
    "parameter_array",
    "warn_of_variance",
    "whole_number",
]

STATE_ORDER = ("gamma", "beta", "moving_mean", "moving_variance", *RENORM_STATE)
NEVER_NEGATIVE = ("moving_variance", "moving_stddev", "renorm_stddev")
MOST_BATCHES = 2**63 - 1  # an int64, in which PyTorch and Keras count too
FREEZING_DEFAULTS: dict[str, Any] = {
    "update_statistics": True,
    "use_batch_statistics": None,
    "trainable_affine": True,
}


class Layer(Protocol):
    """A NumPy batch normalization layer, as the functions below and the converters use it."""

    axis: int | tuple[int, ...]
    momentum: float | None
    epsilon: float
    activation: str | None
    negative_slope: float
    nan_policy: str
    correction: int
    dtype: np.dtype[Any] | None
    trainable: bool
    virtual_batch_size: int | None
    renorm: bool
    renorm_clipping: Mapping[str, float | None] | None
    renorm_momentum: float
    adjustment: Any
    moving_mean: Array | None

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    @property
    def built(self) -> bool: ...

    def state_dict(self) -> dict[str, Array]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def _array_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]: ...


def load_state(layer: Layer, state: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Copy the arrays `names` from `state` to `layer`, all or none. See BatchNormalization.load_state_dict."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping of names to arrays. Received: {type(state).__name__}")
    missing, unknown = [n for n in names if n not in state], [str(n) for n in state if n not in names]
    if missing or unknown:
        raise ValueError(f"state must have the keys {list(names)}. Missing: {missing}, unknown: {unknown}")
    arrays = {name: as_array(name, state[name]) for name in names}
    shape = _vector_shape(layer, arrays["moving_mean"])
    for name, array in arrays.items():
        dtype = getattr(layer, name).dtype if layer.built else layer.dtype
        if dtype is not None and array.dtype != dtype:
            raise TypeError(f"{name} must have dtype {dtype}, like the layer's. Received: {array.dtype}")
        parameter(name, array)
        if array.shape != (wanted := layer._array_shape(name, shape)):
            raise ValueError(f"{name} must have shape {wanted}, one value per channel. Received: {array.shape}")
        if name in NEVER_NEGATIVE and (array < 0).any():  # NaN passes: nan_policy="propagate" stores it
            raise ValueError(f"{name} must be at least 0. Received: {array[array < 0][0]}")
        if layer.built and not getattr(layer, name).flags.writeable:
            raise ValueError(f"the layer's {name} must be writeable, as it is overwritten. Received: a read-only array")
    copies = {name: np.array(array) for name, array in arrays.items()}  # first: `state` may hold the layer's own arrays
    built = layer.built
    for name, array in copies.items():
        if built:
            getattr(layer, name)[...] = array
        else:
            setattr(layer, name, array)


def batch_count(value: Any) -> int:
    """The number of batches in a state, as an int that an int64 holds."""
    batches = checks.integer("batches", value)
    if batches < 0:
        raise ValueError(f"batches must be at least 0. Received: {batches}")
    if batches > MOST_BATCHES:
        raise ValueError(f"batches must be less than 2**63. Received: {batches}")
    return batches


def _vector_shape(layer: Layer, mean: Array) -> tuple[int, ...]:
    """The shape of the layer's vectors, from moving_mean if the layer is not built."""
    if layer.moving_mean is not None:
        return layer.moving_mean.shape
    if isinstance(layer.axis, int):
        return (mean.size,)
    if mean.ndim != len(layer.axis):
        raise ValueError(f"moving_mean must have the extents of axes {layer.axis} as its shape. Received: {mean.shape}")
    return mean.shape


def parameter_array(name: str, value: Any) -> Array:
    """An array, torch tensor (with or without gradient) or Keras variable as a NumPy array. float16 and bfloat16
    become float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    array = np.asarray(value) if hasattr(value, "assign") else as_array(name, value)
    return array.astype(np.float32) if array.dtype.name in ("float16", "bfloat16") else array


def whole_number(value: Any) -> Any:
    """A count as an int or an array of rank 0, from either or from a torch tensor or a Keras variable."""
    if hasattr(value, "detach") or hasattr(value, "assign"):
        return parameter_array("batches", value)
    return value


def check_same_array(name: str, ours: Array | None, theirs: Any, shape: tuple[int, ...] | None = None) -> None:
    """Raise an error unless both are None or have equal shape and dtype. `shape`, if given, replaces theirs.shape."""
    if (ours is None) != (theirs is None):
        wanted = "have no" if ours is None else "have a"
        raise ValueError(f"target must {wanted} {name}, like this layer. Received: {theirs!r}")
    if ours is not None:
        shape = tuple(theirs.shape) if shape is None else shape
        if shape != ours.shape:
            raise ValueError(f"target's {name} must have shape {ours.shape}. Received: {shape}")
        dtype = str(getattr(theirs.dtype, "name", theirs.dtype)).removeprefix("torch.")
        if dtype != ours.dtype.name:
            raise TypeError(f"target's {name} must have dtype {ours.dtype}, like this layer's. Received: {dtype}")


def warn_of_variance(theirs: str, correction: int, stacklevel: int) -> None:
    """Warn that the other framework averages the other kind of variance."""
    warnings.warn(
        f"{theirs}, but this layer has correction={correction}. Inference is the same, but in further training the "
        f"moving variances will differ by a factor of up to M/(M - 1)",
        UserWarning,
        stacklevel=stacklevel,
    )
