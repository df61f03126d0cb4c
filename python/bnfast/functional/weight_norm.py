"""Weight normalization: a weight as length times direction, w = g * v/|v|, and its gradients. In float64 throughout.

|v| is taken over all axes but `axis`, the output channels: -1 for the kernels of Keras's Dense and convolutions, -2 for
those of its transposed convolutions, (-2, -1) for depthwise ones, 0 for PyTorch's. Where v is all zeros, so are w, dv
and dg: no NaN. Source: Salimans and Kingma 2016, https://arxiv.org/abs/1602.07868.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .._arguments import checks as _checks
from .._arguments.arrays import Array, as_array

__all__ = ["weight_norm", "weight_norm_grad"]


def weight_norm(v: Any, g: Any, axis: int | tuple[int, ...] = -1) -> Array:
    """w = g * v/|v|, with |v| over all axes but `axis`.

    Args:
        v: array of rank >= 1, float32, float64, float16 or bfloat16.
        g: float32 or float64, of v's shape along `axis`: the lengths.
        axis: the axes of the output channels, one or several.

    Returns:
        w in the shape and dtype of v.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """
    v, g, axes = _plain(v, g, axis)
    wide, inverse = _wide(v, axes)
    w: Array = (wide * (np.expand_dims(g.astype(np.float64), axes) * inverse)).astype(v.dtype)
    return w


def weight_norm_grad(dw: Any, v: Any, g: Any, axis: int | tuple[int, ...] = -1) -> tuple[Array, Array]:
    """Gradients of a loss with respect to v and g, from dw, its gradient with respect to w = weight_norm(v, g, axis).

        dg = dw.v/|v|,  dv = g/|v| * (dw - dg * v/|v|)

    Arguments and errors are those of `weight_norm`; dw has v's shape and dtype.
    Returns (dv, dg) in the shapes and dtypes of v and g.
    """
    v, g, axes = _plain(v, g, axis)
    dw = _checks.like("dw", dw, "v", v)
    if dw is None:
        raise TypeError("dw must be an array. Received: None")
    wide, inverse = _wide(v, axes)
    unit, slope = wide * inverse, dw.astype(np.float64)
    dg = (slope * unit).sum(axes, keepdims=True)
    dv = np.expand_dims(g.astype(np.float64), axes) * inverse * (slope - dg * unit)
    return dv.astype(v.dtype), np.squeeze(dg, axes).astype(g.dtype)


def _plain(v: Any, g: Any, axis: Any) -> tuple[Array, Array, tuple[int, ...]]:
    """v, g and the axes that |v| goes over."""
    v = _checks.tensor("v", v)
    given = axis if isinstance(axis, tuple | list) else (axis,)
    indices = [_checks.integer("axis", a) for a in given]
    if any(not -v.ndim <= a < v.ndim for a in indices) or len({a % v.ndim for a in indices}) < max(len(indices), 1):
        wanted = f"one or more different axes in [{-v.ndim}, {v.ndim}) for v of shape {v.shape}"
        raise ValueError(f"axis must be {wanted}. Received: {axis}")
    kept = sorted(a % v.ndim for a in indices)
    g = as_array("g", g)
    if g.dtype.char not in "fd" or not g.dtype.isnative:
        raise TypeError(f"g must have dtype float32 or float64 in the machine's byte order. Received: {g.dtype}")
    shape = tuple(v.shape[a] for a in kept)
    if g.shape != shape:
        raise ValueError(f"g must have shape {shape} to match axis {axis} of v. Received: {g.shape}")
    return v, g, tuple(a for a in range(v.ndim) if a not in kept)


def _wide(v: Array, axes: tuple[int, ...]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """v and 1/|v| (0 where |v| is 0) in float64, the latter with extent 1 along `axes`."""
    wide = v.astype(np.float64)
    norm = np.sqrt(np.square(wide).sum(axes, keepdims=True))
    return wide, np.divide(1.0, norm, out=np.zeros_like(norm), where=norm != 0)
