"""A ReLU between a batch norm and the layer that takes it in, as one limit per channel.

min(max(a*x + b, 0), most) = a*clip(x) + b, where clip is max(x, -b/a) for a > 0 and min(x, -b/a) for a < 0; both
for ReLU6
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from ..layers import activation as activations
from .foldable import Affine

UPPER_LIMIT: dict[str | None, float] = {"relu": np.inf, "relu6": 6.0}


def upper_limit(activation: Any, dtype: str) -> float | None:
    """The limit of a ReLU (infinity) or ReLU6, as a function, a layer or an operation; None for anything else."""
    match type(activation).__module__, type(activation).__name__:
        case "keras.src.ops.nn", name:
            return UPPER_LIMIT.get(name.lower())
        case "keras.src.activations.activations", "ReLU":
            words = activation.max_value, activation.negative_slope, activation.threshold
            activation = keras.layers.ReLU(*words, dtype=dtype)
    fused = activations.fuse(activation, dtype)
    return None if fused is None else UPPER_LIMIT.get(fused.activation)


def clip_of(
    affine: Affine, most: float, dtype: str, trailing: int, names: tuple[str, str]
) -> tuple[Callable[[Any], Any] | str, Affine]:
    """clip, a' and b' with min(max(a*x + b, 0), most) = a'*clip(x) + b'; or why there is no such clip.

    There is none if a zero would be off by more than 1e-5, because it becomes the difference of two numbers of the size
    of b; if a limit nearly overflows in dtype, because a then vanishes; or if every channel is constant.

    Args:
        trailing: the number of axes of x after its channel axis.
    """
    a, b = affine
    constant, precision = a == 0, np.finfo(dtype)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        zero, top = (np.where(constant, 0, (y - b) / a) for y in (0, most))
    largest = np.abs([zero, top] if most < np.inf else [zero]).max(initial=0)
    if np.abs(b).max(initial=0) > 2e-6 / float(precision.eps):
        return "its beta is too large to cancel exactly", affine
    if largest > float(precision.max) ** 0.8:
        return f"a limit of its ReLU nearly overflows {dtype}", affine
    low = np.where(constant, -np.inf, np.where(a > 0, zero, top)).astype(dtype).reshape(-1, *[1] * trailing)
    high = np.where(constant, np.inf, np.where(a > 0, top, zero)).astype(dtype).reshape(-1, *[1] * trailing)
    limits = [pair for pair in ((keras.ops.maximum, low), (keras.ops.minimum, high)) if np.isfinite(pair[1]).any()]
    bounds = [(op, np.clip(y, precision.min, precision.max)) for op, y in limits]  # JSON has no infinity
    if not bounds:
        return "all its channels are constant", affine

    def clip(x: Any) -> Any:
        for (op, limit), name in zip(bounds, names[-len(bounds) :], strict=True):
            x = op(x, limit)
            x._keras_history.operation.name = name  # the automatic name may be another operation's
        return x

    return clip, Affine(a, np.where(constant, np.clip(b, 0, most), b))
