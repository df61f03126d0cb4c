"""The longest products of cases run as a random sample; `--whole` runs all cases.

`@pytest.mark.sample(n)` on a parametrized test keeps n of its cases. In a product of several arguments the sample holds
every value of every argument, so it may be larger than n. Cases without the mark always run, unless `--few n` makes a
sample of n of every parametrized test. The seed is BNFAST_SEED, or else the abbreviated commit hash; pytest's header
prints it. The same seed chooses the same cases.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest


def seed() -> str:
    """BNFAST_SEED, or the first eight digits of the commit hash, or 0 in an unpacked sdist."""
    if given := os.environ.get("BNFAST_SEED"):
        return given
    command = ["git", "rev-parse", "--short=8", "HEAD"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "0"


def choose(cases: Sequence[Mapping[str, Any]], count: int, seed: str) -> set[int]:
    """The positions of `count` cases, or of more if every value of every argument needs them."""
    order = random.Random(seed).sample(range(len(cases)), len(cases))
    chosen: list[int] = []
    if len(cases[0]) > 1:
        seen: set[tuple[str, str]] = set()
        for position in order:
            values = {(name, repr(value)) for name, value in cases[position].items()}
            if not values <= seen:
                chosen.append(position)
                seen |= values
    rest = [position for position in order if position not in chosen]
    return {*chosen, *rest[: max(0, count - len(chosen))]}


def split(
    items: Sequence[pytest.Item], seed: str, few: int | None = None
) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """The items that run and the items that are left out, both in the given order."""
    products: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sample") or (few and hasattr(item, "callspec")):
            products.setdefault(item.nodeid.split("[")[0], []).append(item)
    out: set[pytest.Item] = set()
    for name, product in products.items():
        mark = product[0].get_closest_marker("sample")
        count = min(mark.args[0] if mark else len(product), few or len(product))
        kept = choose([item.callspec.params for item in product], count, f"{seed} {name}")  # type: ignore[attr-defined]
        out |= {item for position, item in enumerate(product) if position not in kept}
    return [item for item in items if item not in out], [item for item in items if item in out]
