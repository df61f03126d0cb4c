"""How many threads the kernels use, the memory that outputs come from, and what this build is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _core

if TYPE_CHECKING:
    from ._core import BuildInfo, MemoryStatistics  # names of the stub alone

__all__ = [
    "build_info",
    "clear_memory",
    "get_num_threads",
    "memory_statistics",
    "set_memory_limit",
    "set_num_threads",
]


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


def clear_memory() -> None:
    """Give the memory kept for new outputs back to the system. Arrays that still exist are not touched."""
    _core.clear_memory()


def set_memory_limit(limit_bytes: int) -> None:
    """Keep at most `limit_bytes` of memory for new outputs once the arrays that had it are gone; 0 keeps none.

    What is kept above a lower limit goes back to the system at once, what was kept longest first. Arrays in use do not
    count, and no call fails for this limit. The default is a quarter of the memory that this process may use
    (physical, or its cgroup's limit), at least 512 MiB.

    Raises:
        TypeError: `limit_bytes` is not an integer.
        ValueError: `limit_bytes` is not in [0, 2**63).
    """
    if isinstance(limit_bytes, bool) or not hasattr(limit_bytes, "__index__"):
        raise TypeError(f"limit_bytes must be an integer. Received: {limit_bytes!r} ({type(limit_bytes).__name__})")
    limit_bytes = limit_bytes.__index__()
    if not 0 <= limit_bytes < 2**63:
        raise ValueError(f"limit_bytes must be in [0, 2**63). Received: {limit_bytes}")
    _core.set_memory_limit(limit_bytes)


def memory_statistics() -> MemoryStatistics:
    """The memory that outputs come from, since the process began.

    Keys: held_bytes (kept for new outputs), limit_bytes (the most that is kept), in_use_bytes (of arrays that exist),
    reused and fresh (how many outputs took memory that was kept, and how many new memory).
    """
    return _core.build_info()["memory"]


def build_info() -> BuildInfo:
    """What is running: version, instruction set and why, threads, cache sizes, compiler, flags.

    Keys: version, isa, isa_reason, isas (those this CPU runs), threads, default_threads, threads_reason, l1d_bytes,
    l2_bytes, l3_bytes (of the last-level cache what is counted on: at most 4 MiB a processor or 32 MiB, the larger),
    compiler, flags, openmp, memory (the pool that outputs come from).
    """
    return _core.build_info()
