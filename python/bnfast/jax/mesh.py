"""jax.shard_map: the types of operands and results over the axes of a mesh.

Inside jax.shard_map an array varies over axes of the mesh, or is the same on all of its devices. Operands of a call
must agree, and a result says over which it varies; each device then normalizes its part of the batch alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

__all__ = ["agree", "result_like"]

_WORDS = ("manual_axis_type", "vma")  # JAX 0.10; JAX 0.7


def _kind(array: Any) -> dict[str, Any]:
    """How the type of `array` says over which axes it varies; {} if over none, or before JAX had such types."""
    kind = jax.typeof(array) if hasattr(jax, "typeof") else None
    word = next((word for word in _WORDS if hasattr(kind, word)), None)
    return {word: getattr(kind, word)} if word and _axes({word: getattr(kind, word)}) else {}


def _axes(kind: Mapping[str, Any]) -> frozenset[str]:
    return frozenset().union(*(getattr(found, "varying", found) for found in kind.values()))


def agree(given: Mapping[str, Any]) -> dict[str, Any]:
    """The operands, all varying over the axes that one of them varies over. The gradient of one that didn't vary is the
    sum over the devices."""
    axes = {name: _axes(_kind(array)) for name, array in given.items()}
    every = frozenset().union(*axes.values())
    return {name: _vary(array, tuple(sorted(every - axes[name]))) for name, array in given.items()}


def _vary(array: Any, axes: tuple[str, ...]) -> Any:
    if not axes:
        return array
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, axes, to="varying")
    return jax.lax.pvary(array, axes)


def result_like(array: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The type of a result that varies as `array` does."""
    kind = _kind(array)
    if kind:
        replicated = jax.sharding.PartitionSpec(*[None] * len(shape))
        kind["sharding"] = jax.sharding.NamedSharding(jax.typeof(array).sharding.mesh, replicated)
    return jax.ShapeDtypeStruct(shape, dtype, **kind)
