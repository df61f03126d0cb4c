"""Interleaved rounds: each round times every way to do the case once, in an order that changes from round to round.

A way is a peer and what becomes of its outputs:
    fresh   a new output, dropped at once       held    a new output, the last three results kept alive
    reused  written into the same output        warm    as fresh, with malloc keeping what is freed (allocator.py)
One timed piece: wait until the threads of other peers no longer spin; one untimed call, where caches or a warm malloc
would otherwise hold another's data; then one call, or as many as take about 2 ms, at most 200, and their mean.
Figures are medians over rounds: of times, and of ratios within one round, which noise that lasts longer than a round
does not reach.
"""

from __future__ import annotations

import gc
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnfast.benchmark import allocator
from bnfast.benchmark.agreement import worst_error
from bnfast.benchmark.cases import Arrays, Case
from bnfast.benchmark.peers import Peer, Unsupported

MODES = ("fresh", "held", "reused", "warm")
PIECE = 2e-3  # seconds of calls in one timed piece
MOST_CALLS = 200
ROUNDS = (5, 15)  # fewest and most, where the number is chosen by time
CASE_SECONDS = 2.0  # what rounds of one case may take beyond the fewest
CACHED_BYTES = 64 << 20  # a larger tensor is in no cache, whoever ran before
TASKS = Path("/proc/self/task")  # the threads of this process


@dataclass
class Way:
    """A peer in one mode, with what was measured."""

    peer: str
    mode: str
    call: Callable[[], Any]
    calls: int = 1  # in one timed piece
    seconds: list[float] = field(default_factory=list)
    last: deque[Any] = field(default_factory=lambda: deque(maxlen=3))

    def time(self, lead: bool) -> float:
        """Seconds of a call, as the mean of one piece. Without `lead` nothing is kept alive between pieces."""
        call, keep = self.call, self.last.append if self.mode == "held" else _drop
        with allocator.warm() if self.mode == "warm" else nullcontext():
            leads = 3 if self.mode == "held" and not lead else int(lead or self.mode == "warm")
            for _ in range(leads):
                keep(call())
            repeats = range(self.calls)
            if self.mode == "held":
                begin = time.perf_counter()
                for _ in repeats:
                    keep(call())
            else:
                begin = time.perf_counter()
                for _ in repeats:
                    call()
            seconds = (time.perf_counter() - begin) / self.calls
        if not lead:  # three results of 100 MB for each of eight peers would be 2.4 GB
            self.last.clear()
        return seconds


@dataclass
class Measured:
    """A case with the ways it was done, and why some peers are not among them."""

    case: Case
    ways: list[Way]
    left_out: dict[str, str]

    def find(self, peer: str, mode: str) -> Way | None:
        """That way, if it was measured."""
        return next((way for way in self.ways if (way.peer, way.mode) == (peer, mode)), None)


def measure(case: Case, arrays: Arrays, peers: Iterable[Peer], modes: Iterable[str], rounds: int | None) -> Measured:
    """Check every peer's result, then time all of them in turn; `rounds` None: chosen by how long one takes."""
    ways, left_out = prepare(case, arrays, peers, set(modes))
    lead = case.nbytes <= CACHED_BYTES
    for way in ways:
        once = min(_timed(way.call), _timed(way.call))
        way.calls = max(1, min(MOST_CALLS, int(PIECE / max(once, 1e-9))))
    gc.collect()
    gc.disable()
    try:
        begin, done = time.perf_counter(), 0
        while done < (rounds or _enough(done, time.perf_counter() - begin)):
            for way in order(ways, done):
                settle()
                way.seconds.append(way.time(lead))
            done += 1
    finally:
        gc.enable()
    for way in ways:
        way.last.clear()
    return Measured(case, ways, left_out)


def prepare(case: Case, arrays: Arrays, peers: Iterable[Peer], modes: set[str]) -> tuple[list[Way], dict[str, str]]:
    """The ways to do the case, and by peer the reason why it has none. RuntimeError where bnfast itself is wrong."""
    ways: list[Way] = []
    left_out: dict[str, str] = {}
    for peer in peers:
        try:
            calls = peer.prepare(case, arrays)
            error = worst_error(case, arrays, calls.read(calls.fresh())) if peer.name != "copy" else 0.0
            if calls.reused is not None:
                calls.reused()
        except Unsupported as reason:
            left_out[peer.name] = str(reason)
            continue
        except Exception as error_raised:  # a peer's own failure is a finding, not the end of the run
            if peer.name in ("copy", "bnfast"):
                raise
            left_out[peer.name] = " ".join(f"{type(error_raised).__name__}: {error_raised}".split())[:160]
            continue
        if error > 1:
            left_out[peer.name] = f"wrong result: {error:.3g} times the tolerance"
            if peer.name == "bnfast":
                raise RuntimeError(f"bnfast is wrong at {case}: {error:.3g} times the tolerance")
            continue
        if peer.name == "copy":
            assert calls.reused is not None
            ways.append(Way("copy", "reused", calls.reused))
            continue
        offered = {"fresh": calls.fresh, "held": calls.fresh, "reused": calls.reused}
        offered["warm"] = calls.fresh if peer.mallocs and allocator.available() else None
        ways += [Way(peer.name, mode, call) for mode, call in offered.items() if mode in modes and call is not None]
    return ways, left_out


def order(ways: list[Way], turn: int) -> list[Way]:
    """`ways` rotated by a step that differs from turn to turn, every other time backwards."""
    start = turn * (len(ways) // 2 + 1) % len(ways) if ways else 0
    turned = ways[start:] + ways[:start]
    return turned[::-1] if turn % 2 else turned


def settle(longest: float = 0.05) -> None:
    """Wait until no other thread of this process runs: an OpenMP worker spins for up to 10 ms after its last region."""
    end = time.perf_counter() + longest
    while _others_run() and time.perf_counter() < end:
        time.sleep(0.0005)


def _others_run() -> bool:
    """Whether Linux has another thread of this process running or ready to. Elsewhere 10 ms have to be enough.

    Not by the processor time that they took: it is brought up to date every 4 ms, and seemed to stand still meanwhile.
    """
    if not TASKS.exists():
        time.sleep(0.01)
        return False
    states = []
    for task in TASKS.iterdir():
        with suppress(OSError):  # it has ended meanwhile
            if task.name != str(threading.get_native_id()):
                states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
    return "R" in states


def median(values: Iterable[float]) -> float:
    """NaN for no values."""
    values = list(values)
    return statistics.median(values) if values else math.nan


def ratio(way: Way, base: Way, factor: float = 1.0) -> float:
    """The median over rounds of way's time over base's, times `factor`."""
    return factor * median(a / b for a, b in zip(way.seconds, base.seconds, strict=True))


def _enough(done: int, seconds: float) -> int:
    fewest, most = ROUNDS
    return most if done < fewest or seconds < CASE_SECONDS else done


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _drop(_: object) -> None:
    return None
