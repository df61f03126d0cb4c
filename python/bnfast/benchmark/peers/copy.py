"""The yardstick: np.copyto into warm memory, on one thread or split over all, the faster of the two in each case.

libc's memcpy, which copyto ends in, uses cached stores for small pieces and non-temporal ones for large.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from time import perf_counter

import numpy as np

from bnfast._arguments.arrays import Array
from bnfast.benchmark.cases import Arrays, Case
from bnfast.benchmark.peers.base import Calls, Peer


class Copy(Peer):
    """Reads and writes one tensor. Its result is no batch norm and isn't checked."""

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
        parts = [(target[a:b], source[a:b]) for a, b in pairwise(bounds)]

        def whole() -> None:
            np.copyto(target, source)

        def split() -> None:
            waiting = [self.pool.submit(np.copyto, *part) for part in parts[1:]]
            np.copyto(*parts[0])
            for future in waiting:
                future.result()

        faster = min((whole, split), key=_best_of_5) if self.threads > 1 else whole
        return Calls(fresh=whole, read=_nothing, reused=faster)


def _best_of_5(call: object) -> float:
    assert callable(call)
    times = []
    for _ in range(5):
        begin = perf_counter()
        call()
        times.append(perf_counter() - begin)
    return min(times)


def _nothing(_: object) -> dict[str, Array]:
    return {}
