"""Layer normalization and its gradients: statistics over `axis` for each index of the other axes.

Source: Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import _core
from .._arguments import group_norm as _groups
from .._arguments.arrays import Array
from .group_norm import NormGradResult, NormResult

__all__ = ["layer_norm", "layer_norm_grad"]


def layer_norm(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-3,
    out: Array | None = None,
) -> NormResult:
    """Normalize the values that differ in their index on `axis` alone.

        y = gamma * (x - mean)*invstd + beta,  invstd = 1/sqrt(variance + epsilon)

    Args:
        x: array of rank >= 1, float32, float64, float16 or bfloat16; anything `batch_norm_train` reads. Read in place
            if C-contiguous and `axis` its last axes, else copied once, and so is y.
        gamma, beta: float32 or float64 in the extents of `axis`, in the order of x: (768,), or (56, 64) for
            axis=(-2, -1); None stands for ones and zeros.
        axis: the axes that are normalized, one or several.
        epsilon: added to the variance, >= 0.
        out: where y goes: exactly x (which is then gone: the gradient needs it) or disjoint from every input.

    Returns:
        NormResult(y, mean, invstd), the latter in the extents of the other axes.

    Raises:
        ValueError, TypeError: an argument is wrong; nothing is changed.
    """
    result = _core.layer_norm(x, gamma, beta, axis, epsilon, out)
    return NormResult(*(result or _groups.layer_norm(x, gamma, beta, axis, epsilon, out)))


def layer_norm_grad(
    dy: Any,
    x: Any,
    mean: Any,
    invstd: Any,
    gamma: Any = None,
    *,
    axis: int | Sequence[int] = -1,
    out: Array | None = None,
) -> NormGradResult:
    """Gradients of a loss with respect to x, gamma and beta, from dy, its gradient with respect to y.

        dbeta = sum dy;  dgamma = sum dy*xhat, over the other axes;  xhat = (x - mean)*invstd
        g = gamma*dy;  dx = invstd*(g - mean of g - xhat * mean of g*xhat), these means over `axis`

    Args:
        dy, x: arrays of one shape and dtype; x, gamma and axis as the forward had them.
        mean, invstd: float64 or float32, as `layer_norm` returned them.
        out: where dx goes: exactly dy, exactly x, or disjoint from every input.

    Returns:
        NormGradResult(dx, dgamma, dbeta); dgamma and dbeta are zeros where x is empty.

    Raises:
        ValueError, TypeError: as in `layer_norm`. A non-finite dy is no error.
    """
    result = _core.layer_norm_grad(dy, x, mean, invstd, gamma, axis, out)
    return NormGradResult(*(result or _groups.layer_norm_grad(dy, x, mean, invstd, gamma, axis, out)))
