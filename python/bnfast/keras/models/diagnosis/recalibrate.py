"""`recalibrate(model, data)`: the moving statistics computed anew from data.

Every batch norm that takes part is given what training would give it, the statistics of the batch, and the moments of
all it sees are merged in float64. Everything else runs in inference mode: that is what the statistics are for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from ....diagnosis.estimate import Estimate, check_estimator
from ....functional.batch_norm import moments
from ....functional.moments import Moments
from ..norms import check_model
from .probe import BATCH, Probe, Tap, value
from .source import Source

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Recalibrated:
    """What `recalibrate` did to one batch norm.

    Attributes:
        name: the layer's name, or its path if several have that name.
        count: the values per channel that the statistics were taken of, or their weight.
        before, after: its moving statistics by the name of the weight, as arrays of the weight's shape and dtype.
        mean_shift: how far the mean moved, in standard deviations of the data: the root mean square of all channels.
        variance_ratio: log2 of (old variance + epsilon)/(new variance + epsilon): the root mean square of all channels.
    """

    name: str
    count: float
    before: dict[str, Array] = field(repr=False)
    after: dict[str, Array] = field(repr=False)
    mean_shift: float
    variance_ratio: float


@dataclass(frozen=True)
class Recalibration:
    """What `recalibrate` changed: one row per batch norm, in the order of the data flow. str() gives a table.

    Example:
        >>> import keras, numpy as np
        >>> from bnfast.keras import recalibrate
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.BatchNormalization(name="norm")])
        >>> result = recalibrate(model, np.array([[1.0], [5.0]], "float32"), verbose=0)
        >>> result.samples, result.rows[0].name, result.rows[0].after["moving_mean"]
        (2, 'norm', array([3.], dtype=float32))

    Attributes:
        model: the model's name.
        batches: how many batches were read, in each pass.
        samples: how many samples they had together.
        rows: what changed.
        left: {name of a batch norm that was not changed: why}.
    """

    model: str
    batches: int
    samples: int
    rows: tuple[Recalibrated, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        read = f"{self.samples} samples in {self.batches} batches"
        head = f"{self.model}: {len(self.rows)} batch norms recalibrated from {read}"
        heads = ("layer", "values per channel", "mean moved (std)", "variance, log2(old/new)")
        rows = [(r.name, f"{r.count:.10g}", f"{r.mean_shift:.3g}", f"{r.variance_ratio:.3g}") for r in self.rows]
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in (heads, *rows)]
        return "\n".join([head, *lines, *(f"{name} is unchanged: {why}" for name, why in self.left.items())])


def recalibrate(
    model: Any,
    data: Any,
    *,
    batches: int | None = None,
    layers: Any = None,
    estimator: str = "population",
    sequential: bool = False,
    batch_size: int | None = None,
    use_sample_weight: bool = False,
    verbose: int = 1,
) -> Recalibration:
    """Compute the moving statistics of a model's batch norms anew, over data. The model is changed in place.

    The moving statistics are an average over the last 1/(1 - momentum) batches of training or so. They are wrong where
    training was short, where the weights have moved since (another learning rate, averaged weights, pruning), or where
    the data has. This function replaces them by the statistics of `data`, which should be training data, without
    augmentation that prediction doesn't have. Labels aren't needed; where batches have them, they are ignored.

        mean = sum(x)/n, variance = sum((x - mean)^2)/n     over all values of the channel in all batches, in float64

    In the pass each of these batch norms normalizes with the statistics of the batch, as in training, and every other
    layer runs in inference mode (no dropout). So the first batch norm gets exactly the statistics of its inputs, and
    each later one those of the inputs that it has in training. `sequential=True` makes all of them exact for
    inference: one pass per batch norm, in which those before it normalize with their new statistics.

    Only moving statistics change: moving_mean and moving_variance; with renorm also moving_stddev, renorm_mean and
    renorm_stddev; with momentum=None also `batches`. Other state that the pass touches (seeds, counters) is put back to
    the bit, and so is everything if an error occurs. Weights, optimizer, compiled functions and metrics stay.

    - Frozen layers (trainable=False, or update_statistics=False) normalize with their moving statistics and keep them,
      unless `layers` names them. If all are frozen, it has to.
    - A layer that is called several times (a shared one) gets the statistics of all its calls together.
    - Masked entries don't count. Layers with virtual_batch_size: "average" is over the ghost batches.
    - Under a tf.distribute strategy one replica reads the data; all replicas get the result.
    - synchronized changes nothing here: the statistics are those of all data anyway.

    Args:
        model: a built keras.Model, of Keras's batch norms or of bnfast's, or of classes derived from them.
        data: an array; a list or dict of arrays for several inputs; a tuple (inputs, targets, sample_weights); a
            tf.data.Dataset, keras.utils.PyDataset, generator or any iterable of such batches. Arrays are cut into
            batches after a fixed shuffle.
        batches: use at most so many batches. Needed for data without an end.
        layers: the batch norms to recalibrate: a layer or a name (or path), or several. None: all that aren't frozen.
        estimator: "population", or "average": the plain average of the batches' means and variances, as
            torch.optim.swa_utils.update_bn computes (with correction=1 of bnfast's layer: the same numbers).
        sequential: one pass per batch norm. The data must be readable more than once.
        batch_size: samples per batch where data is arrays. None: 256, or fewer (at least 32) if a batch had more than
            8 MiB. With small batches the later layers see noisier inputs.
        use_sample_weight: weigh the samples by the third element of the data. Training doesn't, so the default is no.
        verbose: 1 shows a progress bar, 0 nothing.

    Returns:
        A Recalibration: what changed, with the old values.

    Raises:
        TypeError, ValueError: an argument is wrong, the model isn't built or has no batch norm, the data is empty, its
            inputs hold NaN or Inf, or a mask varies along the channel axis of a batch norm.
        FloatingPointError: what a batch norm sees is not finite, though the inputs are. The message names the layer.
        RuntimeError: Keras runs on another backend than TensorFlow; or an RNN's cell calls a batch norm in its own
            tf.function, so that the RNN's extra call for the shape of the output can't be told from its steps.

    Example:
        >>> import keras, numpy as np
        >>> from bnfast.keras import recalibrate
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
        >>> x = np.random.default_rng(0).normal(5, 2, (1000, 3)).astype("float32")
        >>> print(recalibrate(model, x, verbose=0).rows[0].count)
        1000.0

    Source: Li et al. 2016, "Revisiting batch normalization for practical domain adaptation", arXiv:1603.04779; Wu and
    Johnson 2021, "Rethinking 'batch' in batchnorm" (precise batch norm), arXiv:2105.07576.
    """
    check_model(model)
    check_estimator(estimator)
    source = Source(model, data, batch_size=batch_size, batches=batches)
    probe = Probe(model)
    if not probe.taps:
        raise ValueError(f"model {model.name} has no batch norm")
    chosen = _chosen(probe.taps, layers)
    if sequential and source.once:
        raise ValueError("sequential=True reads the data once per batch norm. Received: a generator, which can't be")
    work = _Work(probe, source, chosen, estimator, use_sample_weight)
    with probe:
        work.run(sequential, verbose)
    reached = [tap for tap in chosen if tap.index in work.estimates]
    absent = [tap for tap in chosen if tap.index not in work.estimates]
    if absent and (layers is not None or not reached):
        raise ValueError(f"layer {absent[0].name} saw no values: the model doesn't call it, or all is masked")
    rows = _assign(probe, work)
    left = {tap.name: "it is frozen; name it in layers= to recalibrate it" for tap in probe.taps if tap.frozen}
    left |= {tap.name: "the model doesn't call it, or all that it sees is masked" for tap in absent}
    changed = {row.name for row in rows}
    left |= {tap.name: "layers= doesn't name it" for tap in probe.taps if tap.name not in left}
    left = {name: why for name, why in left.items() if name not in changed}
    return Recalibration(model.name, work.batches, work.samples, rows, left)


def _chosen(taps: list[Tap], layers: Any) -> list[Tap]:
    """The batch norms to recalibrate."""
    if layers is None:
        chosen = [tap for tap in taps if not tap.frozen]
        if not chosen:
            raise ValueError(
                "all batch norms of the model are frozen (trainable=False): name those to recalibrate in layers="
            )
        return chosen
    wanted = [layers] if isinstance(layers, (str, keras.layers.Layer)) else layers
    if not isinstance(wanted, Iterable):
        raise TypeError(f"layers must be a layer, a name, or several of these. Received: {layers!r}")
    chosen = []
    for one in wanted:
        named = isinstance(one, str)
        found = [tap for tap in taps if one is tap.layer or (named and one in (tap.name, tap.layer.path))]
        if not found:
            given, known = one if named else getattr(one, "name", one), ", ".join(tap.name for tap in taps)
            raise ValueError(f"layers must name batch norms of the model ({known}). Received: {given!r}")
        chosen += [tap for tap in found if tap not in chosen]
    if not chosen:
        raise ValueError("layers must name at least one batch norm. Received: none")
    return chosen


class _Work:
    """The passes over the data, and what they found."""

    def __init__(self, probe: Probe, source: Source, chosen: list[Tap], estimator: str, weighted: bool) -> None:
        self._probe, self._source, self._estimator, self._weighted = probe, source, estimator, weighted
        self._chosen = chosen
        self.estimates: dict[int, Estimate] = {}
        self.results: dict[int, tuple[Any, Any]] = {}
        self.stddevs: dict[int, Any] = {}  # of the layers with renorm
        self.batches = self.samples = 0
        self._spread: dict[int, Estimate] = {}
        self._seen: list[tuple[int, int, Tap, list[Moments]]] = []  # of one batch

    def run(self, sequential: bool, verbose: int) -> None:
        for tap in self._probe.taps:
            tap.observed = False
        if not sequential:
            self._pass(self._chosen, verbose)
            return
        self._order()
        self._chosen.sort(key=lambda tap: _place(self._probe.order, tap))
        for tap in self._chosen:
            self._pass([tap], verbose)
            if tap.index in self.results:
                tap.statistics = self.results[tap.index]
            tap.observed = False

    def _order(self) -> None:
        """One batch, so that the order of the calls is known."""
        data = next(iter(self._source))
        self._probe.run(data.inputs)

    def _pass(self, taps: list[Tap], verbose: int) -> None:
        for tap in taps:
            tap.observed, tap.statistics = True, BATCH
        self._probe.observe = self._add
        bar = keras.utils.Progbar(self._source.length, unit_name="batch", verbose=1 if verbose else 0)
        self.batches = self.samples = 0
        for data in self._source:
            self._probe.run(data.inputs, self._weights(data))
            self._merge()
            self.batches, self.samples = self.batches + 1, self.samples + len(data)
            bar.update(self.batches, finalize=self.batches == self._source.length)
        if self.batches != self._source.length:
            bar.update(self.batches, finalize=True)
        for tap in taps:
            if tap.index in self.estimates:
                self.results[tap.index] = self.estimates[tap.index].result()

    def _weights(self, data: Any) -> Any:
        if not self._weighted:
            return None
        if data.weights is None:
            raise ValueError("use_sample_weight=True needs data that is a tuple (inputs, targets, sample_weights)")
        weights = np.asarray(data.weights, np.float64).reshape(-1)
        if len(weights) != len(data) or not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(f"sample weights must be {len(data)} finite numbers >= 0. Received: {weights!r}")
        return weights

    def _add(self, tap: Tap, site: int, x: Any, weights: Any, found: Moments) -> None:
        if not (np.isfinite(found.mean).all() and np.isfinite(found.variance).all()):
            raise FloatingPointError(
                f"layer {tap.name} sees NaN or Inf in batch {self.batches + 1} ({x.dtype.name}), though the inputs of "
                f"the model are finite: bnfast.keras.diagnose(model, data) says where they arise"
            )
        if not found.count:
            return
        self._seen.append((tap.index, site, tap, self._ghosts(tap, x, weights) or [found]))

    def _merge(self) -> None:
        """What the batch norms saw of one batch, in the order of their calls, which may run in any."""
        for _, _, tap, parts in sorted(self._seen, key=lambda seen: seen[:2]):
            self._extend(tap, parts)
        self._seen.clear()

    def _extend(self, tap: Tap, parts: list[Moments]) -> None:
        correction = 0 if getattr(tap.layer, "renorm", False) else tap.features.correction
        self.estimates.setdefault(tap.index, Estimate(self._estimator, correction)).extend(parts)
        if getattr(tap.layer, "renorm", False):
            epsilon = float(keras.ops.convert_to_numpy(tap.layer.epsilon))
            for part in parts:
                stddev = Moments(part.count, np.sqrt(part.variance + epsilon), np.zeros_like(part.variance))
                self._spread.setdefault(tap.index, Estimate(self._estimator)).add(stddev)

    def _ghosts(self, tap: Tap, x: Any, weights: Any) -> list[Moments]:
        """The moments of the ghost batches, where they are averaged."""
        size = tap.features.virtual_batch_size
        if size is None or self._estimator != "average" or len(x) % size:
            return []
        count = len(x) // size
        strided = tap.features.virtual_batch_grouping == "strided"
        parts = [slice(g, None, count) if strided else slice(g * size, (g + 1) * size) for g in range(count)]
        axes = tap.axes(x.ndim)
        wide = None if weights is None else np.broadcast_to(weights, [len(x), *weights.shape[1:]])
        return [moments(x[part], axis=axes, mask=None if wide is None else wide[part]) for part in parts]

    def stddev(self, tap: Tap, epsilon: float) -> Any:
        """The standard deviation that renorm keeps: averaged itself, or that of the population."""
        if self._estimator == "average":
            return self._spread[tap.index].result()[0]
        return np.sqrt(self.results[tap.index][1] + epsilon)


def _place(order: list[int], tap: Tap) -> int:
    return order.index(tap.index) if tap.index in order else len(order)


def _assign(probe: Probe, work: _Work) -> tuple[Recalibrated, ...]:
    """Writes the new statistics to the layers: all of them, or none."""
    taps = [tap for tap in sorted(probe.taps, key=lambda t: _place(probe.order, t)) if tap.index in work.results]
    new: list[dict[str, Any]] = []
    for tap in taps:
        mean, variance = work.results[tap.index]
        values: dict[str, Any] = {"moving_mean": mean, "moving_variance": variance}
        if getattr(tap.layer, "renorm", False):
            epsilon = float(keras.ops.convert_to_numpy(tap.layer.epsilon))
            stddev = work.stddev(tap, epsilon)
            values |= {"moving_stddev": stddev, "renorm_mean": mean, "renorm_stddev": stddev}
            values["moving_variance"] = np.maximum(stddev**2 - epsilon, 0)
        if getattr(tap.layer, "batches", None) is not None and tap.layer.momentum is None:
            values["batches"] = np.asarray(work.estimates[tap.index].batches)
        new.append({name: _as(array, getattr(tap.layer, name), tap.name) for name, array in values.items()})
    old = [{name: value(getattr(tap.layer, name)) for name in values} for tap, values in zip(taps, new, strict=True)]
    try:
        for tap, values in zip(taps, new, strict=True):
            for name, array in values.items():
                getattr(tap.layer, name).assign(array)
    except BaseException:
        for tap, values in zip(taps, old, strict=True):
            for name, array in values.items():
                getattr(tap.layer, name).assign(array)
        raise
    return tuple(
        _row(tap, work.estimates[tap.index].count, before, after)
        for tap, before, after in zip(taps, old, new, strict=True)
    )


def _as(new: Any, variable: Any, layer: str) -> Array:
    """The value in the shape and dtype of a weight."""
    with np.errstate(over="ignore"):
        array = np.asarray(new).reshape(variable.shape).astype(value(variable).dtype)
    if not np.isfinite(array.astype(np.float64)).all():
        raise FloatingPointError(f"the new statistics of layer {layer} don't fit in {array.dtype.name}")
    return array


def _row(tap: Tap, count: float, before: dict[str, Array], after: dict[str, Array]) -> Recalibrated:
    epsilon = float(keras.ops.convert_to_numpy(tap.layer.epsilon))
    old_mean, old_variance, mean, variance = (
        values[name].astype(np.float64) for values in (before, after) for name in ("moving_mean", "moving_variance")
    )
    with np.errstate(all="ignore"):
        shift = (old_mean - mean) / np.sqrt(variance + max(epsilon, 1e-12))
        ratio = np.log2((old_variance + max(epsilon, 1e-12)) / (variance + max(epsilon, 1e-12)))
    return Recalibrated(tap.name, count, before, after, _root_mean_square(shift), _root_mean_square(ratio))


def _root_mean_square(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2))) if values.size else 0.0
