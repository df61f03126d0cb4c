"""Ghost batches (Hoffer 2017, https://arxiv.org/abs/1705.08741): each `virtual_batch_size` samples are a batch apart.

One call of the kernels a ghost, so that a mask may differ between ghosts, and a ghost has the bits of its own call.
"contiguous": ghost g holds samples g*size to (g + 1)*size - 1, which are read and written where they lie; "strided":
samples g, g + G, g + 2G ..., G the number of ghosts, as TF 1 has it: these are copied, once on the way in and out.
Statistics are (G, C), C standing for the extents of several axes. The moving ones take the mean over the ghosts that
hold anything, whatever their weight.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .._arguments import checks as _checks
from .._arguments.arrays import Array
from .._arguments.axes import Axes
from ..functional.batch_norm import GradResult, batch_norm_grad, batch_norm_train

__all__ = ["GROUPINGS", "GhostResult", "check", "grad", "slices", "train", "update"]

GROUPINGS = ("contiguous", "strided")


class GhostResult(NamedTuple):
    """y, and every ghost's mean, population variance, invstd: (G, C), and the weight it holds: (G,).
    mask: the weights in x's shape without the channel axes, or None."""

    y: Array
    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]
    invstd: npt.NDArray[np.float64]
    weight: npt.NDArray[np.float64]
    mask: Array | None


def check(size: Any) -> int | None:
    """virtual_batch_size, if it can be one."""
    if size is not None and _checks.integer("virtual_batch_size", size) < 1:
        raise ValueError(f"virtual_batch_size must be at least 1, or None. Received: {size}")
    return None if size is None else int(size)


def slices(x: Array, axes: Axes, size: int | None, grouping: str | None) -> list[slice]:
    """Which samples make each ghost; none where all of x is one.

    Raises ValueError where `size` doesn't divide the batch, or the batch's axis is the channels'.
    """
    if size is None:
        return []
    if axes.axes[0] == 0:
        raise ValueError(f"axis must not be 0, the batch's, where there are ghosts. Received: x of shape {x.shape}")
    if len(x) % size:
        raise ValueError(f"virtual_batch_size must divide the batch. Received: {size}, and x of shape {x.shape}")
    count = len(x) // size
    if count < 2:
        return []
    if grouping == "contiguous":
        return [slice(g * size, (g + 1) * size) for g in range(count)]
    return [slice(g, None, count) for g in range(count)]


def train(
    x: Array, ghosts: list[slice], gamma: Any, beta: Any, axes: Axes, mask: Any, residual: Any, **words: Any
) -> GhostResult:
    """Normalize each ghost; no moving statistics."""
    residual = _checks.like("residual", residual, "x", x)
    flat = _checks.weights(mask, x, axes)
    weights = None if flat is None else flat.reshape(axes.off)
    y = np.empty(x.shape, x.dtype)
    parts = []
    for ghost in ghosts:
        out = y[ghost] if y[ghost].flags.c_contiguous else None
        part = batch_norm_train(
            *(x[ghost], gamma, beta), mask=_at(weights, ghost), residual=_at(residual, ghost), out=out, **words
        )
        if out is None:
            y[ghost] = part.y
        parts.append(part[1:])
    held = [math.prod((len(x[g]), *axes.off[1:])) if weights is None else weights[g].sum(dtype=float) for g in ghosts]
    mean, variance, invstd = (np.stack(each) for each in zip(*parts, strict=True))
    return GhostResult(y, mean, variance, invstd, np.array(held, np.float64), weights)


def update(moving: tuple[Array, Array], result: GhostResult, momentum: float, correction: int, policy: str) -> bool:
    """Move the statistics by the ghosts' means; False where no ghost holds anything."""
    present = result.weight > 0
    if not present.any() or not result.y.size:
        return False
    count = result.weight[present]
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        bessel = np.where((count > 1) & (correction == 1), count / (count - 1), 1.0)
        mean = result.mean[present].mean(0)
        variance = (result.variance[present].T * bessel).T.mean(0)
        where = np.isfinite(mean) & np.isfinite(variance) if policy == "skip_update" else True
        for old, batch in zip(moving, (mean, variance), strict=True):
            new = old.astype(np.float64) * momentum + batch * (1 - momentum)
            np.copyto(old, new, casting="same_kind", where=where)
    return True


def grad(
    dy: Any,
    x: Array,
    ghosts: list[slice],
    mean: Array,
    invstd: Array,
    gamma: Any,
    beta: Any,
    mask: Array | None,
    residual: Any,
    **words: Any,
) -> GradResult:
    """dx of each ghost; dgamma and dbeta summed over the ghosts in float64, in their order."""
    dy = _checks.like("dy", _checks.tensor("dy", dy), "x", x)
    residual = _checks.like("residual", residual, "x", x)
    dx = np.empty(x.shape, x.dtype)
    itself = residual is not None and words["activation"] is None  # dresidual is dy
    dresidual = dy if itself else None if residual is None else np.empty(x.shape, x.dtype)
    sums = np.zeros((2, *mean.shape[1:]))
    for g, ghost in enumerate(ghosts):
        out = dx[ghost] if dx[ghost].flags.c_contiguous else None
        part = batch_norm_grad(
            *(dy[ghost], x[ghost], mean[g], invstd[g], gamma, beta),
            mask=_at(mask, ghost),
            residual=_at(residual, ghost),
            out=out,
            **words,
        )
        if out is None:
            dx[ghost] = part.dx
        if dresidual is not None and not itself:
            dresidual[ghost] = part.dresidual
        sums += part.dgamma, part.dbeta
    with np.errstate(over="ignore"):
        dgamma, dbeta = sums.astype(part.dgamma.dtype)
    return GradResult(dx, dgamma, dbeta, dresidual)


def _at(array: Array | None, ghost: slice) -> Array | None:
    return None if array is None else array[ghost]
