"""Layer normalization and its gradients: one mean and variance over `axis` per index of the other axes.

Source: Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import _core
from .._arguments import group_norm as arguments
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
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Any = None,
    out: Array | None = None,
) -> NormResult:
    """Normalize over `axis`, separately for each index of the other axes.

        y = activation(gamma * (x - mean)*invstd + beta + residual),  invstd = 1/sqrt(variance + epsilon)

    Args:
        x: array of rank >= 1, float32, float64, float16 or bfloat16; anything `batch_norm_train` reads. Read in place
            if C-contiguous with `axis` as its last axes; else x and y cost one copy each. Never written.
        gamma, beta: scale and offset, float32 or float64 with the extents of `axis` in the order of x as their shape:
            (768,), or (56, 64) for axis=(-2, -1). None means ones and zeros.
        axis: the axes that are normalized, one or several.
        epsilon: added to the variance, >= 0.
        activation, negative_slope, residual: as in `batch_norm_train`.
        out: the array for y: exactly x (which is then overwritten, but the gradient needs it), or disjoint from every
            input.

    Returns:
        NormResult(y, mean, invstd): mean and invstd are float64, in the shape of x without `axis`.

    Raises:
        ValueError, TypeError: an argument is wrong; nothing is changed.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> y, mean, invstd = bnfast.layer_norm(np.array([[1.0, 3.0], [10.0, 30.0]]), epsilon=0.0)
        >>> y
        array([[-1.,  1.],
               [-1.,  1.]])
        >>> mean
        array([ 2., 20.])

    Source: Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450.
    """
    args = gamma, beta, axis, epsilon, activation, negative_slope, residual, out
    return NormResult(*(_core.layer_norm(x, *args) or arguments.layer_norm(x, *args)))


def layer_norm_grad(
    dy: Any,
    x: Any,
    mean: Any,
    invstd: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int | Sequence[int] = -1,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Any = None,
    out: Array | None = None,
    out_dresidual: Array | None = None,
) -> NormGradResult:
    """Gradients of a loss with respect to x, gamma and beta, from dy, its gradient with respect to y.

        dz = dy * activation'(z), where z is recomputed from x with the operations of the forward pass
        xhat = (x - mean)*invstd;  dbeta = sum dz;  dgamma = sum dz*xhat, over the other axes
        g = gamma*dz;  dx = invstd*(g - sum(g)/M - xhat * sum(g*xhat)/M), over the M values on `axis`

    Args:
        dy, x: arrays of equal shape and dtype; x as in the forward call.
        mean, invstd: float64 or float32 in the shape of x without `axis`, as returned by `layer_norm`.
        gamma, beta, axis, activation, negative_slope, residual: as in the forward call.
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
        >>> x, dy = np.array([[1.0, 3.0], [10.0, 30.0]]), np.array([[1.0, 2.0], [3.0, 4.0]])
        >>> _, mean, invstd = bnfast.layer_norm(x, epsilon=0.0)
        >>> dx, dgamma, dbeta = bnfast.layer_norm_grad(dy, x, mean, invstd)
        >>> dgamma, dbeta
        (array([-4.,  6.]), array([4., 6.]))

    Source: the chain rule on the formulas of Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450.
    """
    args = dy, x, mean, invstd, gamma, beta, axis, activation, negative_slope, residual, out, out_dresidual
    return NormGradResult.of(*(_core.layer_norm_grad(*args) or arguments.layer_norm_grad(*args)))
