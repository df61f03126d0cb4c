"""The figures of a model: what its batch norms see in data, and what their moving statistics do to its outputs.

1   one pass over all data with the batch's statistics: moments, samples that stand out, outputs
2   a quarter of the batches with the moving statistics, and again with those of the data: outputs, loss, metrics
3   one batch per suspect: this batch norm alone with its moving statistics
4   one pass over the other data, if there is any
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np

from ....diagnosis.figures import LayerFigures, ModelFigures
from ....functional.moments import Moments
from ..graph import layers
from .layer_state import broken_weights, has_trained, is_broken, starting_statistics
from .probe import BATCH, MOVING, Probe, Tap, value
from .score import Score
from .seen import Seen
from .source import Data, Source

MOST_KEPT, SAMPLES_KEPT = 32, 128  # batches on which outputs are compared, and the samples that they must have
MOST_SUSPECTS = 12
SUSPECT = 0.05  # a gap from which a layer is switched on its own
SMALL = 1 << 18  # values per batch up to which every layer is searched for samples that stand out


class Collector:
    """Measures one model. `figures` is the result."""

    def __init__(self, model: Any, source: Source, other: Source | None) -> None:
        self._model, self._source, self._other = model, source, other
        self.notes: list[str] = []
        self.kept: list[Data] = []
        self._rows: list[Any] = []

    def collect(self) -> ModelFigures:
        with Probe(self._model) as probe:
            self._probe = probe
            seen, outputs = self._all()
            called = [tap for tap in probe.taps if tap.sites]
            called.sort(key=lambda tap: probe.order.index(tap.index))
            found = [self._layer(tap, seen.get(tap.index, Seen())) for tap in called]
            figures = ModelFigures(self._model.name, found, self._samples, batches=len(self._rows), notes=self.notes)
            figures.unreached = tuple(tap.name for tap in probe.taps if not tap.sites)
            figures.compared = sum(map(len, self.kept))
            figures.passes = 1.0
            self._optimizer(figures)
            self._expected_axes(found)
            self._compare(figures, called, outputs)
            self._training(called, found)
            self._switch(figures, called)
            self._try_epsilon(figures, called)
            if self._other is not None:
                self._see_other(figures, called)
        return figures

    # ---- 1: all data -------------------------------------------------------------------------------------------------

    def _all(self) -> tuple[dict[int, Seen], list[list[Any]]]:
        probe, seen = self._probe, dict[int, Seen]()
        for tap in probe.taps:
            tap.statistics = BATCH
        first: list[int] = []

        def observe(tap: Tap, site: int, x: Any, weights: Any, found: Moments) -> None:
            mine = seen.setdefault(tap.index, Seen())
            first[:] = first or [tap.index]
            if mine.add(site, x, found) and weights is None and (tap.index == first[0] or x.size <= SMALL):
                mine.find_top(x, tap.axes(x.ndim), found.mean, len(self._rows))

        probe.observe = observe
        outputs: list[list[Any]] = []
        self._samples, most = 0, self._most_kept()
        for data in self._source:
            y, _ = probe.run(data.inputs)
            self._samples += len(data)
            if len(self.kept) < most or (sum(map(len, self.kept)) < SAMPLES_KEPT and len(self.kept) < MOST_KEPT):
                self.kept.append(data)
                outputs.append(y)
            self._rows.append(data.rows)
        probe.observe = None
        return seen, outputs

    def _most_kept(self) -> int:
        length = self._source.length
        return 8 if length is None else max(1, min(MOST_KEPT, length // 4))

    def _layer(self, tap: Tap, seen: Seen) -> LayerFigures:
        layer = tap.layer
        whole = seen.all
        start = starting_statistics(layer, len(tap.moving[0]))
        epsilon = float(keras.ops.convert_to_numpy(layer.epsilon))
        momentum = None if layer.momentum is None else float(keras.ops.convert_to_numpy(layer.momentum))
        gamma = getattr(layer, "gamma", None)
        rank = len(tap.shape or ())
        found = LayerFigures(
            tap.name,
            epsilon,
            momentum,
            tap.moving[0],
            tap.moving[1],
            axis=tap.axes(rank),
            shape=tap.shape or (),
            dtype=tap.dtype,
            frozen=tap.frozen,
            trained=has_trained(layer),
            start=start,
            gamma=None if gamma is None else value(gamma).astype(np.float64).reshape(-1),
            classes=type(layer).__name__,
            infinite_batches=seen.infinite,
            infinite_state=broken_weights(layer),
        )
        if tap.always_batch:
            found.always_batch = (
                "use_batch_statistics" if tap.features.use_batch_statistics is True else "training=True"
            )
        if seen.batches:
            found.mean, found.variance = whole.mean.ravel(), whole.variance.ravel()
            found.within, found.between = seen.within / seen.batches, seen.means.variance
            found.count, found.batches = float(whole.count), seen.batches
            found.per_batch, found.samples = whole.count / seen.batches, seen.samples / seen.batches
            found.sites = [(part.mean.ravel(), part.variance.ravel()) for _, part in sorted(seen.sites.items())]
            if seen.top is not None:
                self._top(found, seen)
        return found

    def _top(self, found: LayerFigures, seen: Seen) -> None:
        """The sample that has the largest share in most channels."""
        square, batch, rows = seen.top
        assert found.variance is not None
        total = found.variance * found.count
        share = np.divide(square, total, out=np.zeros_like(square), where=total > 0)
        strong = share > 0.5
        pairs = list(zip(batch[strong].tolist(), rows[strong].tolist(), strict=True))
        if not pairs:
            found.top_share = np.zeros_like(share)
            return
        (b, row) = max(set(pairs), key=pairs.count)
        found.top_share = np.where((batch == b) & (rows == row), share, 0.0)
        places = self._rows[b]
        known = places is not None and row < len(places)
        found.top_row = int(places[row]) if known else f"row {row} of batch {b}"

    # ---- what the model is -------------------------------------------------------------------------------------------

    def _optimizer(self, figures: ModelFigures) -> None:
        optimizer = self._model.optimizer if self._model.compiled else None
        if optimizer is not None:
            figures.iterations = int(keras.ops.convert_to_numpy(optimizer.iterations))
            try:
                figures.learning_rate = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
            except (TypeError, ValueError, AttributeError):
                figures.learning_rate = None
        figures.infinite_weights = tuple(
            weight.path for weight in self._model.weights if is_broken(weight) and "moving_" not in weight.path
        )

    def _expected_axes(self, found: list[LayerFigures]) -> None:
        """The channel axis that the other layers of the model work with."""
        others = list(layers(self._model))
        formats = {
            layer.data_format for layer in others if hasattr(layer, "kernel_size") and hasattr(layer, "data_format")
        }
        dense = any(
            isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense, keras.layers.RNN)) for layer in others
        )
        for row in found:
            rank = len(row.shape)
            if rank < 3 or len(row.axis) != 1:
                continue
            if len(formats) == 1:
                row.expected_axis = rank - 1 if formats == {"channels_last"} else 1
            elif not formats and dense and rank == 3:
                row.expected_axis = rank - 1

    def _training(self, called: list[Tap], found: list[LayerFigures]) -> None:
        """Which batch norms the model tells, in training, that it isn't training."""
        if all(row.frozen or not row.at_start for row in found):
            return
        try:
            told = self._probe.training_seen(self.kept[0].inputs)
        except Exception as error:
            self.notes.append(f"the model can't be traced with training=True: {error}")
            return
        for tap, row in zip(called, found, strict=True):
            row.never_training = told[tap.index] == {False}

    # ---- 2: outputs --------------------------------------------------------------------------------------------------

    def _compare(self, figures: ModelFigures, called: list[Tap], outputs: list[list[Any]]) -> None:
        usable = [row.usable or row.seen for row in figures.layers]
        for tap, row, use in zip(called, figures.layers, usable, strict=True):
            tap.statistics = (row.mean, row.variance) if use else MOVING
        recalibrated, scores = self._outputs()
        figures.scores["recalibrated"] = scores
        chosen = [tap.statistics for tap in called]
        for tap in called:
            tap.statistics = MOVING
        moving, figures.scores["moving"] = self._outputs()
        for tap, statistics in zip(called, chosen, strict=True):
            tap.statistics = statistics
        figures.scores["batch"] = self._score(outputs)
        figures.scores = {name: found for name, found in figures.scores.items() if found}
        figures.distance = _distance(moving, recalibrated)
        figures.batch_distance = _distance(outputs, recalibrated)
        figures.passes += 2 * figures.compared / max(self._samples, 1)
        self._reference = recalibrated

    def _outputs(self) -> tuple[list[list[Any]], dict[str, float]]:
        found = [self._probe.run(data.inputs) for data in self.kept]
        return [y for y, _ in found], self._score([y for y, _ in found], [loss for _, loss in found])

    def _score(
        self, outputs: list[list[Any]], added: list[float] | None = None, batches: Any = None
    ) -> dict[str, float]:
        score = Score(self._model, self.notes)
        structure = self._probe.structure
        try:
            for i, (data, y) in enumerate(zip(batches or self.kept, outputs, strict=True)):
                if data.targets is not None:
                    score.add(data.targets, y, data.weights, added[i] if added else 0.0, structure)
            return score.result()
        except Exception as error:
            note = f"loss and metrics can't be computed from these targets: {' '.join(str(error).split())[:300]}"
            if note not in self.notes:
                self.notes.append(note)
            return {}

    # ---- 3: suspects -------------------------------------------------------------------------------------------------

    def _switch(self, figures: ModelFigures, called: list[Tap]) -> None:
        """The effect of each suspect alone, on one batch."""
        suspects = [i for i, row in enumerate(figures.layers) if row.usable and row.gap > SUSPECT]
        suspects = sorted(sorted(suspects, key=lambda i: -figures.layers[i].gap)[:MOST_SUSPECTS])
        data, reference = self.kept[0], self._reference[:1]
        for i in suspects:
            tap, row = called[i], figures.layers[i]
            statistics, tap.statistics = tap.statistics, MOVING
            row.effect = _distance([self._probe.run(data.inputs)[0]], reference)
            tap.statistics = statistics
        figures.passes += len(suspects) * len(data) / max(self._samples, 1)

    def _try_epsilon(self, figures: ModelFigures, called: list[Tap]) -> None:
        """The loss with the epsilon of other frameworks, where epsilon is of the size of the variances."""
        loss = figures.scores.get("moving", {}).get("loss")
        tried = [
            i
            for i, row in enumerate(figures.layers)
            if row.usable and np.mean(row.moving_variance < 10 * max(1e-3, row.epsilon)) > 0.25
        ]
        if loss is None or not tried or not math.isfinite(loss):
            return
        trial = {}
        for tap in called:
            tap.statistics = MOVING
        for epsilon in (1e-3, 1e-5):
            kept = [(called[i].layer, called[i].layer.epsilon) for i in tried]
            if all(float(keras.ops.convert_to_numpy(old)) == epsilon for _, old in kept):
                continue
            try:
                for layer, _ in kept:
                    vars(layer)["epsilon"] = epsilon
                self._probe.forget()
                trial[epsilon] = self._outputs()[1].get("loss", math.nan)
            finally:
                for layer, old in kept:
                    vars(layer)["epsilon"] = old
                self._probe.forget()
            figures.passes += figures.compared / max(self._samples, 1)
        figures.epsilon_trial = trial

    # ---- 4: other data -----------------------------------------------------------------------------------------------

    def _see_other(self, figures: ModelFigures, called: list[Tap]) -> None:
        assert self._other is not None
        seen: dict[int, Seen] = {}
        for tap, row in zip(called, figures.layers, strict=True):
            tap.statistics = (row.mean, row.variance) if row.seen else MOVING

        def observe(tap: Tap, site: int, x: Any, weights: Any, found: Moments) -> None:
            seen.setdefault(tap.index, Seen()).add(site, x, found)

        self._probe.observe = observe
        outputs: list[list[Any]] = []
        read: list[Data] = []
        samples = 0
        for data in self._other:
            y, _ = self._probe.run(data.inputs)
            samples += len(data)
            if len(read) < MOST_KEPT:
                outputs.append(y)
                read.append(data)
        self._probe.observe = None
        figures.other_scores = self._score(outputs, batches=read)
        for tap, row in zip(called, figures.layers, strict=True):
            if tap.index in seen and seen[tap.index].batches:
                whole = seen[tap.index].all
                row.other = whole.mean.ravel(), whole.variance.ravel()
        figures.other_samples = samples
        figures.passes += samples / max(self._samples, 1)


def _distance(outputs: list[list[Any]], reference: list[list[Any]]) -> float:
    """The root mean square difference of outputs, in standard deviations of the reference. Text doesn't count."""
    total = count = 0.0
    for i in range(len(reference[0]) if reference else 0):
        parts = [[np.ravel(y[i]) for y in some] for some in (outputs, reference)]  # batches may differ in length
        if parts[0][0].dtype.kind in "SUO":
            continue
        a, b = (np.concatenate(some).astype(np.float64) for some in parts)
        if not a.size:
            continue
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return math.inf
        spread = b.var()
        difference = float(np.mean((a - b) ** 2))
        total += difference / spread if spread > 0 else (0.0 if difference == 0 else 1e6)
        count += 1
    return math.sqrt(total / count) if count else 0.0
