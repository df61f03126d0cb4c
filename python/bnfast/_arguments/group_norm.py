"""Group, instance and layer norm for the calls that _core declines: raise the error, or convert and call _core again.

_core takes x as (N, A, C, S): samples, the values between the sample axis and the channel axis, channels, the rest.
A or S is 1.
- channels_first (A = 1): the values of a group are contiguous, C/groups channels of S values.
- channels_last (S = 1): a sample is a matrix of A rows, a group C/groups of its columns.
- channels in the middle, as axis 2 of rank 4: transposed to channels_first, one copy of x (and dy) on the way in and
  one of y (dx) on the way out.
- layer norm over trailing axes: N rows with one group, C = the product of the axes' extents. Other axes are transposed
  to the end first, again with one copy each way.
A call that raises has changed nothing: ValueError for values and shapes, TypeError for types and dtypes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .. import _core
from . import checks
from .array_checks import like, output, parameter, tensor, vector
from .arrays import Array, contiguous
from .axes import Axes
from .checks import integer, real

__all__ = ["PER_CHANNEL", "group_norm", "group_norm_grad", "layer_norm", "layer_norm_grad"]


class PerChannel:
    """Passed instead of a number of groups: one group per channel (instance norm)."""


PER_CHANNEL = PerChannel()


class CoreLayout(NamedTuple):
    """How x is passed to _core: axes transposed to `order`, reshaped to `shape`, channels on `channel_axis`."""

    axes: Axes
    order: tuple[int, ...]
    shape: tuple[int, ...]
    channel_axis: int
    groups: int
    statistics_shape: tuple[int, ...]  # of mean and invstd
    statistics_meaning: str  # what that shape is, for error messages

    @staticmethod
    def of_groups(x: Array, groups: Any, axis: Any) -> CoreLayout:
        """With C = 0, PER_CHANNEL means one group, which _core requires; the statistics then have shape (N, 0)."""
        axes = Axes.of(axis, x)
        if len(axes.axes) > 1:
            raise ValueError(f"axis must name one axis. Received: {axis!r}")
        if x.ndim < 2:
            raise ValueError(f"x must have a batch axis and a channel axis. Received: shape {x.shape}")
        channel_axis = axes.merged_axis
        if channel_axis == 0:
            raise ValueError(
                f"axis must not be 0, which is the batch axis. Received: {axis!r} for x of shape {x.shape}"
            )
        samples, channels = len(x), x.shape[channel_axis]
        count = max(1, channels) if isinstance(groups, PerChannel) else integer("groups", groups)
        if count < 1 or channels % count:
            raise ValueError(f"groups must divide the {channels} channels on {axes} of x. Received: {count}")
        before, after = math.prod(x.shape[1:channel_axis]), math.prod(x.shape[channel_axis + 1 :])
        order, shape = tuple(range(x.ndim)), (samples, before, channels, after)
        if before != 1 and after != 1:
            order = (0, channel_axis, *(i for i in order[1:] if i != channel_axis))
            shape = (samples, 1, channels, before * after)
        statistics_shape = (samples, channels if isinstance(groups, PerChannel) else count)
        return CoreLayout(axes, order, shape, 2, count, statistics_shape, "(batch, groups)")

    @staticmethod
    def of_layers(x: Array, axis: Any) -> CoreLayout:
        axes = Axes.of(axis, x)
        others = tuple(i for i in range(x.ndim) if i not in axes.axes)
        shape = math.prod(axes.other_shape), math.prod(axes.shape)
        meaning = f"that of x without {axes}"
        return CoreLayout(axes, (*others, *axes.axes), shape, 1, 1, axes.other_shape, meaning)

    @property
    def transposed(self) -> bool:
        return self.order != tuple(range(len(self.order)))

    def to_core(self, array: Array) -> Array:
        """x or dy as _core takes it; a copy only if it is transposed or was not contiguous."""
        plain = contiguous(array.transpose(self.order))
        assert plain is not None
        return plain.reshape(self.shape)

    def out_to_core(self, out: Array | None) -> Array | None:
        """The array for _core to write: a view of `out`, or None if x is transposed; then `from_core` fills `out`."""
        return None if out is None or self.transposed else out.reshape(self.shape)

    def from_core(self, array: Array, out: Array | None) -> Array:
        """y or dx in the shape of x, in `out` if there is one."""
        if out is not None and not self.transposed:
            return out
        x_shape = self.axes.x_shape
        array = array.reshape([x_shape[i] for i in self.order]).transpose(np.argsort(self.order))
        if out is None:
            return np.ascontiguousarray(array).reshape(x_shape)  # ascontiguousarray makes (1,) of ()
        out[...] = array
        return out


def group_norm(
    x: Any, groups: Any, gamma: Any, beta: Any, axis: Any, epsilon: Any, activation: Any, negative_slope: Any,
    residual: Any, out: Any,
) -> tuple[Array, ...]:  # fmt: skip
    x = tensor("x", x)
    layout = CoreLayout.of_groups(x, groups, axis)
    return _forward(x, layout, gamma, beta, epsilon, activation, negative_slope, residual, out)


def layer_norm(
    x: Any, gamma: Any, beta: Any, axis: Any, epsilon: Any, activation: Any, negative_slope: Any, residual: Any,
    out: Any,
) -> tuple[Array, ...]:  # fmt: skip
    x = tensor("x", x)
    layout = CoreLayout.of_layers(x, axis)
    return _forward(x, layout, gamma, beta, epsilon, activation, negative_slope, residual, out)


def group_norm_grad(
    dy: Any, x: Any, mean: Any, invstd: Any, groups: Any, gamma: Any, beta: Any, axis: Any, activation: Any,
    negative_slope: Any, residual: Any, out: Any, out_dresidual: Any,
) -> tuple[Array, Array, Array, Array | None]:  # fmt: skip
    x = tensor("x", x)
    fused = activation, negative_slope, residual
    return _backward(
        dy, x, CoreLayout.of_groups(x, groups, axis), mean, invstd, gamma, beta, *fused, out, out_dresidual
    )


def layer_norm_grad(
    dy: Any, x: Any, mean: Any, invstd: Any, gamma: Any, beta: Any, axis: Any, activation: Any, negative_slope: Any,
    residual: Any, out: Any, out_dresidual: Any,
) -> tuple[Array, Array, Array, Array | None]:  # fmt: skip
    x = tensor("x", x)
    fused = activation, negative_slope, residual
    return _backward(dy, x, CoreLayout.of_layers(x, axis), mean, invstd, gamma, beta, *fused, out, out_dresidual)


def _forward(
    x: Array, layout: CoreLayout, gamma: Any, beta: Any, epsilon: Any, activation: Any, negative_slope: Any,
    residual: Any, out: Any,
) -> tuple[Array, ...]:  # fmt: skip
    gamma, beta = vector("gamma", gamma, layout.axes), vector("beta", beta, layout.axes)
    epsilon = real("epsilon", epsilon)
    activation, negative_slope = checks.activation(activation), real("negative_slope", negative_slope)
    residual = like("residual", residual, "x", x)
    out = output(out, {"x": x}, {"gamma": gamma, "beta": beta, "residual": residual})
    result = _core.group_norm(
        layout.to_core(x),
        layout.groups,
        _flatten(gamma),
        _flatten(beta),
        layout.channel_axis,
        epsilon,
        activation,
        negative_slope,
        None if residual is None else layout.to_core(residual),
        layout.out_to_core(out),
    )
    assert result is not None, "internal error: _core.group_norm declined valid arguments"
    y, mean, invstd = result
    return (
        layout.from_core(y, out),
        _reshaped(mean, layout.statistics_shape),
        _reshaped(invstd, layout.statistics_shape),
    )


def _backward(
    dy: Any, x: Array, layout: CoreLayout, mean: Any, invstd: Any, gamma: Any, beta: Any, activation: Any,
    negative_slope: Any, residual: Any, out: Any, out_dresidual: Any,
) -> tuple[Array, Array, Array, Array | None]:  # fmt: skip
    dy = like("dy", tensor("dy", dy), "x", x)
    assert dy is not None
    mean, invstd = _statistics("mean", mean, layout), _statistics("invstd", invstd, layout)
    gamma, beta = vector("gamma", gamma, layout.axes), vector("beta", beta, layout.axes)
    activation, negative_slope = checks.activation(activation), real("negative_slope", negative_slope)
    residual = like("residual", residual, "x", x)
    others = {"mean": mean, "invstd": invstd, "gamma": gamma, "beta": beta, "residual": residual}
    out = output(out, {"dy": dy, "x": x}, others)
    out_dresidual = output(out_dresidual, {"x": x}, others | {"dy": dy, "out": out}, "out_dresidual")
    if out_dresidual is not None and (activation is None or residual is None):
        raise ValueError(
            "out_dresidual must be None without an activation and a residual, as dresidual is then dy or None. "
            f"Received: {'no residual' if activation else 'activation=None'}"
        )
    # Without an activation dresidual is dy itself, or a copy of it where dx overwrites dy.
    plain = None
    if residual is not None and activation is None:
        plain = dy.copy() if out is not None and np.shares_memory(out, dy) else dy
    core_shape = (layout.shape[0], layout.groups)
    result = _core.group_norm_grad(
        layout.to_core(dy),
        layout.to_core(x),
        _reshaped(_flatten(mean, np.float64), core_shape),
        _reshaped(_flatten(invstd, np.float64), core_shape),
        layout.groups,
        _flatten(gamma),
        _flatten(beta),
        layout.channel_axis,
        activation,
        negative_slope,
        None if residual is None or activation is None else layout.to_core(residual),
        layout.out_to_core(out),
        layout.out_to_core(out_dresidual),
    )
    assert result is not None, "internal error: _core.group_norm_grad declined valid arguments"
    dx, dgamma, dbeta, dresidual = result
    dresidual = plain if dresidual is None else layout.from_core(dresidual, out_dresidual)
    shape = layout.axes.shape
    return layout.from_core(dx, out), dgamma.reshape(shape), dbeta.reshape(shape), dresidual


def _flatten(array: Array | None, dtype: Any = None) -> Array | None:
    plain = contiguous(array, dtype)
    return None if plain is None else plain.reshape(-1)


def _reshaped(statistics: Array | None, shape: tuple[int, ...]) -> Array:
    """The statistics in that shape. Without channels _core's are (N, 1), which become zeros of shape (N, 0)."""
    assert statistics is not None
    return statistics.reshape(shape) if statistics.size == math.prod(shape) else np.zeros(shape)


def _statistics(name: str, value: Any, layout: CoreLayout) -> Array:
    if value is None:
        raise TypeError(f"{name} must be an array of shape {layout.statistics_shape}. Received: None")
    array = parameter(name, value)
    if array.shape != layout.statistics_shape:
        wanted = f"{layout.statistics_shape}, {layout.statistics_meaning}"
        raise ValueError(f"{name} must have shape {wanted}. Received: {array.shape}")
    return array
