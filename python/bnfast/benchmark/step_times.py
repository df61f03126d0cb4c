"""What jax_models and torch_models share: steps of one model in variants, timed in turns.

Each round times one step of every variant in a rotated order. Figures are medians over rounds, of times and of ratios
to the framework's own batch norm within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

LOSS_TOLERANCE = 1e-3  # of the first step; float32 rounding gives some 1e-5


class Disagreement(Exception):
    """The first step with bnfast differs from that with the framework's batch norm."""


def in_turns(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each step in each round."""
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    variants = [*steps]
    for i in range(rounds):
        first = i % len(variants)
        for variant in (*variants[first:], *variants[:first]):
            begin = time.perf_counter()
            steps[variant]()
            seconds[variant].append(time.perf_counter() - begin)
    return seconds


def rows(model: str, seconds: dict[str, list[float]], **more: Any) -> list[dict[str, Any]]:
    """A row per variant: median and quartiles of its seconds, the median ratio to the first variant's, all seconds."""
    base = next(iter(seconds.values()))
    found = []
    for variant, own in seconds.items():
        quartiles = statistics.quantiles(own, n=4) if len(own) > 1 else [own[0]] * 3
        found.append(
            {
                "model": model,
                **more,
                "variant": variant,
                "seconds": round(statistics.median(own), 4),
                "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
                "ratio": round(statistics.median(a / b for a, b in zip(own, base, strict=True)), 3),
                "rounds": [round(one, 4) for one in own],
            }
        )
    return found


def parse(program: str, models: Iterable[str], arguments: list[str] | None) -> argparse.Namespace:
    """The command line: models, --batch, --size, --rounds."""
    parser = argparse.ArgumentParser(prog=f"python -m bnfast.benchmark.{program}")
    parser.add_argument("models", nargs="*", choices=models, default=[*models])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args(arguments)
