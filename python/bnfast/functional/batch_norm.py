"""Batch normalization as pure functions over arrays: train, infer, grad, moments.

Each function first calls _core, which accepts C-contiguous ndarrays of the right dtype and shape with valid options,
and returns None, with nothing changed, for anything else. Only then does _arguments raise the error that names the
argument, or convert the arguments for a second call. Calls with a mask skip the first step, because a mask's values
must be checked. Several channel axes are merged into one for _core (_arguments/axes.py).
Notation: M values per channel, invstd = 1/sqrt(variance + epsilon), xhat = (x - mean)*invstd.
Formulas: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .. import _core
from .._arguments import batch_norm as arguments
from .._arguments.arrays import Array, as_array
from .._arguments.axes import Axes
from .moments import Moments

__all__ = ["GradResult", "TrainResult", "batch_norm_grad", "batch_norm_infer", "batch_norm_train", "moments"]


class TrainResult(NamedTuple):
    """What `batch_norm_train` returns.

    Attributes:
        y: the normalized array, in the shape and dtype of x.
        mean, variance: the batch mean and population variance, float64 of shape (C,).
        invstd: 1/sqrt(variance + epsilon), float64 of shape (C,); 0 where variance + epsilon is 0.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> result = bnfast.batch_norm_train(np.array([[1.0], [3.0]]), epsilon=0.0)
        >>> result.y
        array([[-1.],
               [ 1.]])
        >>> result.mean, result.variance, result.invstd
        (array([2.]), array([1.]), array([1.]))
    """

    y: Array
    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]
    invstd: npt.NDArray[np.float64]


class GradResult(NamedTuple):
    """What `batch_norm_grad` returns.

    Attributes:
        dx: in the shape and dtype of x.
        dgamma, dbeta: of shape (C,), even if gamma or beta was None; in the dtype of gamma, else of beta, else float64
            for float64 x and float32 otherwise.
        dresidual: in the shape and dtype of x; None without residual and y.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> x, dy = np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [0.0], [0.0]])
        >>> _, mean, _, invstd = bnfast.batch_norm_train(x)
        >>> result = bnfast.batch_norm_grad(dy, x, mean, invstd)
        >>> result.dbeta
        array([1.])
        >>> result.dresidual is None
        True
    """

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
        x: array of rank >= 1, float32, float64, float16 or bfloat16. A NumPy array, or anything with the buffer
            protocol or `__dlpack__` on the CPU. Read in place if C-contiguous, else copied once. Never written.
        gamma, beta: scale and offset, float32 or float64 of shape (C,). None means ones and zeros.
        moving_mean, moving_variance: both or neither; writeable C-contiguous arrays of shape (C,), float32 or float64.
        axis: the channel axis, whose extent is C. With several axes, as (1, 2), each pair of their indices is one
            channel, and (C,) means their extents in the order of x, as (3, 4). Adjacent axes cost nothing; others
            cost one copy each of x, residual and y (dy and dx).
        momentum: weight of the old moving value, in [0, 1]. PyTorch's momentum is 1 minus this.
        epsilon: added to the variance, >= 0.
        mask: weights >= 0 for the statistics; W, the sum of the weights, replaces M. All of x is normalized. The mask
            has the shape of x without the channel axes, or the rank of x with extent 1 on the channel axes and 1 or
            x's extent on the others. Converted to float64 for float64 x, else to float32.
        activation: None, "relu", "relu6", "leaky_relu" (with slope `negative_slope` below 0), "silu" (or "swish"),
            "hard_silu" (or "hard_swish"), "sigmoid", "hard_sigmoid", "tanh", "gelu" (with erf), "gelu_tanh", "elu"
            (alpha 1), "selu", "softplus" or "mish", as Keras defines them.
        residual: array with the shape and dtype of x, added before the activation.
        correction: 0 averages the population variance in moving_variance, as Keras does; 1 averages the sample
            variance, variance * W/(W - 1), as PyTorch does. y is the same.
        nan_policy: what to do if the statistics of a channel are not finite. "propagate" updates the moving
            statistics with them, "skip_update" leaves those of the channel unchanged, "raise" is an error.
        out: the array for y: exactly x (which is then overwritten, but batch_norm_grad needs it), or disjoint from
            every input.

    Returns:
        TrainResult(y, mean, variance, invstd), the last three float64 of shape (C,). An empty or fully masked batch
        has mean and variance 0 and does not change the moving statistics. The mean of finite values is finite. A
        variance that overflows the compute type (float64 for float64, else float32) is infinity: not finite for
        nan_policy; then invstd is 0, y is that of beta, and dx is 0.

    Raises:
        ValueError, TypeError: an argument is wrong; nothing is changed.
        FloatingPointError: nan_policy="raise" and the statistics of a channel are not finite; nothing is changed.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
        >>> moving_mean, moving_variance = np.zeros(2), np.ones(2)
        >>> y, mean, variance, _ = bnfast.batch_norm_train(x, None, None, moving_mean, moving_variance, momentum=0.5)
        >>> y.round(2)
        array([[-1., -1.],
               [ 1.,  1.]])
        >>> mean, variance
        (array([ 2., 20.]), array([  1., 100.]))
        >>> moving_mean
        array([ 1., 10.])

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    # fmt: off
    result = None if mask is not None else _core.train(
        x, gamma, beta, moving_mean, moving_variance, axis, momentum, epsilon, None,
        activation, negative_slope, residual, correction, nan_policy, out,
    )
    if result is None:
        result = _call_validated(_core.train, arguments.train(
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

    Args:
        moving_mean, moving_variance: float32 or float64 of shape (C,). Only read here, so that they may be anything
            `batch_norm_train` reads.
        x, gamma, beta, axis, epsilon, activation, negative_slope, residual, out: as in `batch_norm_train`.

    Returns:
        y in the shape and dtype of x.

    Raises:
        ValueError, TypeError: an argument is wrong; nothing is changed.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> x = np.array([[1.0, 10.0], [3.0, 30.0]], np.float32)
        >>> bnfast.batch_norm_infer(x, np.array([2.0, 20.0]), np.array([1.0, 100.0]), activation="relu", epsilon=0.0)
        array([[0., 0.],
               [1., 1.]], dtype=float32)

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    # fmt: off
    y = _core.infer(
        x, moving_mean, moving_variance, gamma, beta, axis, epsilon, activation, negative_slope, residual, out,
    )
    if y is None:
        (y,) = _call_validated(_core.infer, arguments.infer(
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

        dz = dy * activation'(z), where z is recomputed from x with the operations of the forward pass
        dbeta = sum dz;  dgamma = sum dz*xhat
        training: dx = gamma*invstd*(dz - (w/W)*(dbeta + xhat*dgamma)) + (w/W)*(dmean + dvariance*2*(x - mean)),
                  where w/W = 1/M without a mask
        frozen (training=False: mean and invstd are constants): dx = gamma*invstd*dz

    Args:
        dy, x: arrays of equal shape and dtype; x as in the forward call.
        mean, invstd: float64 or float32 of shape (C,), as returned by `batch_norm_train`. For the frozen gradient
            moving_mean and 1/sqrt(moving_variance + epsilon).
        gamma, beta, axis, mask, activation, negative_slope, residual: as in the forward call. beta and residual are
            used only if there is an activation.
        y: the forward call's result, instead of residual. activation'(z) is then derived from y, so that the residual
            need not be kept. A z that x's dtype rounds to 0, or to relu6's 6, counts as that value. Only for "relu",
            "relu6" and "leaky_relu": the other gradients can't be told from y, and need the residual.
        training: True if mean and invstd are those of this batch, False if they are constants.
        dmean, dvariance: float64 or float32 of shape (C,): gradients of the loss with respect to the batch mean and
            variance, if the loss uses them in addition to y. Ignored with training=False.
        out: the array for dx: exactly dy, exactly x, or disjoint from every input.
        out_dresidual: the array for dresidual, allowed only with an activation: exactly x, or disjoint from every
            input and from `out`.

    Returns:
        GradResult(dx, dgamma, dbeta, dresidual). If residual or y was given, dresidual is dz. Without an activation
        that is dy itself, or a copy of it if `out` is dy.

    Raises:
        ValueError, TypeError: an argument is wrong; nothing is changed. A non-finite dy is not an error.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> x, dy = np.array([[1.0], [3.0]]), np.array([[4.0], [2.0]])
        >>> _, mean, _, invstd = bnfast.batch_norm_train(x, epsilon=0.0)
        >>> dx, dgamma, dbeta, _ = bnfast.batch_norm_grad(dy, x, mean, invstd)
        >>> dgamma, dbeta
        (array([-2.]), array([6.]))
        >>> bnfast.batch_norm_grad(dy, x, mean, invstd, training=False).dx
        array([[4.],
               [2.]])

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    # fmt: off
    result = None if mask is not None else _core.grad(
        dy, x, mean, invstd, gamma, beta, axis, None, activation, negative_slope,
        residual, y, training, dmean, dvariance, out, out_dresidual,
    )
    if result is None:
        result = _call_validated(_core.grad, arguments.grad(
            dy, x, mean, invstd, gamma, beta, axis, mask, activation, negative_slope,
            residual, y, training, dmean, dvariance, out, out_dresidual,
        ), axis, x, out, None, None, out_dresidual)
    # fmt: on
    return tuple.__new__(GradResult, result)


def moments(x: Any, *, axis: int | Sequence[int] = -1, mask: Any = None) -> Moments:
    """Count, mean and population variance of each channel of x.

        W = sum w;  mean = sum(w*x)/W;  variance = sum(w*(x - mean)^2)/W;  without a mask w = 1 and W = M

    Squares are computed in float32 unless x is float64: |x - mean| above 1.8e19 makes the variance infinite, and a
    standard deviation below about 1e-19 makes it 0.

    Args:
        x, axis, mask: as in `batch_norm_train`.

    Returns:
        Moments(count, mean, variance): count is W as a float, mean and variance are float64 of shape (C,). All are
        zero for an empty or fully masked batch.

    Raises:
        ValueError, TypeError: an argument is wrong.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> bnfast.moments(np.array([[1.0, 10.0], [3.0, 30.0]], np.float32))
        Moments(count=2.0, mean=array([ 2., 20.]), variance=array([  1., 100.]))

    Source: the mean and variance of Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    result = _core.moments(x, axis, None) if mask is None else None
    if result is None:
        result = _call_validated(_core.moments, arguments.moments(x, axis, mask), axis, x)
    return tuple.__new__(Moments, result)


def _call_validated(
    kernel: Callable[..., Any], args: tuple[Any, ...], axis: Any, x: Any, *outs: Any
) -> tuple[Any, ...]:
    """The second call of _core, with validated arguments; results in the shapes of x and of the vectors."""
    result = kernel(*args)
    if result is None:  # _core and _arguments disagree, which is a bug of bnfast
        received = [f"{a.dtype}{a.shape}" if isinstance(a, np.ndarray) else a for a in args]
        raise RuntimeError(f"internal error: _core.{kernel.__name__} declined valid arguments: {received}")
    result = result if isinstance(result, tuple) else (result,)
    several = isinstance(axis, tuple | list) and len(axis) > 1
    return Axes.of(axis, as_array("x", x)).restore(result, *outs) if several else result
