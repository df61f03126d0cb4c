"""Checks and times all variants of a model in one process.

Check: the predictions of each variant that must agree are compared with those of its base before anything is
timed; the loss of the first training step is compared too, but only reported. Timing: each round runs one
train_on_batch and one predict_on_batch of every variant, in a different order. Both calls take tensors that were
created once, and end with the result in NumPy. Figures are medians over rounds, of times and of ratios within a round
to the variant's base, the model with the framework's own batch norm.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from bnfast.benchmark import timing
from bnfast.benchmark.models import KERAS, Framework, Spec
from bnfast.benchmark.peers.base import Unsupported
from bnfast.benchmark.timing import Measurement

# Allowed difference of predictions, relative to the largest one. Rounding gives up to 2e-6; a wrong epsilon in one
# layer gives 1e-4 or more (keras_models.calibrate).
PREDICTION_TOLERANCE = 1e-5
WARM_UP_CALLS = 2  # untimed, after the first training step, which traces the graph
Announce = Callable[[str], object]  # is given a line of text before each stage of the work


class Disagreement(Exception):
    """The predictions of a variant differ from those of its base; the message says which and by how much."""


@dataclass
class Variant:
    """A variant of the model, and its distance from its base as found by `check`."""

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
    framework = spec.framework
    module = framework.load()
    announce(f"{framework.title}'s model")
    base = module.build_model(spec)
    x, y = module.make_data(spec, base)
    module.calibrate(base, x)
    result = ModelResult([])
    for name in sorted(names, key=framework.is_base):  # the base last: the others clone it uncompiled
        announce(f"building: {framework.titles[name]}")
        try:
            model = module.make_variant(name, base)
        except Unsupported as reason:
            result.left_out[name] = str(reason)
        else:
            result.variants.append(Variant(name, model, module.count_batch_norms(model)))
    result.variants.sort(key=lambda variant: names.index(variant.name))
    check(framework, result.variants, x, y, announce, is_random=module.is_random(base))
    result.measurements = _measurements(framework, result.variants, x, y)
    _warm_up(framework, result.measurements, announce)
    _run_rounds(result.measurements, rounds, announce)
    return result


def num_stages(names: list[str], rounds: int, framework: Framework = KERAS) -> int:
    """How many times measure() calls `announce` if no variant is left out."""
    return 1 + 2 * len(names) + 2 * len(framework.trained(names)) + rounds


def check(
    framework: Framework, variants: list[Variant], x: Any, y: Any, announce: Announce, *, is_random: bool = False
) -> None:
    """Compare each variant with its base, and store the differences in the variant.

    Raises Disagreement if predictions that must agree do not. The training loss is no condition: with, say, two values
    per channel, rounding alone decides the sign of what batch norm returns. With Dropout and its like (`is_random`) it
    isn't compared.
    """
    _check_predictions(framework, variants, x, announce)
    losses: dict[str, float] = {}
    for variant in variants:
        if not framework.variants[variant.name].trained:
            continue
        announce(f"first training step: {framework.titles[variant.name]}")
        losses[variant.name] = float(np.asarray(variant.model.train_on_batch(x, y)))
    for variant in variants:
        if variant.name in losses and not is_random:
            base_loss = losses[framework.variants[variant.name].base]
            variant.loss = abs(losses[variant.name] - base_loss) / abs(base_loss)


def _check_predictions(framework: Framework, variants: list[Variant], x: Any, announce: Announce) -> None:
    found = {}
    for variant in variants:
        announce(f"comparing predictions: {framework.titles[variant.name]}")
        found[variant.name] = np.asarray(variant.model.predict_on_batch(x), dtype=np.float64)
    for variant in variants:
        kind = framework.variants[variant.name]
        expected = found[kind.base]
        variant.predictions = float(np.abs(found[variant.name] - expected).max() / np.abs(expected).max())
        if kind.must_agree and not variant.predictions <= PREDICTION_TOLERANCE:
            raise Disagreement(
                f"{kind.title}: predictions differ from {framework.title}'s by {variant.predictions:.2g} of the largest"
                f" prediction; {PREDICTION_TOLERANCE:g} is allowed. Nothing was timed"
            )


def _measurements(framework: Framework, variants: list[Variant], x: Any, y: Any) -> list[Measurement]:
    measurements = []
    for variant in variants:
        if framework.variants[variant.name].trained:
            measurements.append(Measurement(variant.name, "train", partial(variant.model.train_on_batch, x, y)))
        measurements.append(Measurement(variant.name, "predict", partial(variant.model.predict_on_batch, x)))
    return measurements


def _warm_up(framework: Framework, measurements: list[Measurement], announce: Announce) -> None:
    for measurement in measurements:
        if measurement.mode == "train":
            announce(f"warming up: {framework.titles[measurement.peer]}")
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
