"""Group normalization, its special case instance normalization (one group per channel), and their gradients.

A group is C/groups neighbouring channels of one sample; axis 0 is the batch. Statistics are per sample and group,
gamma and beta per channel. Training and inference are the same, and there are no moving statistics.
Sources: Wu and He 2018, https://arxiv.org/abs/1803.08494; Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .. import _core
from .._arguments import group_norm as arguments
from .._arguments.arrays import Array

__all__ = ["NormGradResult", "NormResult", "group_norm", "group_norm_grad", "instance_norm", "instance_norm_grad"]


class NormResult(NamedTuple):
    """What `group_norm`, `instance_norm` and `layer_norm` return.

    Attributes:
        y: the normalized array, in the shape and dtype of x.
        mean: float64, of shape (N, groups), (N, C) or the shape of x without the normalized axes.
        invstd: 1/sqrt(variance + epsilon), in the shape of mean; 0 where variance + epsilon is 0.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> result = bnfast.layer_norm(np.array([[1.0, 3.0], [10.0, 30.0]]), epsilon=0.0)
        >>> result.y
        array([[-1.,  1.],
               [-1.,  1.]])
        >>> result.mean, result.invstd
        (array([ 2., 20.]), array([1. , 0.1]))
    """

    y: Array
    mean: npt.NDArray[np.float64]
    invstd: npt.NDArray[np.float64]


class _Gradients(NamedTuple):
    dx: Array
    dgamma: Array
    dbeta: Array


class NormGradResult(_Gradients):
    """What `group_norm_grad`, `instance_norm_grad` and `layer_norm_grad` return.

    Attributes:
        dx: in the shape and dtype of x.
        dgamma, dbeta: in the shape of gamma, even if it was None; in the dtype of gamma, else float64 for float64 x
            and float32 otherwise.
        dresidual: in the shape and dtype of x; None without a residual. An attribute that is not part of the tuple.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> x, dy = np.array([[1.0, 3.0], [10.0, 30.0]]), np.array([[1.0, 2.0], [3.0, 4.0]])
        >>> _, mean, invstd = bnfast.layer_norm(x, epsilon=0.0)
        >>> result = bnfast.layer_norm_grad(dy, x, mean, invstd)
        >>> result.dgamma, result.dbeta
        (array([-4.,  6.]), array([4., 6.]))
    """

    dresidual: Array | None = None

    @classmethod
    def of(cls, dx: Array, dgamma: Array, dbeta: Array, dresidual: Array | None) -> NormGradResult:
        """The result with its attribute."""
        result = cls(dx, dgamma, dbeta)
        result.dresidual = dresidual
        return result


def group_norm(
    x: Any,
    groups: int,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-3,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Any = None,
    out: Array | None = None,
) -> NormResult:
    """Normalize each group of channels of each sample.

        y = activation(gamma * (x - mean)*invstd + beta + residual),  invstd = 1/sqrt(variance + epsilon)

    Args:
        x: array of rank >= 2, float32, float64, float16 or bfloat16; anything `batch_norm_train` reads. Axis 0 is the
            batch. Read in place if C-contiguous with the channels on the axis after the batch or on the last one
            (axes of extent 1 do not count); else x and y cost one copy each. Never written.
        groups: number of groups, a divisor of C, the extent of `axis`.
        gamma, beta: scale and offset, float32 or float64 of shape (C,). None means ones and zeros.
        axis: the channel axis, not 0.
        epsilon: added to the variance, >= 0.
        activation, negative_slope, residual: as in `batch_norm_train`.
        out: the array for y: exactly x (which is then overwritten, but the gradient needs it), or disjoint from every
            input.

    Returns:
        NormResult(y, mean, invstd): mean and invstd are float64 of shape (N, groups). A group without values has mean
        and variance 0.

    Raises:
        ValueError, TypeError: an argument is wrong; nothing is changed.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> x = np.array([[1.0, 3.0, 10.0, 30.0]])
        >>> y, mean, _ = bnfast.group_norm(x, 2, epsilon=0.0)
        >>> y
        array([[-1.,  1., -1.,  1.]])
        >>> mean
        array([[ 2., 20.]])

    Source: Wu and He 2018, https://arxiv.org/abs/1803.08494.
    """
    args = gamma, beta, axis, epsilon, activation, negative_slope, residual, out
    result = None if groups is None else _core.group_norm(x, groups, *args)
    return NormResult(*(result or arguments.group_norm(x, groups, *args)))


def group_norm_grad(
    dy: Any,
    x: Any,
    mean: Any,
    invstd: Any,
    groups: int,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = -1,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Any = None,
    out: Array | None = None,
    out_dresidual: Array | None = None,
) -> NormGradResult:
    """Gradients of a loss with respect to x, gamma and beta, from dy, its gradient with respect to y.

        dz = dy * activation'(z), where z is recomputed from x with the operations of the forward pass
        xhat = (x - mean)*invstd;  dbeta = sum dz;  dgamma = sum dz*xhat, over all axes except `axis`
        g = gamma*dz;  dx = invstd*(g - sum(g)/M - xhat * sum(g*xhat)/M), over the M values of the group

    Args:
        dy, x: arrays of equal shape and dtype; x as in the forward call.
        mean, invstd: float64 or float32 of shape (N, groups), as returned by `group_norm`.
        groups, gamma, beta, axis, activation, negative_slope, residual: as in the forward call.
            beta is used only if there is an activation.
        out: the array for dx: exactly dy, exactly x, or disjoint from every input.
        out_dresidual: the array for dresidual, allowed only with an activation and a residual: exactly x, or disjoint
            from every input and from `out`.

    Returns:
        NormGradResult(dx, dgamma, dbeta), with the attribute dresidual: dz if a residual was given, which without an
        activation is dy itself, or a copy of it if `out` is dy. dgamma and dbeta are zeros if x is empty.

    Raises:
        ValueError, TypeError: an argument is wrong; nothing is changed. A non-finite dy is not an error.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> x, dy = np.array([[1.0, 3.0, 10.0, 30.0]]), np.array([[1.0, 2.0, 3.0, 4.0]])
        >>> _, mean, invstd = bnfast.group_norm(x, 2, epsilon=0.0)
        >>> dx, dgamma, dbeta = bnfast.group_norm_grad(dy, x, mean, invstd, 2)
        >>> dgamma, dbeta
        (array([-1.,  2., -3.,  4.]), array([1., 2., 3., 4.]))

    Source: the chain rule on the formulas of Wu and He 2018, https://arxiv.org/abs/1803.08494.
    """
    args = gamma, beta, axis, activation, negative_slope, residual, out, out_dresidual
    result = None if groups is None else _core.group_norm_grad(dy, x, mean, invstd, groups, *args)
    return NormGradResult.of(*(result or arguments.group_norm_grad(dy, x, mean, invstd, groups, *args)))


def instance_norm(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-3,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Any = None,
    out: Array | None = None,
) -> NormResult:
    """Normalize each channel of each sample: `group_norm` with groups = C.

        y = activation(gamma * (x - mean)*invstd + beta + residual),  invstd = 1/sqrt(variance + epsilon)

    Args:
        all: as in `group_norm`.

    Returns:
        NormResult(y, mean, invstd): mean and invstd are float64 of shape (N, C).

    Raises:
        ValueError, TypeError: an argument is wrong; nothing is changed.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> x = np.array([[[1.0, 3.0], [10.0, 30.0]]])  # (1, 2, 2), channels on axis 1
        >>> bnfast.instance_norm(x, axis=1, epsilon=0.0).mean
        array([[ 2., 20.]])

    Source: Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022.
    """
    args = gamma, beta, axis, epsilon, activation, negative_slope, residual, out
    return NormResult(*(_core.group_norm(x, None, *args) or arguments.group_norm(x, arguments.PER_CHANNEL, *args)))


def instance_norm_grad(
    dy: Any,
    x: Any,
    mean: Any,
    invstd: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = -1,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Any = None,
    out: Array | None = None,
    out_dresidual: Array | None = None,
) -> NormGradResult:
    """Gradients of a loss with respect to x, gamma and beta through `instance_norm`: `group_norm_grad` with groups = C.

    Args:
        mean, invstd: float64 or float32 of shape (N, C), as returned by `instance_norm`.
        All others: as in `group_norm_grad`.

    Returns:
        NormGradResult(dx, dgamma, dbeta).

    Raises:
        ValueError, TypeError: an argument is wrong; nothing is changed. A non-finite dy is not an error.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> x, dy = np.array([[[1.0, 3.0], [10.0, 30.0]]]), np.array([[[1.0, 2.0], [3.0, 4.0]]])
        >>> _, mean, invstd = bnfast.instance_norm(x, axis=1, epsilon=0.0)
        >>> bnfast.instance_norm_grad(dy, x, mean, invstd, axis=1).dbeta
        array([3., 7.])

    Source: the chain rule on the formulas of Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022.
    """
    args = gamma, beta, axis, activation, negative_slope, residual, out, out_dresidual
    result = _core.group_norm_grad(dy, x, mean, invstd, None, *args)
    return NormGradResult.of(*(result or arguments.group_norm_grad(dy, x, mean, invstd, arguments.PER_CHANNEL, *args)))
