"""Batch normalization as pure functions over arrays: train, infer, grad, moments.

Each is one call into _core, which takes the plain case and declines (None) all else, having changed nothing; only
then _validate looks: it raises the error that names the argument, or returns plain arguments for a second call.
A mask always goes that way, as its values need a check, and so do several axes, which _axes.py makes one.
Notation: M values a channel, invstd = 1/sqrt(variance + epsilon), xhat = (x - mean)*invstd.
Formulas: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .. import _core
from .._arguments import batch_norm as _validate
from .._arguments.arrays import Array, as_array
from .._arguments.axes import Axes
from .moments import Moments

__all__ = ["GradResult", "TrainResult", "batch_norm_grad", "batch_norm_infer", "batch_norm_train", "moments"]


class TrainResult(NamedTuple):
    """y in the shape and dtype of x; the batch's mean, population variance and invstd as float64 of shape (C,).
    invstd is 0 where variance + epsilon is 0."""

    y: Array
    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]
    invstd: npt.NDArray[np.float64]


class GradResult(NamedTuple):
    """dx in the shape and dtype of x; dgamma and dbeta of shape (C,), also where gamma or beta was None, in the dtype
    of gamma, else of beta, else float64 for float64 x and float32 otherwise; dresidual, None without a residual."""

    dx: Array
    dgamma: Array
    dbeta: Array
    dresidual: Array | None


def batch_norm_train(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    moving_mean: Array | None = None,
    moving_variance: Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    mask: Any = None,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Any = None,
    correction: int = 0,
    nan_policy: str = "propagate",
    out: Array | None = None,
) -> TrainResult:
    """Normalize x with the statistics of this batch, and update the moving statistics in place.

        y = activation(gamma * (x - mean)*invstd + beta + residual)
        moving = moving*momentum + batch*(1 - momentum)

    Args:
        x: array of rank >= 1, float32, float64, float16 or bfloat16. NumPy, or anything with the buffer protocol or
            `__dlpack__` on the CPU; read in place if C-contiguous, else copied once. Never written.
        gamma, beta: float32 or float64 of shape (C,); None stands for ones and zeros.
        moving_mean, moving_variance: both or neither; writeable C-contiguous arrays of shape (C,), float32 or float64.
        axis: the channel axis, whose extent is C; or several, as (1, 2), each pair of whose indices is a channel. (C,)
            then stands for their extents in the order of x, as (3, 4). Axes side by side cost nothing more; others
            are brought together by one copy of x, residual and y (dy and dx).
        momentum: weight of the old moving value, in [0, 1].
        epsilon: added to the variance, >= 0.
        mask: weights >= 0 of the statistics, W = their sum in M's place; all of x is normalized. Shape of x without
            the channel axes, or of equal rank, 1 on the channel axes and each other extent 1 or x's.
            Read as float64 for float64 x, else as float32.
        activation: None, "relu", "relu6" or "leaky_relu" (slope `negative_slope` below 0).
        residual: array of x's shape and dtype, added before the activation.
        correction: 1 puts variance * W/(W - 1), the sample variance (PyTorch's habit), into moving_variance; 0 the
            population variance (Keras's). y is the same.
        nan_policy: non-finite statistics: "propagate" them, "skip_update" of the moving statistics of the channels
            concerned, or "raise" with nothing changed.
        out: where y goes: exactly x (which is then gone: batch_norm_grad needs it) or disjoint from every input.

    Returns:
        TrainResult(y, mean, variance, invstd). An empty or fully masked batch has mean and variance 0 and leaves
        the moving statistics alone.

    Raises:
        ValueError, TypeError: an argument is wrong; nothing is changed.
        FloatingPointError: nan_policy="raise" and the statistics of some channel are not finite; nothing is changed.
    """
    # fmt: off
    result = None if mask is not None else _core.train(
        x, gamma, beta, moving_mean, moving_variance, axis, momentum, epsilon, None,
        activation, negative_slope, residual, correction, nan_policy, out,
    )
    if result is None:
        result = _again(_core.train, _validate.train(
            x, gamma, beta, moving_mean, moving_variance, axis, momentum, epsilon, mask,
            activation, negative_slope, residual, correction, nan_policy, out,
        ), axis, x, out)
    # fmt: on
    return tuple.__new__(TrainResult, result)


def batch_norm_infer(
    x: Any,
    moving_mean: Any,
    moving_variance: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-3,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Any = None,
    out: Array | None = None,
) -> Array:
    """Normalize x with given statistics.

        y = activation(gamma * (x - moving_mean)/sqrt(moving_variance + epsilon) + beta + residual)

    Arguments and errors are those of `batch_norm_train`; moving_mean and moving_variance are only read here.
    Returns y in the shape and dtype of x.
    """
    # fmt: off
    y = _core.infer(
        x, moving_mean, moving_variance, gamma, beta, axis, epsilon, activation, negative_slope, residual, out,
    )
    if y is None:
        (y,) = _again(_core.infer, _validate.infer(
            x, moving_mean, moving_variance, gamma, beta, axis, epsilon, activation, negative_slope, residual, out,
        ), axis, x, out)
    # fmt: on
    return y


def batch_norm_grad(
    dy: Any,
    x: Any,
    mean: Any,
    invstd: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int | Sequence[int] = -1,
    mask: Any = None,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Any = None,
    y: Any = None,
    training: bool = True,
    dmean: Any = None,
    dvariance: Any = None,
    out: Array | None = None,
    out_dresidual: Array | None = None,
) -> GradResult:
    """Gradients of a loss with respect to x, gamma, beta and residual, from dy, its gradient with respect to y.

        dz = dy * activation'(z), z recomputed from x exactly as the forward did
        dbeta = sum dz;  dgamma = sum dz*xhat
        training: dx = gamma*invstd*(dz - (w/W)*(dbeta + xhat*dgamma)),  w/W = 1/M without a mask
                  + (w/W)*(dmean + dvariance*2*(x - mean))
        frozen (training=False, mean and invstd being constants): dx = gamma*invstd*dz

    Args:
        dy, x: arrays of one shape and dtype; x and the options as the forward had them.
        mean, invstd: (C,), float64 or float32, as `batch_norm_train` returned them, or for the frozen gradient
            moving_mean and 1/sqrt(moving_variance + epsilon).
        gamma, beta, axis, mask, activation, negative_slope, residual: as in the forward call. beta and residual
            matter for the activation alone.
        y: in place of residual, what the forward returned: activation'(z) is read off it, so that the residual needn't
            be kept. (A z that x's dtype rounds to 0, or to relu6's 6, counts as that.)
        dmean, dvariance: (C,), float64 or float32: gradients of the loss with respect to the batch mean and variance
            themselves, where those were used beside y. Ignored where training is False.
        out: where dx goes: exactly dy, exactly x, or disjoint from every input.
        out_dresidual: where dresidual goes, with an activation: exactly x, or disjoint from every input; never `out`.

    Returns:
        GradResult(dx, dgamma, dbeta, dresidual). dresidual, where residual or y was given, is dz: without an
        activation dy itself, or a copy of it where `out` is dy.

    Raises:
        ValueError, TypeError: as in `batch_norm_train`. A non-finite dy is no error.
    """
    # fmt: off
    result = None if mask is not None else _core.grad(
        dy, x, mean, invstd, gamma, beta, axis, None, activation, negative_slope,
        residual, y, training, dmean, dvariance, out, out_dresidual,
    )
    if result is None:
        result = _again(_core.grad, _validate.grad(
            dy, x, mean, invstd, gamma, beta, axis, mask, activation, negative_slope,
            residual, y, training, dmean, dvariance, out, out_dresidual,
        ), axis, x, out, None, None, out_dresidual)
    # fmt: on
    return tuple.__new__(GradResult, result)


def moments(x: Any, *, axis: int | Sequence[int] = -1, mask: Any = None) -> Moments:
    """Count, mean and population variance of every channel of x, in float64.

    Arguments and errors are those of `batch_norm_train`. Returns Moments(count, mean, variance): count = M, or the
    sum of the weights under a mask; all zero for an empty or fully masked batch.

    Squares are taken in float32 unless x is float64: |x - mean| above 1.8e19 makes the variance infinite, a standard
    deviation below about 1e-19 makes it 0.
    """
    result = _core.moments(x, axis, None) if mask is None else None
    if result is None:
        result = _again(_core.moments, _validate.moments(x, axis, mask), axis, x)
    return tuple.__new__(Moments, result)


def _again(kernel: Callable[..., Any], args: tuple[Any, ...], axis: Any, x: Any, *outs: Any) -> tuple[Any, ...]:
    result = kernel(*args)
    if result is None:  # unreachable unless _core and _validate disagree, which is ours to mend
        plain = [f"{a.dtype}{a.shape}" if isinstance(a, np.ndarray) else a for a in args]
        raise RuntimeError(f"bnfast is broken: _core.{kernel.__name__} declined arguments that are valid: {plain}")
    result = result if isinstance(result, tuple) else (result,)
    several = isinstance(axis, tuple | list) and len(axis) > 1
    return Axes.of(axis, as_array("x", x)).restore(result, *outs) if several else result
