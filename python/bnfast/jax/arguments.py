"""The arguments of functional.py as operands and options, and every user-facing error of its functions.

ValueError for values and shapes, TypeError for types and dtypes, in the words of bnfast's NumPy functions. Values that
aren't known while tracing, as those of a mask, are checked by the handlers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._arguments import checks
from .._arguments.array_checks import check_like
from .._arguments.axes import Axes
from . import support
from .mesh import agree
from .options import Options
from .reference import Array, compute_dtype

__all__ = ["batch_options", "like", "mask_weights", "operands", "restore", "tensor", "vectors"]

TENSORS = ("x", "dy", "y", "residual")  # in the shape of x

_DTYPES = (np.float32, np.float64, np.float16, jnp.bfloat16)


def as_array(name: str, value: Any) -> Array:
    """A JAX array or tracer; NumPy arrays become one, as in JAX's own functions (float64 only with x64 enabled)."""
    if isinstance(value, jax.Array):
        return value
    if not isinstance(value, np.ndarray | np.generic) and not hasattr(value, "__jax_array__"):
        raise TypeError(f"{name} must be a JAX or NumPy array. Received: {type(value).__name__}")
    return jnp.asarray(value)


def _floating(name: str, value: Any) -> Array:
    array = as_array(name, value)
    if array.dtype not in _DTYPES:
        raise TypeError(f"{name} must have dtype float32, float64, float16 or bfloat16. Received: {array.dtype}")
    return array


def tensor(name: str, value: Any) -> Array:
    """An array of rank >= 1."""
    array = _floating(name, value)
    if array.ndim == 0:
        raise ValueError(f"{name} must have at least one axis. Received: shape ()")
    return array


def like(name: str, value: Any, x: Array) -> Array | None:
    """An array with the shape and dtype of x."""
    if value is None:
        return None
    array = as_array(name, value)
    check_like(name, array, "x", x)
    return array


def vectors(axes: Axes, required: bool = False, **given: Any) -> dict[str, Array]:
    """The vectors that are given, one value per channel."""
    found = {}
    for name, value in given.items():
        if value is None:
            if required:
                raise TypeError(f"{name} must be an array of shape {axes.shape}. Received: None")
            continue
        array = _floating(name, value)
        if array.shape != axes.shape:
            raise ValueError(f"{name} must have shape {axes.shape} to match {axes} of x. Received: {array.shape}")
        found[name] = array
    return found


def mask_weights(mask: Any, x: Array, axes: Axes) -> dict[str, Array]:
    """The mask, if there is one: in the shape of x without the channel axes, or with the rank of x."""
    if mask is None:
        return {}
    array = as_array("mask", mask)
    if array.dtype.kind not in "biuf" and array.dtype != jnp.bfloat16:
        raise TypeError(f"mask must have a boolean, integer or floating dtype. Received: {array.dtype}")
    if array.shape != axes.other_shape:
        full = axes.keepdims_shape
        if array.ndim != x.ndim or any(have not in (1, want) for have, want in zip(array.shape, full, strict=True)):
            wanted = f"have shape {axes.other_shape}, or broadcast to {full} with as many axes as x"
            raise ValueError(f"mask must {wanted}. Received: {array.shape}")
    return {"mask": array}


def batch_options(x: Array, axes: Axes, activation: Any, negative_slope: Any, **others: Any) -> Options:
    """The options of a call on x, whose axes `merge` has merged."""
    rank = len(axes.x_shape) - len(axes.axes) + 1
    return Options(
        way=support.way(x),
        axis=axes.merged_axis - rank,
        activation=checks.activation(activation),
        negative_slope=checks.real("negative_slope", negative_slope),
        **others,
    )


def operands(axes: Axes, given: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays as the kernels take them: one channel axis; vectors (C,), of float32 or float64 (half types are
    widened, which is exact); the mask as N*S weights, float64 for float64 x and else float32, a constant to gradients.
    """
    found = {}
    for name, array in agree(given).items():
        if name in TENSORS:
            found[name] = merge(axes, array)
        elif name == "mask":
            full = axes.other_shape if array.shape == axes.other_shape else axes.keepdims_shape
            weights = jnp.broadcast_to(array, full).astype(compute_dtype(given["x"])).reshape(-1)
            found[name] = jax.lax.stop_gradient(weights)
        else:
            found[name] = array.reshape(-1).astype(compute_dtype(array))
    return found


def merge(axes: Axes, array: Array) -> Array:
    """An array with the shape of x, with one channel axis."""
    if len(axes.axes) == 1:
        return array
    array = array if axes.adjacent else array.transpose(axes.order)
    axis, end = axes.merged_axis, axes.merged_axis + len(axes.axes)
    return array.reshape(*array.shape[:axis], -1, *array.shape[end:])


def restore(axes: Axes, array: Array) -> Array:
    """The array that `merge` got."""
    if len(axes.axes) == 1:
        return array
    if axes.adjacent:
        return array.reshape(axes.x_shape)
    order = axes.order
    array = array.reshape([axes.x_shape[i] for i in order])
    return array.transpose([order.index(i) for i in range(len(order))])
