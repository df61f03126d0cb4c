"""Ghost batches (Hoffer 2017, https://arxiv.org/abs/1705.08741): normalize `virtual_batch_size` samples at a time.

The kernels run once per ghost, so a mask may differ between ghosts, and each ghost has the bits of a separate call.
"contiguous": ghost g is samples g*size to (g + 1)*size - 1, read and written in place. "strided": of G ghosts, ghost g
is samples g, g + G, g + 2G, ..., as in TF 1; these are copied once on the way in and once on the way out.
Statistics have shape (G, C); with several channel axes C means their extents. The moving statistics take the plain mean
over the ghosts that have any weight, whatever that weight is.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .._arguments import checks
from .._arguments.array_checks import like, mask_weights, tensor
from .._arguments.arrays import Array
from .._arguments.axes import Axes
from ..functional.batch_norm import GradResult, batch_norm_grad, batch_norm_train

__all__ = ["GROUPINGS", "GhostResult", "check_virtual_batch_size", "ghost_slices", "grad", "train", "update"]

GROUPINGS = ("contiguous", "strided")


class GhostResult(NamedTuple):
    """y; mean, population variance and invstd per ghost, (G, C); total weight per ghost, (G,).

    mask: the weights in x's shape without the channel axes, or None.
    """

    y: Array
    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]
    invstd: npt.NDArray[np.float64]
    weight: npt.NDArray[np.float64]
    mask: Array | None


def check_virtual_batch_size(size: Any) -> int | None:
    """A positive int or None."""
    if size is None:
        return None
    number = checks.integer("virtual_batch_size", size)
    if number < 1:
        raise ValueError(f"virtual_batch_size must be at least 1, or None. Received: {size}")
    if number >= 2**63:
        raise ValueError(f"virtual_batch_size must be less than 2**63. Received: {size}")
    return number


def ghost_slices(x: Array, axes: Axes, size: int | None, grouping: str | None) -> list[slice]:
    """The samples of each ghost; an empty list if all of x is one ghost.

    Raises ValueError if `size` does not divide the batch, or axis 0 is a channel axis.
    """
    if size is None:
        return []
    if axes.axes[0] == 0:
        wanted = "0, which is the batch axis, with virtual_batch_size"
        raise ValueError(f"axis must not be {wanted}. Received: x of shape {x.shape}")
    if len(x) % size:
        raise ValueError(f"virtual_batch_size must divide the batch. Received: {size}, and x of shape {x.shape}")
    count = len(x) // size
    if count < 2:
        return []
    if grouping == "contiguous":
        return [slice(g * size, (g + 1) * size) for g in range(count)]
    return [slice(g, None, count) for g in range(count)]


def train(
    x: Array, slices: list[slice], gamma: Any, beta: Any, axes: Axes, mask: Any, residual: Any, **kwargs: Any
) -> GhostResult:
    """Normalize each ghost. The moving statistics are not updated."""
    residual = like("residual", residual, "x", x)
    flat = mask_weights(mask, x, axes)
    weights = None if flat is None else flat.reshape(axes.other_shape)
    y = np.empty(x.shape, x.dtype)
    statistics = []
    for ghost in slices:
        out = y[ghost] if y[ghost].flags.c_contiguous else None
        result = batch_norm_train(
            x[ghost], gamma, beta, mask=_part(weights, ghost), residual=_part(residual, ghost), out=out, **kwargs
        )
        if out is None:
            y[ghost] = result.y
        statistics.append(result[1:])
    mean, variance, invstd = (np.stack(each) for each in zip(*statistics, strict=True))
    if weights is None:
        weight = [float(len(x[ghost]) * math.prod(axes.other_shape[1:])) for ghost in slices]
    else:
        weight = [weights[ghost].sum(dtype=np.float64) for ghost in slices]
    return GhostResult(y, mean, variance, invstd, np.array(weight, np.float64), weights)


def update(moving: tuple[Array, Array], result: GhostResult, momentum: float, correction: int, nan_policy: str) -> bool:
    """Update the moving statistics with the mean over the ghosts. Returns False if no ghost has any weight."""
    present = result.weight > 0
    if not present.any() or not result.y.size:
        return False
    count = result.weight[present]
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        bessel = np.where((count > 1) & (correction == 1), count / (count - 1), 1.0)  # to the sample variance
        mean = result.mean[present].mean(0)
        variance = (result.variance[present].T * bessel).T.mean(0)
        where = np.isfinite(mean) & np.isfinite(variance) if nan_policy == "skip_update" else True
        for old, batch in zip(moving, (mean, variance), strict=True):
            new = old.astype(np.float64) * momentum + batch * (1 - momentum)
            np.copyto(old, new, casting="same_kind", where=where)
    return True


def grad(
    dy: Any,
    x: Array,
    slices: list[slice],
    mean: Array,
    invstd: Array,
    gamma: Any,
    beta: Any,
    mask: Array | None,
    residual: Any,
    **kwargs: Any,
) -> GradResult:
    """dx per ghost; dgamma and dbeta are summed over the ghosts in float64, in their order."""
    dy = like("dy", tensor("dy", dy), "x", x)
    residual = like("residual", residual, "x", x)
    dx = np.empty(x.shape, x.dtype)
    dresidual_is_dy = residual is not None and kwargs["activation"] is None
    dresidual = dy if dresidual_is_dy else None if residual is None else np.empty(x.shape, x.dtype)
    sums = np.zeros((2, *mean.shape[1:]))
    for g, ghost in enumerate(slices):
        out = dx[ghost] if dx[ghost].flags.c_contiguous else None
        result = batch_norm_grad(
            dy[ghost],
            x[ghost],
            mean[g],
            invstd[g],
            gamma,
            beta,
            mask=_part(mask, ghost),
            residual=_part(residual, ghost),
            out=out,
            **kwargs,
        )
        if out is None:
            dx[ghost] = result.dx
        if dresidual is not None and not dresidual_is_dy:
            dresidual[ghost] = result.dresidual
        sums += result.dgamma, result.dbeta
    with np.errstate(over="ignore"):
        dgamma, dbeta = sums.astype(result.dgamma.dtype)
    return GradResult(dx, dgamma, dbeta, dresidual)


def _part(array: Array | None, ghost: slice) -> Array | None:
    return None if array is None else array[ghost]
