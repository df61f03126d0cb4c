"""Settings of the process: the thread count, the memory pool of the outputs, and information about this build."""

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
    """The largest number of threads that one call may use. Small tensors always use one.

    Returns:
        An int: the number given to `set_num_threads`, else the default, min(CPU affinity, cgroup quota).

    Example:
        >>> import bnfast
        >>> bnfast.get_num_threads() >= 1
        True
    """
    return _core.get_num_threads()


def set_num_threads(n: int | None) -> None:
    """Let one call use up to `n` threads.

    A number above the number of cores is accepted too. Results do not depend on the thread count.

    Args:
        n: an integer in [1, 4096], or None for the default, min(CPU affinity, cgroup quota).

    Raises:
        TypeError: `n` is not an integer or None.
        ValueError: `n` is not in [1, 4096].

    Example:
        >>> import bnfast
        >>> bnfast.set_num_threads(2)
        >>> bnfast.get_num_threads()
        2
        >>> bnfast.set_num_threads(None)  # back to the default
    """
    if n is not None:
        if isinstance(n, bool) or not hasattr(n, "__index__"):
            raise TypeError(f"n must be an integer or None. Received: {n!r} ({type(n).__name__})")
        n = n.__index__()
        if not 1 <= n <= 4096:  # a larger number is a mistake
            raise ValueError(f"n must be in [1, 4096]. Received: {n}")
    _core.set_num_threads(n)


def clear_memory() -> None:
    """Return the memory that is kept for new outputs to the system. Arrays that still exist are not affected.

    Example:
        >>> import bnfast
        >>> bnfast.clear_memory()
        >>> bnfast.memory_statistics()["held_bytes"]
        0
    """
    _core.clear_memory()


def set_memory_limit(limit_bytes: int) -> None:
    """Limit the memory that is kept for new outputs after the arrays that used it are deleted.

    If more than the new limit is kept, the excess is returned to the system at once, the oldest memory first. Arrays in
    use do not count, and no call fails because of this limit. The default is a quarter of the memory that this process
    may use (physical, or its cgroup's limit), at least 512 MiB.

    Args:
        limit_bytes: an integer in [0, 2**63); 0 keeps nothing.

    Raises:
        TypeError: `limit_bytes` is not an integer.
        ValueError: `limit_bytes` is not in [0, 2**63).

    Example:
        >>> import bnfast
        >>> before = bnfast.memory_statistics()["limit_bytes"]
        >>> bnfast.set_memory_limit(64 << 20)
        >>> bnfast.memory_statistics()["limit_bytes"]
        67108864
        >>> bnfast.set_memory_limit(before)
    """
    if isinstance(limit_bytes, bool) or not hasattr(limit_bytes, "__index__"):
        raise TypeError(f"limit_bytes must be an integer. Received: {limit_bytes!r} ({type(limit_bytes).__name__})")
    limit_bytes = limit_bytes.__index__()
    if not 0 <= limit_bytes < 2**63:
        raise ValueError(f"limit_bytes must be in [0, 2**63). Received: {limit_bytes}")
    _core.set_memory_limit(limit_bytes)


def memory_statistics() -> MemoryStatistics:
    """State of the memory pool that outputs are allocated from.

    Returns:
        A dict of ints: held_bytes (kept for new outputs), limit_bytes (the limit on held_bytes), in_use_bytes (used by
        existing arrays), reused (number of outputs that took kept memory) and fresh (number of outputs that took new
        memory), the last two since the process started.

    Example:
        >>> import bnfast
        >>> sorted(bnfast.memory_statistics())
        ['fresh', 'held_bytes', 'in_use_bytes', 'limit_bytes', 'reused']
    """
    return _core.build_info()["memory"]


def build_info() -> BuildInfo:
    """What is running: version, instruction set and the reason for it, threads, cache sizes, compiler, flags.

    Returns:
        A dict with the keys version, isa, isa_reason, isas (the instruction sets that this CPU supports), threads,
        default_threads, threads_reason, l1d_bytes, l2_bytes, l3_bytes (the part of the last-level cache that the
        kernels plan with: at most the larger of 32 MiB and 4 MiB per processor), compiler, flags, threading
        (who makes the threads: "own threads", or "OpenMP" and its version), and memory (see `memory_statistics`).

    Example:
        >>> import bnfast
        >>> info = bnfast.build_info()
        >>> info["isa"] in info["isas"]
        True
    """
    return _core.build_info()
