"""How many threads the kernels use, and what this build is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _core

if TYPE_CHECKING:
    from ._core import BuildInfo  # a name of the stub alone

__all__ = ["build_info", "get_num_threads", "set_num_threads"]


def get_num_threads() -> int:
    """The most threads one call may use. Small tensors use one, whatever this says."""
    return _core.get_num_threads()


def set_num_threads(n: int | None) -> None:
    """Let one call use up to `n` threads; None goes back to the default, min(CPU affinity, cgroup quota).

    An explicit number is honoured as it is, also above the number of cores. Results do not depend on it.

    Raises:
        TypeError: `n` is not an integer or None.
        ValueError: `n` is not in [1, 4096].
    """
    if n is not None:
        if isinstance(n, bool) or not hasattr(n, "__index__"):
            raise TypeError(f"n must be an integer or None. Received: {n!r} ({type(n).__name__})")
        n = n.__index__()
        if not 1 <= n <= 4096:  # more is a slip, and a team of it would be tried
            raise ValueError(f"n must be in [1, 4096]. Received: {n}")
    _core.set_num_threads(n)


def build_info() -> BuildInfo:
    """What is running: version, instruction set and why, threads, cache sizes, compiler, flags.

    Keys: version, isa, isa_reason, isas (those this CPU runs), threads, default_threads, threads_reason, l1d_bytes,
    l2_bytes, l3_bytes, compiler, flags, openmp, memory (the pool that outputs come from).
    """
    return _core.build_info()
