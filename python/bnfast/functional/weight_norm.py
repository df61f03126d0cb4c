"""Weight normalization, w = g * v/|v|: a weight as length times direction, and its gradients.

|v| is the norm over all axes except `axis`, the output channels. For Keras's kernels `axis` is -1 (Dense and
convolutions), -2 (transposed convolutions) or (-2, -1) (depthwise convolutions); for PyTorch's weights it is 0.
All computations are in float64. Where v is all zeros, w, dv and dg are zeros and not NaN.
Source: Salimans and Kingma 2016, https://arxiv.org/abs/1602.07868.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .._arguments import checks
from .._arguments.array_checks import like, parameter, tensor
from .._arguments.arrays import Array

__all__ = ["weight_norm", "weight_norm_grad"]


def weight_norm(v: Any, g: Any, axis: int | tuple[int, ...] = -1) -> Array:
    """A weight from its direction v and its lengths g, one length per output channel.

        w = g * v/|v|, with |v| over all axes except `axis`

    Args:
        v: array of rank >= 1, float32, float64, float16 or bfloat16; anything `batch_norm_train` reads.
        g: the lengths, float32 or float64; its shape is the extents of `axis` in v.
        axis: the axes of the output channels, one or several.

    Returns:
        w in the shape and dtype of v; zeros where |v| is 0.

    Raises:
        ValueError, TypeError: an argument is wrong.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> v = np.array([[3.0, 0.0], [4.0, 2.0]])  # |v| is 5 for the first output channel, 2 for the second
        >>> bnfast.weight_norm(v, np.array([10.0, 1.0]))
        array([[6., 0.],
               [8., 1.]])

    Source: Salimans and Kingma 2016, https://arxiv.org/abs/1602.07868.
    """
    v, g, axes = _validated(v, g, axis)
    v64, inverse_norm = _float64_and_inverse_norm(v, axes)
    w: Array = (v64 * (np.expand_dims(g.astype(np.float64), axes) * inverse_norm)).astype(v.dtype)
    return w


def weight_norm_grad(dw: Any, v: Any, g: Any, axis: int | tuple[int, ...] = -1) -> tuple[Array, Array]:
    """Gradients of a loss with respect to v and g, from dw, its gradient with respect to w = weight_norm(v, g, axis).

        dg = sum(dw * v)/|v|;  dv = g/|v| * (dw - dg * v/|v|)

    Args:
        dw: array with the shape and dtype of v.
        v, g, axis: as in `weight_norm`.

    Returns:
        (dv, dg) in the shapes and dtypes of v and g; zeros where |v| is 0.

    Raises:
        ValueError, TypeError: an argument is wrong.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> v, g, dw = np.array([[3.0], [4.0]]), np.array([5.0]), np.array([[1.0], [2.0]])
        >>> dv, dg = bnfast.weight_norm_grad(dw, v, g)
        >>> dg
        array([2.2])

    Source: Salimans and Kingma 2016, https://arxiv.org/abs/1602.07868.
    """
    v, g, axes = _validated(v, g, axis)
    dw = like("dw", dw, "v", v)
    if dw is None:
        raise TypeError("dw must be an array. Received: None")
    v64, inverse_norm = _float64_and_inverse_norm(v, axes)
    direction, dw64 = v64 * inverse_norm, dw.astype(np.float64)
    dg = (dw64 * direction).sum(axes, keepdims=True)
    dv = np.expand_dims(g.astype(np.float64), axes) * inverse_norm * (dw64 - dg * direction)
    return dv.astype(v.dtype), np.squeeze(dg, axes).astype(g.dtype)


def _validated(v: Any, g: Any, axis: Any) -> tuple[Array, Array, tuple[int, ...]]:
    """v, g and the axes that |v| is taken over."""
    v = tensor("v", v)
    given = axis if isinstance(axis, tuple | list) else (axis,)
    indices = [checks.integer("axis", a) for a in given]
    if any(not -v.ndim <= a < v.ndim for a in indices) or len({a % v.ndim for a in indices}) < max(len(indices), 1):
        wanted = f"one or more different axes in [{-v.ndim}, {v.ndim}) for v of shape {v.shape}"
        raise ValueError(f"axis must be {wanted}. Received: {axis}")
    kept = sorted(a % v.ndim for a in indices)
    g = parameter("g", g)
    shape = tuple(v.shape[a] for a in kept)
    if g.shape != shape:
        raise ValueError(f"g must have shape {shape} to match axis {axis} of v. Received: {g.shape}")
    return v, g, tuple(a for a in range(v.ndim) if a not in kept)


def _float64_and_inverse_norm(
    v: Array, axes: tuple[int, ...]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """v and 1/|v| in float64; the latter has extent 1 on `axes` and is 0 where |v| is 0."""
    v64 = v.astype(np.float64)
    norm = np.sqrt(np.square(v64).sum(axes, keepdims=True))
    return v64, np.divide(1.0, norm, out=np.zeros_like(norm), where=norm != 0)
