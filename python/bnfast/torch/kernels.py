"""The core's functions on tensors: no autograd, no choice of a way. Outputs come from PyTorch's allocator.

The core accepts plain tensors in the CPU's memory that are contiguous or channels_last (csrc/bind/torch_tensor.h). For
anything else these functions raise Declined, with nothing changed; functional.py then converts the arguments or leaves
the call to PyTorch. The channel axis is 1. statistics are NumPy arrays of the core, float64 of shape (3, C): mean,
variance and invstd.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import _core

__all__ = [
    "ACTIVATIONS",
    "GATED_BY_Y",
    "Declined",
    "Grouping",
    "Options",
    "gradient",
    "group_norm",
    "group_norm_gradient",
    "infer",
    "keeps",
    "train",
]

_NAMES = "relu relu6 leaky_relu silu hard_silu sigmoid hard_sigmoid tanh gelu gelu_tanh elu selu softplus mish"
ACTIVATIONS: dict[str | None, int] = {name: code for code, name in enumerate([None, *_NAMES.split()])}  # the core's
GATED_BY_Y = {"relu", "relu6", "leaky_relu"}  # y tells their gradient

Statistics = npt.NDArray[np.float64]

_core._torch_connect(Tensor, torch.nn.Parameter)
# PyTorch's idle threads spin on the processors that our own would need, so calls run on PyTorch's where it has OpenMP.
_core._torch_borrow_threads(True)
_train, _infer, _grad, _empty_like = _core._torch_train, _core._torch_infer, _core._torch_grad, torch.empty_like
_group_norm, _group_norm_grad = _core._torch_group_norm, _core._torch_group_norm_grad


class Declined(Exception):
    """The core doesn't take the arguments as they are."""


class Options(NamedTuple):
    """What a batch norm computes, its tensors aside.

    training: whether the statistics are those of the batch. momentum: the weight of the old value, as in bnfast's NumPy
    functions: 1 minus PyTorch's.
    """

    training: bool = True
    momentum: float = 0.9
    epsilon: float = 1e-5
    activation: str | None = None
    negative_slope: float = 0.2


Moving = tuple[Tensor | None, Tensor | None]  # moving_mean and moving_variance: both or neither


def train(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, moving: Moving, options: Options
) -> tuple[Tensor, Statistics]:
    """(y, statistics) of this batch. The moving statistics, where given, are updated in place."""
    _, momentum, epsilon, activation, negative_slope = options
    if not epsilon > 0:  # an error of PyTorch's in training
        raise Declined
    y = _empty_like(x)
    code = ACTIVATIONS[activation]
    statistics = _train(x, y, gamma, beta, *moving, momentum, epsilon, code, negative_slope, residual)
    if statistics is None:
        raise Declined
    return y, statistics


def infer(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    moving: Moving,
    options: Options,
    keep: bool = True,
) -> tuple[Tensor, Any]:
    """(y, statistics) with given statistics. keep=False, for calls without a gradient: statistics is True."""
    y = _empty_like(x)
    _, _, epsilon, activation, negative_slope = options
    code = ACTIVATIONS[activation]
    statistics = _infer(x, y, gamma, beta, *moving, epsilon, code, negative_slope, residual, keep)
    if statistics is None:
        raise Declined
    return y, statistics


def gradient(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    kept: Tensor | None,
    statistics: Statistics,
    options: Options,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dgamma, dbeta, dresidual), each None where its tensor is. kept: what `keeps` said."""
    dx = _empty_like(x)
    dgamma = None if gamma is None else _empty_like(gamma)
    dbeta = None if beta is None else _empty_like(beta)
    dresidual = None if kept is None else _empty_like(x)
    training, _, _, activation, negative_slope = options
    residual, y = (None, kept) if activation in GATED_BY_Y else (kept, None)
    code = ACTIVATIONS[activation]
    # fmt: off
    done = _grad(
        dy, x, dx, statistics, gamma, beta, training, code, negative_slope, residual, y, dresidual, dgamma, dbeta,
    )
    # fmt: on
    if done is None:
        raise Declined
    return dx, dgamma, dbeta, dresidual


class Grouping(NamedTuple):
    """Which values are normalized together: `groups` groups of channels, or, with 0 groups, the last `axes` axes."""

    groups: int
    axes: int = 1


def group_norm(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, grouping: Grouping, options: Options
) -> tuple[Tensor, Statistics]:
    """(y, statistics); the statistics have shape (2, number of groups in all): mean and invstd."""
    y = _empty_like(x)
    _, _, epsilon, activation, negative_slope = options
    code = ACTIVATIONS[activation]
    statistics = _group_norm(x, y, *grouping, gamma, beta, epsilon, code, negative_slope, residual)
    if statistics is None:
        raise Declined
    return y, statistics


def group_norm_gradient(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    statistics: Statistics,
    grouping: Grouping,
    options: Options,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dgamma, dbeta, dresidual), each None where its tensor is. residual: None without an activation."""
    dx = _empty_like(x)
    dgamma = None if gamma is None else _empty_like(gamma)
    dbeta = None if beta is None else _empty_like(beta)
    dresidual = None if residual is None else _empty_like(x)
    _, _, _, activation, negative_slope = options
    code = ACTIVATIONS[activation]
    # fmt: off
    done = _group_norm_grad(
        dy, x, dx, statistics, *grouping, gamma, beta, code, negative_slope, residual, dresidual, dgamma, dbeta,
    )
    # fmt: on
    if done is None:
        raise Declined
    return dx, dgamma, dbeta, dresidual


def keeps(activation: str | None, y: Tensor, residual: Tensor | None) -> Tensor | None:
    """What the gradient needs of y and the residual: y, which lives anyway, where it tells the activation's slope."""
    if residual is None or activation is None:
        return None
    return y if activation in GATED_BY_Y else residual
