"""How far one training is from another: of the losses, of the weights and of the moving statistics.

    distance(a, b) = |a - b|/|a|, over all values as one vector, in float64

0 if both are the same; infinite if values are finite in one alone, or one has other variables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnfast.cli.compare.trainings import FIRST, LAST, Training, Values, values

QUANTITIES = ("loss", "weights", "moving statistics")


@dataclass
class Distance:
    """Of one quantity, after the first step and after the last. None: there is no such quantity."""

    first: float | None
    last: float | None


def distances(own: tuple[Path, Training], other: tuple[Path, Training]) -> dict[str, Distance]:
    """By quantity. Both trainings took as many steps; else nothing can be compared, and all are infinite."""
    (folder, training), (there, theirs) = own, other
    found = {"loss": _of_losses(training.losses, theirs.losses)}
    for quantity, kind in (("weights", "weights"), ("moving statistics", "moving")):
        pair = [_of_values(values(folder, training, w, kind), values(there, theirs, w, kind)) for w in (FIRST, LAST)]
        found[quantity] = Distance(*pair)
    if training.steps != theirs.steps:
        found = {name: Distance(each.first, math.inf) for name, each in found.items()}
    return found


def _of_losses(a: Sequence[float], b: Sequence[float]) -> Distance:
    if not a or not b or math.isnan(a[0]):
        return Distance(None, None)
    return Distance(*(relative([a[i]], [b[i]]) for i in (0, -1)))


def _of_values(a: Values, b: Values) -> float | None:
    if not a and not b:
        return None
    if [array.shape for array in a.values()] != [array.shape for array in b.values()]:
        return math.inf
    flat = [np.concatenate([np.ravel(array).astype("float64") for array in each.values()]) for each in (a, b)]
    return relative(*flat)


def relative(a: Any, b: Any) -> float:
    """|a - b|/|a| over the entries that are finite in both. Infinite if others are."""
    a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return math.inf
    difference, size = float(np.linalg.norm(a[finite] - b[finite])), float(np.linalg.norm(a[finite]))
    if difference == 0:
        return 0.0
    return difference / size if size else math.inf
