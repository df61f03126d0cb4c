"""All variants of a model in one process: first their predictions are compared, then their steps timed in turn.

check    every variant that must agree predicts what Keras's model does; how far the first training loss is, is noted
measure  rounds: each times one train_on_batch and one predict_on_batch of every variant, in an order that changes
Both calls take tensors made once and end with the result in NumPy. Figures are medians over rounds: of times, and of
ratios to Keras's within a round.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from bnfast.benchmark import models, timing
from bnfast.benchmark.models import BASE, EXACT, TITLES, TRAINS, Spec
from bnfast.benchmark.peers.base import Unsupported

# Of the largest prediction. Rounding gives up to 2e-6, a wrong epsilon in one layer 1e-4 and more: models.calibrate.
PREDICTIONS = 1e-5
WARM_UP = 2  # untimed steps after that first one, which traces the graph
Tell = Callable[[str], object]


class Disagreement(Exception):
    """A variant computes something other than Keras's model; the message says which and by how much."""


@dataclass
class Variant:
    """A model that is timed, with what the check found: its distance from Keras's model."""

    name: str
    model: Any
    layers: dict[str, int]  # how many batch norms of each class it holds
    predictions: float = 0.0  # largest difference over the largest prediction
    loss: float | None = (
        None  # relative difference in the first training step; None: it doesn't train, or draws numbers
    )


@dataclass
class Measured:
    """The variants, their timed ways, and by name the reason why others are missing."""

    variants: list[Variant]
    ways: list[timing.Way] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def find(self, name: str, mode: str) -> timing.Way | None:
        """That variant's way, mode "train" or "predict", if it was measured."""
        return next((way for way in self.ways if (way.peer, way.mode) == (name, mode)), None)


def measure(spec: Spec, names: list[str], rounds: int, tell: Tell) -> Measured:
    """Build, check and time the variants; `tell` is given a line before each piece of work. Disagreement stops it."""
    tell("Keras's model")
    base = models.build(spec)
    x, y = models.data(spec, base)
    models.calibrate(base, x)
    found = Measured([])
    for name in sorted(names, key=lambda name: name == BASE):  # it is cloned by the others, so compiled last
        tell(f"building: {TITLES[name]}")
        try:
            made = models.make(name, base)
        except Unsupported as reason:
            found.left_out[name] = str(reason)
            continue
        found.variants.append(Variant(name, made, _classes(made)))
    found.variants.sort(key=lambda variant: names.index(variant.name))
    check(found.variants, x, y, tell)
    found.ways = _ways(found.variants, x, y)
    _warm_up(found.ways, tell)
    _rounds(found.ways, rounds, tell)
    return found


def tells(names: list[str], rounds: int) -> int:
    """How many times measure() calls `tell` where no variant is left out."""
    trained = sum(name in TRAINS for name in names)
    return 1 + 2 * len(names) + 2 * trained + rounds


def check(variants: list[Variant], x: Any, y: Any, tell: Tell = lambda line: None) -> None:
    """Compare every variant with the first, Keras's: predictions, which may stop it, then a training step's loss."""
    expected = _predict(variants[0], x, tell)
    for variant in variants[1:]:
        found = _predict(variant, x, tell)
        variant.predictions = float(np.abs(found - expected).max() / np.abs(expected).max())
        if variant.name in EXACT and not variant.predictions <= PREDICTIONS:
            raise Disagreement(
                f"{TITLES[variant.name]}: predictions differ from Keras's by {variant.predictions:.2g} of the largest, "
                f"and {PREDICTIONS:g} is allowed. Nothing was timed"
            )
    random = any(getattr(layer, "seed_generator", None) is not None for layer in variants[0].model.layers)
    losses = {}
    for variant in (variant for variant in variants if variant.name in TRAINS):
        tell(f"first training step: {TITLES[variant.name]}")
        losses[variant.name] = float(np.asarray(variant.model.train_on_batch(x, y)))
        # Not a condition: of two values a channel, say, rounding decides the sign of what batch norm returns.
        base = losses[variants[0].name]
        variant.loss = None if random else abs(losses[variant.name] - base) / abs(base)


def _predict(variant: Variant, x: Any, tell: Tell) -> Any:
    tell(f"comparing predictions: {TITLES[variant.name]}")
    return np.asarray(variant.model.predict_on_batch(x), dtype=np.float64)


def _classes(model: Any) -> dict[str, int]:
    """{"keras.BatchNormalization": 52}: the batch norms by package and class; by class those of this folder."""
    names = []
    for kind in map(type, models.batch_norms(model)):
        ours = kind.__module__.startswith("bnfast.benchmark")
        names.append(kind.__name__ if ours else f"{kind.__module__.split('.')[0]}.{kind.__name__}")
    return {name: names.count(name) for name in dict.fromkeys(names)}


def _ways(variants: list[Variant], x: Any, y: Any) -> list[timing.Way]:
    ways = []
    for variant in variants:
        if variant.name in TRAINS:
            ways.append(timing.Way(variant.name, "train", partial(variant.model.train_on_batch, x, y)))
        ways.append(timing.Way(variant.name, "predict", partial(variant.model.predict_on_batch, x)))
    return ways


def _warm_up(ways: list[timing.Way], tell: Tell) -> None:
    for way in ways:
        if way.mode == "train":
            tell(f"warming up: {TITLES[way.peer]}")
        for _ in range(WARM_UP):
            way.call()


def _rounds(ways: list[timing.Way], rounds: int, tell: Tell) -> None:
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            tell(f"round {turn + 1} of {rounds}")
            for way in timing.order(ways, turn):
                timing.settle()
                way.seconds.append(way.time(lead=False))
    finally:
        gc.enable()
