"""Figures -> verdicts: what is wrong, why we think so, and the cure. Pure functions; nothing here knows a framework.

Each rule looks for one cause. A cause that explains the gaps of a layer keeps later rules from explaining them again,
so the first verdict is the root.
"""

from __future__ import annotations

from collections.abc import Callable

from ..figures import ModelFigures
from .case import Case, Verdict
from .construction import always_training, momentum, never_trained, never_updated, not_finite, overflow, wrong_axis
from .data import constant_channels, mixed_batches, outlier, shared, shifted_data
from .history import drift, epsilon, frozen_other_data, small_batches, stale, too_few_updates

RULES: tuple[Callable[[Case], Verdict | None], ...] = (
    not_finite,
    overflow,
    wrong_axis,
    never_trained,
    never_updated,
    always_training,
    constant_channels,
    outlier,
    shared,
    mixed_batches,
    momentum,
    small_batches,
    too_few_updates,
    frozen_other_data,
    epsilon,
    drift,
    shifted_data,
    stale,
)

# Verdicts that explain gaps in every layer.
SETTLING = frozenset(
    {"not-finite", "overflow", "wrong-axis", "always-training", "outlier", "shared", "mixed-batches", "momentum"}
    | {"epsilon", "frozen-other-data"}
)


def judge(figures: ModelFigures) -> list[Verdict]:
    """All verdicts, the root cause first; empty for a healthy model."""
    case = Case(figures)
    found = []
    for rule in RULES:
        verdict = rule(case)
        if verdict is not None:
            found.append(verdict)
            if verdict.code in SETTLING:
                case.settled = True
            case.explained |= set(verdict.layers)
    return found
