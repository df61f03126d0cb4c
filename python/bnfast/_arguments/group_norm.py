"""Group, instance and layer norm of whatever _core.group_norm declines: the error, or a call with plain arguments.

The core sees (N, A, C, S): samples, what lies between their axis and the channels', channels, the rest; A or S is 1.
- channels_first (A = 1): a group's values lie side by side, K = C/groups channels of S values.
- channels_last (S = 1): a sample is a matrix of A rows, a group K of its columns.
- channels in the middle, as axis 2 of rank 4: channels_first by one copy of x (and dy) on the way in, of y (dx) out.
- layer norm over trailing axes: N rows of one group, C = the axes' extents multiplied; other axes go to the end first,
  again by one copy each way.
Whatever raises has changed nothing: ValueError for values and shapes, TypeError for types and dtypes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .. import _core
from .arrays import Array, as_array, contiguous
from .axes import Axes
from .checks import integer, like, real, target, tensor, vector

__all__ = ["EACH", "group_norm", "group_norm_grad", "layer_norm", "layer_norm_grad"]


class Each:
    """In place of a number of groups: one a channel."""


EACH = Each()


class View(NamedTuple):
    """How x goes into the core: its axes in this order, then in that shape, channels at `place`."""

    axes: Axes
    order: tuple[int, ...]
    shape: tuple[int, ...]
    place: int
    groups: int
    statistics: tuple[int, ...]  # the shape of mean
    meaning: str  # of that shape

    @staticmethod
    def of_groups(x: Array, groups: Any, axis: Any) -> View:
        """For no channels EACH stands for the one group that the core takes; their statistics have shape (N, 0)."""
        axes = Axes.of(axis, x)
        if len(axes.axes) > 1:
            raise ValueError(f"axis must name one axis. Received: {axis!r}")
        if x.ndim < 2:
            raise ValueError(f"x must have a batch axis and a channel axis. Received: shape {x.shape}")
        place = axes.place
        if place == 0:
            raise ValueError(f"axis must not be 0, the batch's. Received: {axis!r} for x of shape {x.shape}")
        samples, channels = len(x), x.shape[place]
        count = max(1, channels) if isinstance(groups, Each) else integer("groups", groups)
        if count < 1 or channels % count:
            raise ValueError(f"groups must divide the {channels} channels on {axes} of x. Received: {count}")
        before, after = math.prod(x.shape[1:place]), math.prod(x.shape[place + 1 :])
        order, shape, at = tuple(range(x.ndim)), (samples, before, channels, after), 2
        if before != 1 and after != 1:
            order = (0, place, *(i for i in order[1:] if i != place))
            shape, at = (samples, 1, channels, before * after), 2
        statistics = (samples, channels if isinstance(groups, Each) else count)
        return View(axes, order, shape, at, count, statistics, "(batch, groups)")

    @staticmethod
    def of_layers(x: Array, axis: Any) -> View:
        axes = Axes.of(axis, x)
        others = tuple(i for i in range(x.ndim) if i not in axes.axes)
        shape = math.prod(axes.off), math.prod(axes.shape)
        return View(axes, (*others, *axes.axes), shape, 1, 1, axes.off, f"that of x without {axes}")

    @property
    def moved(self) -> bool:
        return self.order != tuple(range(len(self.order)))

    def enter(self, array: Array) -> Array:
        plain = contiguous(array.transpose(self.order))
        assert plain is not None
        return plain.reshape(self.shape)

    def enter_out(self, out: Array | None) -> Array | None:
        """Where the core writes: `out`, or None where that is a copy, which `leave` brings to `out`."""
        return None if out is None or self.moved else out.reshape(self.shape)

    def leave(self, array: Array, out: Array | None) -> Array:
        if out is not None and not self.moved:
            return out
        whole = self.axes.x_shape
        array = array.reshape([whole[i] for i in self.order]).transpose(np.argsort(self.order))
        if out is None:
            return np.ascontiguousarray(array).reshape(whole)  # NumPy makes (1,) of ()
        out[...] = array
        return out


def group_norm(x: Any, groups: Any, gamma: Any, beta: Any, axis: Any, epsilon: Any, out: Any) -> tuple[Array, ...]:
    x = tensor("x", x)
    return _forward(x, View.of_groups(x, groups, axis), gamma, beta, epsilon, out)


def layer_norm(x: Any, gamma: Any, beta: Any, axis: Any, epsilon: Any, out: Any) -> tuple[Array, ...]:
    x = tensor("x", x)
    return _forward(x, View.of_layers(x, axis), gamma, beta, epsilon, out)


def group_norm_grad(
    dy: Any, x: Any, mean: Any, invstd: Any, groups: Any, gamma: Any, axis: Any, out: Any
) -> tuple[Array, ...]:
    x = tensor("x", x)
    return _backward(dy, x, View.of_groups(x, groups, axis), mean, invstd, gamma, out)


def layer_norm_grad(dy: Any, x: Any, mean: Any, invstd: Any, gamma: Any, axis: Any, out: Any) -> tuple[Array, ...]:
    x = tensor("x", x)
    return _backward(dy, x, View.of_layers(x, axis), mean, invstd, gamma, out)


def _forward(x: Array, view: View, gamma: Any, beta: Any, epsilon: Any, out: Any) -> tuple[Array, ...]:
    gamma, beta = vector("gamma", gamma, view.axes), vector("beta", beta, view.axes)
    epsilon = real("epsilon", epsilon)
    out = target(out, {"x": x}, {"gamma": gamma, "beta": beta})
    result = _core.group_norm(
        *(view.enter(x), view.groups, _flat(gamma), _flat(beta), view.place, epsilon, view.enter_out(out))
    )
    assert result is not None, "_core.group_norm declined what is valid: bnfast is broken"
    y, mean, invstd = result
    return view.leave(y, out), _shaped(mean, view.statistics), _shaped(invstd, view.statistics)


def _backward(dy: Any, x: Array, view: View, mean: Any, invstd: Any, gamma: Any, out: Any) -> tuple[Array, ...]:
    dy = like("dy", tensor("dy", dy), "x", x)
    assert dy is not None
    mean, invstd = _statistics("mean", mean, view), _statistics("invstd", invstd, view)
    gamma = vector("gamma", gamma, view.axes)
    out = target(out, {"dy": dy, "x": x}, {"mean": mean, "invstd": invstd, "gamma": gamma})
    rows = (_shaped(_flat(a, np.float64), (view.shape[0], view.groups)) for a in (mean, invstd))
    result = _core.group_norm_grad(
        *(view.enter(dy), view.enter(x), *rows, view.groups, _flat(gamma), view.place, view.enter_out(out))
    )
    assert result is not None, "_core.group_norm_grad declined what is valid: bnfast is broken"
    dx, dgamma, dbeta = result
    return view.leave(dx, out), dgamma.reshape(view.axes.shape), dbeta.reshape(view.axes.shape)


def _flat(array: Array | None, dtype: Any = None) -> Array | None:
    plain = contiguous(array, dtype)
    return None if plain is None else plain.reshape(-1)


def _shaped(statistics: Array | None, shape: tuple[int, ...]) -> Array:
    """In that shape; of no channels zeros are made, as there the core's (N, 1) meets (N, 0)."""
    assert statistics is not None
    return statistics.reshape(shape) if statistics.size == math.prod(shape) else np.zeros(shape)


def _statistics(name: str, value: Any, view: View) -> Array:
    if value is None:
        raise TypeError(f"{name} must be an array of shape {view.statistics}. Received: None")
    array = as_array(name, value)
    if array.dtype.char not in "fd" or not array.dtype.isnative:
        wanted = "float32 or float64 in the machine's byte order"
        raise TypeError(f"{name} must have dtype {wanted}. Received: {array.dtype}")
    if array.shape != view.statistics:
        raise ValueError(f"{name} must have shape {view.statistics}, {view.meaning}. Received: {array.shape}")
    return array
