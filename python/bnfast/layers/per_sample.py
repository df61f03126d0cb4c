"""Per-sample scale and offset in the NumPy layer: the adjustment, and gamma and beta chosen by label.

    u = xhat*scale + bias, z = u*gamma + beta + residual, y = activation(z)
    dz = dy*activation'(z), dbeta = sum dz, dgamma = sum dz*u, dxhat = dz*gamma*scale

The kernels compute xhat in x's dtype. This part runs on NumPy, in float32 (float64 for float64 x), and keeps xhat for
the backward pass. Sums are float64, over all axes but the channels or, with labels, over the samples of each class.
dxhat stays in that type, and x is converted to it, because with a loss scale of 30000 a gamma above 2.2 would take
dxhat out of float16's range.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .._arguments import checks
from .._arguments.array_checks import like, tensor
from .._arguments.arrays import Array, as_array
from .._arguments.axes import Axes
from ..functional.batch_norm import GradResult, batch_norm_grad, batch_norm_infer
from .batch import Batch, ForwardPass

__all__ = ["PerSampleAffine", "apply", "check_adjustment", "check_labels"]

ZERO, ONE = np.zeros(1), np.ones(1)  # mean and invstd, or variance, of a batch norm that only applies its activation


def check_adjustment(adjustment: Any, virtual_batch_size: Any) -> Any:
    """A callable or None."""
    if adjustment is not None and not callable(adjustment):
        raise TypeError(f"adjustment must be None or a function of the shape. Received: {adjustment!r}")
    if adjustment is not None and virtual_batch_size is not None:
        raise ValueError(f"adjustment must be None with virtual_batch_size. Received: {virtual_batch_size=}")
    return adjustment


def check_labels(labels: Any, classes: int, x: Array) -> Array:
    """The labels as integers of shape (N,), each in [0, classes)."""
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


class PerSampleAffine(NamedTuple):
    """What is applied to xhat. Each array broadcasts to x and has the compute dtype, except the residual: x's dtype."""

    scale: Array | None
    bias: Array | None
    gamma: Array | None
    beta: Array | None
    residual: Array | None

    @staticmethod
    def of(batch: Batch, adjustment: Any) -> PerSampleAffine:
        """Raises the errors of the adjustment's result and of the residual, before the state is updated."""
        x = batch.x
        dtype = np.float64 if x.dtype == np.float64 else np.float32
        residual = like("residual", batch.residual, "x", x)
        scale, bias = (None, None) if adjustment is None else _call_adjustment(adjustment, x, dtype)
        gamma, beta = (
            None if v is None else _broadcastable(v, batch.axes, batch.labels).astype(dtype)
            for v in (batch.gamma, batch.beta)
        )
        return PerSampleAffine(scale, bias, gamma, beta, residual)


def _call_adjustment(adjustment: Any, x: Array, dtype: Any) -> list[Array]:
    pair = adjustment(x.shape)
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"adjustment must return (scale, bias). Received: {pair!r}")
    try:
        arrays = [np.asarray(each).astype(dtype) for each in pair]
    except (TypeError, ValueError):
        raise TypeError(f"adjustment must return (scale, bias), two arrays of numbers. Received: {pair!r}") from None
    for array in arrays:
        trailing = x.shape[x.ndim - array.ndim :] if array.ndim <= x.ndim else None
        if trailing is None or any(m not in (1, n) for m, n in zip(array.shape, trailing, strict=True)):
            wanted = f"arrays that broadcast to x of shape {x.shape}"
            raise ValueError(f"adjustment must return {wanted}. Received: {array.shape}")
    return arrays


def _broadcastable(values: Array, axes: Axes, labels: Array | None) -> Array:
    """A vector, or each sample's row of a table, in a shape that broadcasts to x."""
    kept = axes.axes if labels is None else (0, *axes.axes)
    rows = values if labels is None else values[labels]
    return rows.reshape([extent if i in kept else 1 for i, extent in enumerate(axes.x_shape)])


def apply(xhat_pass: ForwardPass, batch: Batch, affine: PerSampleAffine) -> ForwardPass:
    """y and its backward, from the pass whose y is xhat."""
    x, xhat = batch.x, xhat_pass.y
    with np.errstate(over="ignore", invalid="ignore"):
        z = _add_affine(_adjusted(xhat, affine), affine)
        y = _activate(z, batch).astype(x.dtype, copy=False)

    def backward(dy: Any) -> GradResult:
        dy = like("dy", tensor("dy", dy), "x", x)
        with np.errstate(over="ignore", invalid="ignore"):
            u = _adjusted(xhat, affine)
            dz = dy.astype(u.dtype)  # a copy, which becomes dxhat
            if batch.activation is not None:
                _multiply_by_slope(dz, _add_affine(u.copy(), affine), batch)
            dresidual = None if affine.residual is None else dy if batch.activation is None else dz.astype(x.dtype)
            dbeta = _parameter_sums(dz, batch)
            u *= dz
            dgamma = _parameter_sums(u, batch)
            for factor in (affine.gamma, affine.scale):
                if factor is not None:
                    dz *= factor
            dx = xhat_pass.backward(dz, x=x.astype(dz.dtype, copy=False)).dx.astype(x.dtype, copy=False)
        return GradResult(dx, dgamma, dbeta, dresidual)

    return ForwardPass(y, backward, xhat_pass.has_values)


def _adjusted(xhat: Array, affine: PerSampleAffine) -> Array:
    """u, in a new array."""
    u: Array = xhat.astype(np.float64 if xhat.dtype == np.float64 else np.float32)
    if affine.scale is not None:
        u *= affine.scale
    if affine.bias is not None:
        u += affine.bias
    return u


def _add_affine(u: Array, affine: PerSampleAffine) -> Array:
    """z, computed in place of u."""
    if affine.gamma is not None:
        u *= affine.gamma
    if affine.beta is not None:
        u += affine.beta
    if affine.residual is not None:
        u += affine.residual.astype(u.dtype, copy=False)
    return u


def _activate(z: Array, batch: Batch) -> Array:
    """y, which may be z overwritten. NaN stays NaN."""
    if _is_leaky(batch):
        np.multiply(z, batch.negative_slope, out=z, where=z < 0)
    elif batch.activation not in checks.PIECEWISE_LINEAR:
        flat = batch_norm_infer(z.reshape(-1, 1), ZERO, ONE, epsilon=0.0, activation=batch.activation)
        return flat.reshape(z.shape)
    elif batch.activation is not None:
        np.clip(z, 0, 6 if batch.activation == "relu6" else None, out=z)
    return z


def _multiply_by_slope(dz: Array, z: Array, batch: Batch) -> None:
    """dz*activation'(z) in place. As in the kernels, a slope of 0 selects 0 instead of multiplying: 0*inf is NaN."""
    if _is_leaky(batch):
        np.multiply(dz, batch.negative_slope, out=dz, where=~(z > 0))
    elif batch.activation not in checks.PIECEWISE_LINEAR:
        flat = dz.reshape(-1, 1), z.reshape(-1, 1)
        dz[...] = batch_norm_grad(*flat, ZERO, ONE, activation=batch.activation, training=False).dx.reshape(dz.shape)
    else:
        np.copyto(dz, 0, where=(z <= 0) | (z >= 6) if batch.activation == "relu6" else z <= 0)


def _is_leaky(batch: Batch) -> bool:
    """A slope of 0 counts as relu, because 0*-inf is NaN."""
    return batch.activation == "leaky_relu" and batch.negative_slope != 0


def _parameter_sums(values: Array, batch: Batch) -> Array:
    """Sums in float64, returned in the shape and dtype of gamma and beta."""
    parameter = batch.beta if batch.gamma is None else batch.gamma
    dtype = values.dtype if parameter is None else parameter.dtype
    other_axes = tuple(i for i in range(values.ndim) if i not in batch.axes.axes)
    if batch.labels is None or parameter is None:
        return np.asarray(values.sum(other_axes, dtype=np.float64)).astype(dtype)
    rows = values.sum(other_axes[1:], dtype=np.float64)
    table = np.zeros(parameter.shape)
    np.add.at(table, batch.labels, rows)
    return table.astype(dtype)
