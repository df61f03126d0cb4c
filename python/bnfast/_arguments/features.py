"""Checks of what a layer adds to plain batch norm, on every backend of Keras: ghosts, renorm, adjustment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import checks

__all__ = ["GROUPINGS", "RENORM_BOUNDS", "RENORM_NAMES", "check_adjustment", "check_ghosts", "check_renorm"]

GROUPINGS = ("contiguous", "strided")  # of ghost batches
RENORM_NAMES = ("moving_stddev", "renorm_mean", "renorm_stddev")  # the weights besides moving_mean and moving_variance
RENORM_BOUNDS = ("rmin", "rmax", "dmax")


def check_ghosts(size: Any, renorm: bool) -> None:
    """Raises the errors of virtual_batch_size."""
    if checks.integer("virtual_batch_size", size) < 1:
        raise ValueError(f"virtual_batch_size must be at least 1. Received: {size}")
    if renorm:
        raise ValueError(f"virtual_batch_size must be None where renorm=True. Received: {size}")


def check_adjustment(adjustment: Any, virtual_batch_size: Any) -> None:
    """Raises the errors of adjustment."""
    if adjustment is not None and not callable(adjustment):
        raise TypeError(f"adjustment must be None or a function of the shape. Received: {adjustment!r}")
    if adjustment is not None and virtual_batch_size is not None:
        raise ValueError(f"adjustment must be None with virtual_batch_size. Received: {virtual_batch_size=}")


def check_renorm(clipping: Any, momentum: Any, wanted: str, is_variable: Callable[[Any], bool | None]) -> None:
    """Raises the errors that Keras doesn't raise, or raises without the name of the argument.

    Args:
        wanted: what a bound may be, in words.
        is_variable: whether a bound is a variable of the framework's; None if it is one that can't be a bound.
    """
    if clipping is not None and not isinstance(clipping, Mapping):
        raise TypeError(f"renorm_clipping must be a dict of rmin, rmax, dmax. Received: {clipping!r}")
    for name in RENORM_BOUNDS:
        bound: Any = (clipping or {}).get(name)
        variable = bound is None or is_variable(bound)
        if variable:
            continue
        if variable is None or isinstance(bound, bool) or not hasattr(bound, "__float__"):
            raise TypeError(f"renorm_clipping[{name!r}] must be {wanted}. Received: {bound!r}")
        if not float(bound) >= 0:
            raise ValueError(f"dmax should be non-negative, and rmin and rmax too. Received: {name}={bound}")
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum <= 1:
        raise ValueError(f"renorm_momentum must be in [0, 1]. Received: {momentum!r}")
