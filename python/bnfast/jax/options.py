"""What a call computes, its arrays aside. Hashable: JAX compiles a function for each value."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Options"]


class Options(NamedTuple):
    """axis counts from the end, so that it means the same under jax.vmap. way: one of support.py's."""

    way: str
    axis: int
    epsilon: float = 1e-3
    activation: str | None = None
    negative_slope: float = 0.2
    momentum: float = 0.99
    correction: int = 0
    nan_policy: str = "propagate"
    training: bool = True
