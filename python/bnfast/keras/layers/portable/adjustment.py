"""TF 1's `adjustment` as a transform: a scale and an offset of the normalized values, drawn in every training call.

    scale, bias = adjustment(shape)
    y = activation((xhat*scale + bias)*gamma + beta + residual)

Both may differ between samples, so this part runs on Keras's ops, in float32 (float64 for float64 x), after the core
step has computed xhat in the dtype of x: one more pass over memory per operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import ops

from ...._arguments.features import check_adjustment as check
from .axes import Axes
from .batch import Batch, compute_dtype, dtype_of
from .core import CoreStep, Finish, State
from .reference import activate, add_affine

__all__ = ["Adjustment", "check", "draw", "draw_merged", "transform"]

Adjustment = Callable[[Any], tuple[Any, Any]]


def draw(adjustment: Adjustment, x: Any) -> tuple[Any, ...]:
    """scale and bias, in the compute dtype of x.

    Raises:
        TypeError: the function doesn't return two tensors.
        ValueError: they don't broadcast to x.
    """
    pair = adjustment(tuple(x.shape))
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"adjustment must return (scale, bias). Received: {pair!r}")
    scale, bias = (ops.cast(ops.convert_to_tensor(tensor), compute_dtype(x)) for tensor in pair)
    for tensor in (scale, bias):
        extents = [1] * (len(x.shape) - len(tensor.shape)) + list(tensor.shape)
        if len(extents) > len(x.shape) or any(m not in (1, n) for m, n in zip(extents, x.shape, strict=True)):
            raise ValueError(
                f"adjustment must return tensors that broadcast to inputs of shape {tuple(x.shape)}. "
                f"Received: {tuple(tensor.shape)}"
            )
    return scale, bias


def draw_merged(adjustment: Adjustment, x: Any, axes: Axes) -> list[Any]:
    """`draw`, with the channel axes merged as those of x."""
    drawn = draw(adjustment, x)
    if len(axes.axes) == 1:
        return list(drawn)
    return [axes.merge(ops.broadcast_to(tensor, tuple(x.shape))) for tensor in drawn]


def transform(core: CoreStep, draw: Callable[[], Any]) -> tuple[CoreStep, Finish]:
    """xhat from the core step; the scale and offset, gamma, beta, residual and activation after it."""
    x, gamma, beta, mask, residual = core.batch
    options = core.options

    def finish(xhat: Any, state: State) -> tuple[Any, State]:
        scale, bias = draw()
        adjusted = ops.cast(xhat, dtype_of(scale)) * scale + bias
        y = activate(add_affine(adjusted, gamma, beta, residual, options.axis), options)
        return ops.cast(y, dtype_of(xhat)), state

    return core._replace(batch=Batch(x, mask=mask), options=options._replace(activation=None)), finish
