"""Group normalization and its special case of one channel a group, instance normalization, with their gradients.

A group is C/groups neighbouring channels of one sample; the batch is axis 0. Statistics belong to a group of a sample,
parameters to a channel: training and inference are the same, and there are no moving statistics.
Sources: Wu and He 2018, https://arxiv.org/abs/1803.08494; Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .. import _core
from .._arguments import group_norm as _groups
from .._arguments.arrays import Array

__all__ = ["NormGradResult", "NormResult", "group_norm", "group_norm_grad", "instance_norm", "instance_norm_grad"]


class NormResult(NamedTuple):
    """y in the shape and dtype of x; mean and invstd = 1/sqrt(variance + epsilon) (0 where that sum is 0) of every
    group, or row, as float64: what the gradient takes."""

    y: Array
    mean: npt.NDArray[np.float64]
    invstd: npt.NDArray[np.float64]


class NormGradResult(NamedTuple):
    """dx in the shape and dtype of x; dgamma and dbeta in the shape of gamma, also where that was None, in its dtype,
    else float64 for float64 x and float32 otherwise."""

    dx: Array
    dgamma: Array
    dbeta: Array


def group_norm(
    x: Any,
    groups: int,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-3,
    out: Array | None = None,
) -> NormResult:
    """Normalize each group of channels of each sample.

        y = gamma * (x - mean)*invstd + beta,  invstd = 1/sqrt(variance + epsilon)

    Args:
        x: array of rank >= 2, float32, float64, float16 or bfloat16; anything `batch_norm_train` reads. Axis 0 is the
            batch. Read in place if C-contiguous and the channels are the axis after the batch or the last one (axes of
            extent 1 don't count), else copied once, and so is y.
        groups: divides the extent C of `axis`.
        gamma, beta: float32 or float64 of shape (C,); None stands for ones and zeros.
        axis: the channel axis, not 0.
        epsilon: added to the variance, >= 0.
        out: where y goes: exactly x (which is then gone: the gradient needs it) or disjoint from every input.

    Returns:
        NormResult(y, mean, invstd), the latter of shape (N, groups). A group without values has mean and variance 0.

    Raises:
        ValueError, TypeError: an argument is wrong; nothing is changed.
    """
    result = None if groups is None else _core.group_norm(x, groups, gamma, beta, axis, epsilon, out)
    return NormResult(*(result or _groups.group_norm(x, groups, gamma, beta, axis, epsilon, out)))


def group_norm_grad(
    dy: Any,
    x: Any,
    mean: Any,
    invstd: Any,
    groups: int,
    gamma: Any = None,
    *,
    axis: int = -1,
    out: Array | None = None,
) -> NormGradResult:
    """Gradients of a loss with respect to x, gamma and beta, from dy, its gradient with respect to y.

        dbeta = sum dy;  dgamma = sum dy*xhat, over the batch and all axes but the channels';  xhat = (x - mean)*invstd
        g = gamma*dy;  dx = invstd*(g - sum(g)/M - xhat * sum(g*xhat)/M), over the M values of the group

    Args:
        dy, x: arrays of one shape and dtype; x, groups, gamma and axis as the forward had them.
        mean, invstd: (N, groups), float64 or float32, as `group_norm` returned them.
        out: where dx goes: exactly dy, exactly x, or disjoint from every input.

    Returns:
        NormGradResult(dx, dgamma, dbeta); dgamma and dbeta are zeros where x is empty.

    Raises:
        ValueError, TypeError: as in `group_norm`. A non-finite dy is no error.
    """
    result = None if groups is None else _core.group_norm_grad(dy, x, mean, invstd, groups, gamma, axis, out)
    return NormGradResult(*(result or _groups.group_norm_grad(dy, x, mean, invstd, groups, gamma, axis, out)))


def instance_norm(
    x: Any, gamma: Any = None, beta: Any = None, *, axis: int = -1, epsilon: float = 1e-3, out: Array | None = None
) -> NormResult:
    """Normalize each channel of each sample: `group_norm` with groups = C, whose arguments, results and errors these
    are. mean and invstd have shape (N, C)."""
    result = _core.group_norm(x, None, gamma, beta, axis, epsilon, out)
    return NormResult(*(result or _groups.group_norm(x, _groups.EACH, gamma, beta, axis, epsilon, out)))


def instance_norm_grad(
    dy: Any, x: Any, mean: Any, invstd: Any, gamma: Any = None, *, axis: int = -1, out: Array | None = None
) -> NormGradResult:
    """Gradients of `instance_norm`: `group_norm_grad` with groups = C."""
    result = _core.group_norm_grad(dy, x, mean, invstd, None, gamma, axis, out)
    return NormGradResult(*(result or _groups.group_norm_grad(dy, x, mean, invstd, _groups.EACH, gamma, axis, out)))
