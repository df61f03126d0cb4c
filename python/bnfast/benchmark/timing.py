"""Times the peers of one case in interleaved rounds: each round measures every peer once, in a different order.

A measurement is one peer in one output mode (MODES):
    fresh   a new output per call, dropped at once    held   a new output per call, the last three kept alive
    reused  the same output on every call             warm   as fresh, while malloc keeps freed memory (allocator.py)
One timed piece: wait until no thread of another peer spins; make an untimed call if the caches or a warm malloc might
hold another peer's data; then time one call, or the mean of as many calls as take about 2 ms (at most 200). Results
are medians over rounds, of times and of ratios within a round. Noise that lasts longer than a round affects both sides
of a ratio and cancels.
"""

from __future__ import annotations

import gc
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bnfast
from bnfast.benchmark import allocator
from bnfast.benchmark.cases import Arrays, Case
from bnfast.benchmark.correctness import error_over_tolerance
from bnfast.benchmark.peers import BASELINES, Calls, Peer, Unsupported

# The output modes: the name in options and in JSON, and the title in tables.
MODES = {
    "fresh": "dropped each call",
    "held": "last three alive",
    "reused": "reused (out=)",
    "warm": "warm malloc",
}
PIECE_SECONDS = 2e-3  # the calls of one timed piece take about this long
MAX_CALLS = 200  # per piece
MIN_ROUNDS, MAX_ROUNDS = 5, 15  # if the number of rounds is not given
ROUNDS_SECONDS = 2.0  # after this time no round beyond MIN_ROUNDS starts
CACHED_BYTES = 64 << 20  # a larger tensor is in no cache, so no untimed call is needed
TASKS = Path("/proc/self/task")  # the threads of this process


class WrongResult(Exception):
    """A peer's result differs from the float64 one by more than the tolerance."""


@dataclass
class Measurement:
    """One peer in one mode, and its times: the seconds per call of each round."""

    peer: str
    mode: str
    call: Callable[[], Any]
    calls: int = 1  # per timed piece
    seconds: list[float] = field(default_factory=list)
    kept: deque[Any] = field(default_factory=lambda: deque(maxlen=3))  # the outputs that "held" keeps alive

    def time_piece(self, cached: bool) -> float:
        """Seconds per call, the mean of one piece. `cached` says whether the tensor may fit into a cache.

        If not, "held" drops its outputs after each piece: three results of 100 MB for each of eight peers are 2.4 GB.
        """
        with allocator.warm() if self.mode == "warm" else nullcontext():
            for _ in range(self._untimed_calls(cached)):
                self._keep(self.call())
            seconds = self._time_calls() / self.calls
        if not cached:
            self.kept.clear()
        return seconds

    def _untimed_calls(self, cached: bool) -> int:
        if self.mode == "held" and not cached:
            return 3  # fills `kept`
        return 1 if cached or self.mode == "warm" else 0

    def _time_calls(self) -> float:
        call, keep, repeats = self.call, self.kept.append, range(self.calls)
        begin = time.perf_counter()
        if self.mode == "held":
            for _ in repeats:
                keep(call())
        else:
            for _ in repeats:
                call()
        return time.perf_counter() - begin

    def _keep(self, output: Any) -> None:
        if self.mode == "held":
            self.kept.append(output)


@dataclass
class CaseResult:
    """All measurements of a case, and the reason for each peer that has none."""

    case: Case
    measurements: list[Measurement]
    left_out: dict[str, str]

    def find(self, peer: str, mode: str) -> Measurement | None:
        """The measurement of that peer in that mode, if there is one."""
        return next((found for found in self.measurements if (found.peer, found.mode) == (peer, mode)), None)


def measure(case: Case, arrays: Arrays, peers: Iterable[Peer], modes: Iterable[str], rounds: int | None) -> CaseResult:
    """Check every peer's result, then time all peers. If `rounds` is None, the time per round decides how many."""
    measurements, left_out = prepare(case, arrays, peers, set(modes))
    cached = case.nbytes <= CACHED_BYTES
    for measurement in measurements:
        once = min(_time_once(measurement.call), _time_once(measurement.call))
        measurement.calls = max(1, min(MAX_CALLS, int(PIECE_SECONDS / max(once, 1e-9))))
    gc.collect()
    gc.disable()
    try:
        begin, done = time.perf_counter(), 0
        while _another_round(done, time.perf_counter() - begin, rounds):
            for measurement in order(measurements, done):
                wait_for_idle_threads()
                measurement.seconds.append(measurement.time_piece(cached))
            done += 1
    finally:
        gc.enable()
    for measurement in measurements:
        measurement.kept.clear()
    return CaseResult(case, measurements, left_out)


def prepare(
    case: Case, arrays: Arrays, peers: Iterable[Peer], modes: set[str]
) -> tuple[list[Measurement], dict[str, str]]:
    """The measurements to make, and the reason for each peer that has none. Raises if bnfast or the copy fails."""
    measurements: list[Measurement] = []
    left_out: dict[str, str] = {}
    for peer in peers:
        try:
            calls = _checked_calls(peer, case, arrays)
        except Unsupported as reason:
            left_out[peer.name] = str(reason)
        except WrongResult as reason:
            if peer.name == "bnfast":
                raise RuntimeError(f"bnfast is wrong at {case}: {reason}") from reason
            left_out[peer.name] = str(reason)
        except Exception as error:  # the failure of another library is a result; the run goes on
            if peer.name in BASELINES:
                raise
            left_out[peer.name] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        else:
            measurements += _measurements(peer, calls, modes)
    return measurements, left_out


def _checked_calls(peer: Peer, case: Case, arrays: Arrays) -> Calls:
    calls = peer.prepare(case, arrays)
    if peer.name != "copy":
        error = error_over_tolerance(case, arrays, calls.read(calls.fresh()))
        if error > 1:
            raise WrongResult(f"wrong result: {error:.3g} times the tolerance")
    if calls.reused is not None:
        calls.reused()
    return calls


def _measurements(peer: Peer, calls: Calls, modes: set[str]) -> list[Measurement]:
    by_mode = {
        "fresh": calls.fresh,
        "held": calls.fresh,
        "reused": calls.reused,
        "warm": calls.fresh if peer.uses_malloc and allocator.available() else None,
    }
    if peer.name == "copy":  # always measured, and only in this mode: every case needs it
        by_mode, modes = {"reused": calls.reused}, {"reused"}
    return [Measurement(peer.name, mode, call) for mode, call in by_mode.items() if mode in modes and call is not None]


def order(measurements: list[Measurement], turn: int) -> list[Measurement]:
    """The list rotated by a different step in each turn; every second turn it is reversed."""
    start = turn * (len(measurements) // 2 + 1) % len(measurements) if measurements else 0
    rotated = measurements[start:] + measurements[:start]
    return rotated[::-1] if turn % 2 else rotated


def wait_for_idle_threads(longest: float = 0.05) -> None:
    """Wait until no other thread of this process runs: an OpenMP worker spins for up to 10 ms after its last region."""
    end = time.perf_counter() + longest
    while _other_threads_run() and time.perf_counter() < end:
        time.sleep(0.0005)


def _other_threads_run() -> bool:
    """Whether another thread of this process is running or ready to run (Linux). Elsewhere just sleep for 10 ms.

    The threads' CPU time would not do: Linux updates it only every 4 ms, so a spinning thread can seem to stand still.
    """
    if not TASKS.exists():
        time.sleep(0.01)
        return False
    states = []
    for task in TASKS.iterdir():
        with suppress(OSError):  # the thread has ended meanwhile
            if task.name != str(threading.get_native_id()):
                stat = (task / "stat").read_text(encoding="utf-8", errors="replace")  # names are any bytes
                states.append(stat.rpartition(")")[2].split()[0])
    return "R" in states


@contextmanager
def preserve_num_threads() -> Iterator[None]:
    """Restore bnfast's number of threads after the block; peers change it."""
    before, default = bnfast.get_num_threads(), bnfast.build_info()["default_threads"]
    try:
        yield
    finally:
        bnfast.set_num_threads(None if before == default else before)


def median(values: Iterable[float]) -> float:
    """The median; NaN if there are no values."""
    values = list(values)
    return statistics.median(values) if values else math.nan


def ratio(measurement: Measurement, base: Measurement, factor: float = 1.0) -> float:
    """The median over rounds of the ratio of the two times, multiplied by `factor`."""
    return factor * median(a / b for a, b in zip(measurement.seconds, base.seconds, strict=True))


def _another_round(done: int, seconds: float, rounds: int | None) -> bool:
    if rounds is not None:
        return done < rounds
    return done < MIN_ROUNDS or (done < MAX_ROUNDS and seconds < ROUNDS_SECONDS)


def _time_once(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
