"""What samples have of their own in the NumPy layer: an adjustment, and the gamma and beta of a label.

    u = xhat*scale + bias, z = u*gamma + beta + residual, y = activation(z)
    dz = dy*activation'(z), dbeta = sum dz, dgamma = sum dz*u, dxhat = dz*gamma*scale

The kernels make xhat in x's dtype; this part is NumPy's, in float32 (float64 for float64 x), and keeps xhat for the
backward. Sums are float64: over all but the channels or, with labels, over the samples of a class. dxhat stays wide and
x is widened to it: at a loss scale of 30000 a gamma above 2.2 takes dxhat out of float16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .._arguments import checks as _checks
from .._arguments.arrays import Array, as_array
from .._arguments.axes import Axes
from ..functional.batch_norm import GradResult
from .batch import Batch, Passed

__all__ = ["Own", "apply", "check_adjustment", "check_labels"]


def check_adjustment(adjustment: Any, virtual_batch_size: Any) -> Any:
    """The adjustment, if it can be one."""
    if adjustment is not None and not callable(adjustment):
        raise TypeError(f"adjustment must be None or a function of the shape. Received: {adjustment!r}")
    if adjustment is not None and virtual_batch_size is not None:
        raise ValueError(f"adjustment must be None with virtual_batch_size. Received: {virtual_batch_size=}")
    return adjustment


def check_labels(labels: Any, classes: int, x: Array) -> Array:
    """The labels as (N,), each in [0, classes)."""
    if labels is None:
        raise TypeError("labels must be an array of integers of shape (N,). Received: None")
    array = as_array("labels", labels)
    if array.dtype.kind not in "iu":
        raise TypeError(f"labels must have an integer dtype. Received: {array.dtype}")
    if array.shape not in ((len(x),), (len(x), 1)):
        raise ValueError(f"labels must have shape (N,) or (N, 1) with N = {len(x)}. Received: {array.shape}")
    array = array.reshape(-1)
    if (wrong := array[(array < 0) | (array >= classes)]).size:
        raise ValueError(f"labels must be in [0, {classes}). Received: {wrong[0]}")
    return array.astype(np.intp)


class Own(NamedTuple):
    """Each broadcasts to x, in the dtype of computation."""

    scale: Array | None
    bias: Array | None
    gamma: Array | None
    beta: Array | None
    residual: Array | None

    @staticmethod
    def of(batch: Batch, adjustment: Any) -> Own:
        """Raises what is wrong with the adjustment's result or the residual, before anything else happens."""
        x, _, axes, gamma, beta, *_ = batch
        wide = np.float64 if x.dtype == np.float64 else np.float32
        residual = _checks.like("residual", batch.residual, "x", x)
        scale, bias = (None, None) if adjustment is None else _drawn(adjustment, x, wide)
        gamma, beta = (None if v is None else _spread(v, axes, batch.labels).astype(wide) for v in (gamma, beta))
        return Own(scale, bias, gamma, beta, residual)


def _drawn(adjustment: Any, x: Array, wide: Any) -> list[Array]:
    pair = adjustment(x.shape)
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"adjustment must return (scale, bias). Received: {pair!r}")
    try:
        arrays = [np.asarray(each).astype(wide) for each in pair]
    except (TypeError, ValueError):
        raise TypeError(f"adjustment must return (scale, bias), two arrays of numbers. Received: {pair!r}") from None
    for array in arrays:
        trailing = x.shape[x.ndim - array.ndim :] if array.ndim <= x.ndim else None
        if trailing is None or any(m not in (1, n) for m, n in zip(array.shape, trailing, strict=True)):
            wanted = f"arrays that broadcast to x of shape {x.shape}"
            raise ValueError(f"adjustment must return {wanted}. Received: {array.shape}")
    return arrays


def _spread(values: Array, axes: Axes, labels: Array | None) -> Array:
    """A vector, or the rows of the labels, as they broadcast to x."""
    kept = axes.axes if labels is None else (0, *axes.axes)
    rows = values if labels is None else values[labels]
    return rows.reshape([extent if i in kept else 1 for i, extent in enumerate(axes.x_shape)])


def apply(passed: Passed, batch: Batch, own: Own) -> Passed:
    """y and its backward, `passed` being those of xhat."""
    x, xhat = batch.x, passed.y
    with np.errstate(over="ignore", invalid="ignore"):
        y = _activated(_affine(_adjusted(xhat, own), own), batch).astype(x.dtype, copy=False)

    def backward(dy: Any) -> GradResult:
        dy = _checks.like("dy", _checks.tensor("dy", dy), "x", x)
        with np.errstate(over="ignore", invalid="ignore"):
            u = _adjusted(xhat, own)
            dz = dy.astype(u.dtype)  # a copy, which becomes dxhat
            if batch.activation is not None:
                _gate(dz, _affine(u.copy(), own), batch)
            dresidual = None if own.residual is None else dy if batch.activation is None else dz.astype(x.dtype)
            dbeta = _sums(dz, batch)
            u *= dz
            dgamma = _sums(u, batch)
            for factor in (own.gamma, own.scale):
                if factor is not None:
                    dz *= factor
            dx = passed.backward(dz, x=x.astype(dz.dtype, copy=False)).dx.astype(x.dtype, copy=False)
        return GradResult(dx, dgamma, dbeta, dresidual)

    return Passed(y, backward, passed.present)


def _adjusted(xhat: Array, own: Own) -> Array:
    """u, in memory of its own."""
    u: Array = xhat.astype(np.float64 if xhat.dtype == np.float64 else np.float32)
    if own.scale is not None:
        u *= own.scale
    if own.bias is not None:
        u += own.bias
    return u


def _affine(u: Array, own: Own) -> Array:
    """z, where u was."""
    if own.gamma is not None:
        u *= own.gamma
    if own.beta is not None:
        u += own.beta
    if own.residual is not None:
        u += own.residual.astype(u.dtype, copy=False)
    return u


def _activated(z: Array, batch: Batch) -> Array:
    """In place. NaN stays NaN."""
    if _leaky(batch):
        np.multiply(z, batch.negative_slope, out=z, where=z < 0)
    elif batch.activation is not None:
        np.clip(z, 0, 6 if batch.activation == "relu6" else None, out=z)
    return z


def _gate(dz: Array, z: Array, batch: Batch) -> None:
    """dz*activation'(z) in place, as the kernels do it: chosen, not multiplied, where the slope is 0 (0*inf is NaN)."""
    if _leaky(batch):
        np.multiply(dz, batch.negative_slope, out=dz, where=~(z > 0))
    else:
        np.copyto(dz, 0, where=(z <= 0) | (z >= 6) if batch.activation == "relu6" else z <= 0)


def _leaky(batch: Batch) -> bool:
    """A slope of 0 is relu: 0*-inf would be NaN."""
    return batch.activation == "leaky_relu" and batch.negative_slope != 0


def _sums(values: Array, batch: Batch) -> Array:
    """Float64 sums in the shape of gamma and beta, in their dtype."""
    parameter = batch.beta if batch.gamma is None else batch.gamma
    dtype = values.dtype if parameter is None else parameter.dtype
    over = tuple(i for i in range(values.ndim) if i not in batch.axes.axes)
    if batch.labels is None or parameter is None:
        return np.asarray(values.sum(over, dtype=np.float64)).astype(dtype)
    rows = values.sum(over[1:], dtype=np.float64)
    table = np.zeros(parameter.shape)
    np.add.at(table, batch.labels, rows)
    return table.astype(dtype)
