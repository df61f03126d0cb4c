"""Checks and times all variants of a model in one process.

Check: the predictions of each variant that must agree are compared with those of Keras's model before anything is
timed; the loss of the first training step is compared too, but only reported. Timing: each round runs one
train_on_batch and one predict_on_batch of every variant, in a different order. Both calls take tensors that were
created once, and end with the result in NumPy. Figures are medians over rounds, of times and of ratios to Keras's
model within a round.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from bnfast.benchmark import models, timing
from bnfast.benchmark.models import BASE, MUST_AGREE, TITLES, TRAINABLE, Spec
from bnfast.benchmark.peers.base import Unsupported
from bnfast.benchmark.timing import Measurement

# Allowed difference of predictions, relative to the largest one. Rounding gives up to 2e-6; a wrong epsilon in one
# layer gives 1e-4 or more (models.calibrate).
PREDICTION_TOLERANCE = 1e-5
WARM_UP_CALLS = 2  # untimed, after the first training step, which traces the graph
Announce = Callable[[str], object]  # is given a line of text before each stage of the work


class Disagreement(Exception):
    """The predictions of a variant differ from those of Keras's model; the message says which and by how much."""


@dataclass
class Variant:
    """A variant of the model, and its distance from Keras's model as found by `check`."""

    name: str
    model: Any
    batch_norms: dict[str, int]  # how many there are of each class
    predictions: float = 0.0  # the largest difference, relative to the largest prediction
    loss: float | None = None  # relative difference of the first training loss; None: not trained, or random


@dataclass
class ModelResult:
    """The variants, their measurements, and the reason for each variant that is missing."""

    variants: list[Variant]
    measurements: list[Measurement] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def find(self, name: str, mode: str) -> Measurement | None:
        """The measurement of that variant in mode "train" or "predict", if there is one."""
        return next((found for found in self.measurements if (found.peer, found.mode) == (name, mode)), None)


def measure(spec: Spec, names: list[str], rounds: int, announce: Announce) -> ModelResult:
    """Build, check and time the variants. Raises Disagreement, before timing, if a variant predicts something else."""
    announce("Keras's model")
    base = models.build_model(spec)
    x, y = models.make_data(spec, base)
    models.calibrate(base, x)
    result = ModelResult([])
    for name in sorted(names, key=lambda name: name == BASE):  # the base last: the others clone it uncompiled
        announce(f"building: {TITLES[name]}")
        try:
            model = models.make_variant(name, base)
        except Unsupported as reason:
            result.left_out[name] = str(reason)
        else:
            result.variants.append(Variant(name, model, _count_batch_norms(model)))
    result.variants.sort(key=lambda variant: names.index(variant.name))
    check(result.variants, x, y, announce)
    result.measurements = _measurements(result.variants, x, y)
    _warm_up(result.measurements, announce)
    _run_rounds(result.measurements, rounds, announce)
    return result


def num_stages(names: list[str], rounds: int) -> int:
    """How many times measure() calls `announce` if no variant is left out."""
    trained = sum(name in TRAINABLE for name in names)
    return 1 + 2 * len(names) + 2 * trained + rounds


def check(variants: list[Variant], x: Any, y: Any, announce: Announce = lambda line: None) -> None:
    """Compare each variant with the first one, Keras's model, and store the differences in the variant.

    Raises Disagreement if predictions that must agree do not. The training loss is no condition: with, say, two values
    per channel, rounding alone decides the sign of what batch norm returns.
    """
    _check_predictions(variants, x, announce)
    # Dropout and its like draw different random numbers in each variant.
    random = any(getattr(layer, "seed_generator", None) is not None for layer in variants[0].model.layers)
    base_loss: float | None = None
    for variant in variants:
        if variant.name not in TRAINABLE:
            continue
        announce(f"first training step: {TITLES[variant.name]}")
        loss = float(np.asarray(variant.model.train_on_batch(x, y)))
        base_loss = loss if base_loss is None else base_loss
        variant.loss = None if random else abs(loss - base_loss) / abs(base_loss)


def _check_predictions(variants: list[Variant], x: Any, announce: Announce) -> None:
    expected = _predict(variants[0], x, announce)
    for variant in variants[1:]:
        found = _predict(variant, x, announce)
        variant.predictions = float(np.abs(found - expected).max() / np.abs(expected).max())
        if variant.name in MUST_AGREE and not variant.predictions <= PREDICTION_TOLERANCE:
            raise Disagreement(
                f"{TITLES[variant.name]}: predictions differ from Keras's by {variant.predictions:.2g} of the largest "
                f"prediction; {PREDICTION_TOLERANCE:g} is allowed. Nothing was timed"
            )


def _predict(variant: Variant, x: Any, announce: Announce) -> Any:
    announce(f"comparing predictions: {TITLES[variant.name]}")
    return np.asarray(variant.model.predict_on_batch(x), dtype=np.float64)


def _count_batch_norms(model: Any) -> dict[str, int]:
    """The number of batch norms per class, such as {"keras.BatchNormalization": 52}.

    A name is the package and the class; for the classes of this benchmark it is the class alone.
    """
    counts: dict[str, int] = {}
    for layer in models.batch_norms(model):
        kind = type(layer)
        package = "" if kind.__module__.startswith("bnfast.benchmark") else kind.__module__.split(".")[0] + "."
        name = package + kind.__name__
        counts[name] = counts.get(name, 0) + 1
    return counts


def _measurements(variants: list[Variant], x: Any, y: Any) -> list[Measurement]:
    measurements = []
    for variant in variants:
        if variant.name in TRAINABLE:
            measurements.append(Measurement(variant.name, "train", partial(variant.model.train_on_batch, x, y)))
        measurements.append(Measurement(variant.name, "predict", partial(variant.model.predict_on_batch, x)))
    return measurements


def _warm_up(measurements: list[Measurement], announce: Announce) -> None:
    for measurement in measurements:
        if measurement.mode == "train":
            announce(f"warming up: {TITLES[measurement.peer]}")
        for _ in range(WARM_UP_CALLS):
            measurement.call()


def _run_rounds(measurements: list[Measurement], rounds: int, announce: Announce) -> None:
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            announce(f"round {turn + 1} of {rounds}")
            for measurement in timing.order(measurements, turn):
                timing.wait_for_idle_threads()
                measurement.seconds.append(measurement.time_piece(cached=False))
    finally:
        gc.enable()
