"""What a batch norm's own weights say: whether they are finite, were trained, and where they started."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from .probe import value


def starting_statistics(layer: Any, channels: int) -> tuple[Any, Any] | None:
    """The starting values of the moving statistics, if they are always the same."""
    mean, variance = layer.moving_mean_initializer, layer.moving_variance_initializer
    kinds = (keras.initializers.Zeros, keras.initializers.Ones, keras.initializers.Constant)
    if not isinstance(mean, kinds) or not isinstance(variance, kinds):
        return None
    try:
        return tuple(np.asarray(one((channels,), dtype="float32"), np.float64) for one in (mean, variance))  # type: ignore[return-value]
    except Exception:  # Constant of an array of another shape
        return None


def has_trained(layer: Any) -> bool | None:
    """Whether gamma or beta differ from their starting values; None if that can't be known."""
    known = None
    for name in ("gamma", "beta"):
        weight = getattr(layer, name, None)
        initializer = getattr(layer, f"{name}_initializer", None)
        if weight is None or not isinstance(initializer, (keras.initializers.Zeros, keras.initializers.Ones)):
            continue
        start = 1.0 if isinstance(initializer, keras.initializers.Ones) else 0.0
        known = bool(known) or bool((value(weight).astype(np.float64) != start).any())
    return known


def is_broken(variable: Any) -> bool:
    """Whether a variable of numbers holds NaN or Inf."""
    array = value(variable)
    return array.dtype.kind not in "iubSOU" and not np.isfinite(array.astype(np.float64)).all()


def broken_weights(layer: Any) -> tuple[str, ...]:
    """The weights that hold NaN, Inf, or a negative variance."""
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    bad = [name for name in names if getattr(layer, name, None) is not None and is_broken(getattr(layer, name))]
    if "moving_variance" not in bad and (value(layer.moving_variance).astype(np.float64) < 0).any():
        bad.append("moving_variance")
    return tuple(bad)
