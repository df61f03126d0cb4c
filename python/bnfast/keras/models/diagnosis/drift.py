"""How far training moves what a batch norm sees: the size of its steps, beside the distance of its statistics."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from ....diagnosis.figures import ModelFigures, between
from ....functional.moments import Moments
from .probe import BATCH, Probe, Tap
from .source import Data


def drift(model: Any, figures: ModelFigures, kept: list[Data]) -> None:
    """How far single training steps move each batch norm's statistics, on the model given, which is trained by this."""
    names = {row.name: row for row in figures.layers}
    steps: dict[str, list[float]] = {}
    for data in kept[:2]:
        before = _moments_of(model, data)
        model.train_on_batch(data.inputs, data.targets, sample_weight=data.weights)
        after = _moments_of(model, data)
        for name, (old, epsilon) in before.items():
            if name in after:
                steps.setdefault(name, []).append(between(after[name][0], old, epsilon))
    for name, moved in steps.items():
        if name in names:
            names[name].step = float(np.mean(moved))


def _moments_of(model: Any, data: Data) -> dict[str, tuple[tuple[Any, Any], float]]:
    found: dict[str, tuple[tuple[Any, Any], float]] = {}
    with Probe(model) as probe:

        def observe(tap: Tap, site: int, x: Any, weights: Any, seen: Moments) -> None:
            pair = seen.mean.ravel(), seen.variance.ravel()
            found[tap.name] = pair, float(keras.ops.convert_to_numpy(tap.layer.epsilon))

        probe.observe = observe
        for tap in probe.taps:
            tap.statistics = BATCH
        probe.run(data.inputs)
    return found
