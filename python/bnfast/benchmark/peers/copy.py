"""A copy of x into warm memory with np.copyto: the lower bound for an operation that reads and writes one tensor.

It runs on one thread or split over all threads, whichever is faster for the case. np.copyto calls libc's memcpy, which
uses cached stores for small blocks and non-temporal stores for large ones.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from time import perf_counter

import numpy as np

from bnfast.benchmark.cases import Arrays, Case
from bnfast.benchmark.peers.base import Calls, Peer


class Copy(Peer):
    """Reads and writes one tensor. Its result is not a batch norm, so it is not checked."""

    name = "copy"
    title = "copy"
    distribution = "numpy"

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pool = ThreadPoolExecutor(max(1, threads - 1))

    def version(self) -> str:
        return np.__version__

    def prepare(self, case: Case, arrays: Arrays) -> Calls:
        source, target = arrays.x.reshape(-1), np.ones_like(arrays.x).reshape(-1)
        bounds = [source.size * k // self.threads for k in range(self.threads + 1)]
        parts = [(target[begin:end], source[begin:end]) for begin, end in pairwise(bounds)]

        def whole() -> None:
            np.copyto(target, source)

        def split() -> None:
            futures = [self.pool.submit(np.copyto, *part) for part in parts[1:]]
            np.copyto(*parts[0])
            for future in futures:
                future.result()

        faster = min((whole, split), key=_best_of_5) if self.threads > 1 else whole
        return Calls(fresh=whole, read=lambda _: {}, reused=faster)


def _best_of_5(call: Callable[[], None]) -> float:
    times = []
    for _ in range(5):
        begin = perf_counter()
        call()
        times.append(perf_counter() - begin)
    return min(times)
