"""Runs a model in inference mode, with chosen statistics in each batch norm, and shows what each of them sees.

    with Probe(model) as probe:
        probe.observe = function        # (tap, site, x, weights): called for every batch norm and batch, in order
        for tap in probe.taps:
            tap.statistics = BATCH      # or MOVING, or a pair (mean, variance)
            y = probe.run(inputs)       # the model's outputs, a flat list of arrays

Each batch norm's own `call` computes its output, with training=False and with the chosen vectors in the place of its
moving statistics: so activations, residuals, labels and derived classes stay what they are. The vectors come from a
numpy_function that is handed x and reads nothing of it unless somebody wants to know: one trace serves all choices.

Whatever the model's own code changes meanwhile (seeds, counters, losses added, attributes of layers) is put back in the
end, to the bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.models.functional import Functional  # Keras has no public name for these
from keras.src.random.seed_generator import global_seed_generator

from ....functional.batch_norm import moments
from ....functional.moments import Moments
from ...layers import masks
from ...layers.batch_norm import features_of
from ...layers.framework import Axes, as_input
from ..norms import norms
from .loops import loop_around

MOVING, BATCH = "moving", "batch"

Observer = Callable[["Tap", int, Any, Any, Moments], None]
Path = tuple[tuple[int, int], ...]


class Tap:
    """One batch norm of the model.

    Attributes:
        statistics: what it normalizes with: MOVING, BATCH, or a pair of float64 vectors of shape (C,).
        observed: whether `observe` of the probe is told of its batches.
        sites: how often one call of the model calls it; the steps of a loop are one.
        loops: of those, by `Loop.key` and `Loop.path`: the number of that call.
        inference: the values of `training` that the model passes to it in inference, as far as they are known.
        shape: that of its input, with None for extents that vary.
    """

    def __init__(self, layer: Any, name: str, index: int) -> None:
        if not layer.built:
            raise ValueError(f"layer {name} is not built, although the model is: call the model on a batch, before")
        self.layer, self.name, self.index = layer, name, index
        self.statistics: Any = MOVING
        self.observed = True
        self.sites = 0
        self.loops: dict[int, dict[Path, int]] = {}
        self.inference: set[bool] = set()
        self.shape: tuple[int | None, ...] | None = None
        self.dtype = ""
        self.features = features_of(layer)
        self.moving = tuple(value(v).astype(np.float64).reshape(-1) for v in (layer.moving_mean, layer.moving_variance))

    @property
    def frozen(self) -> bool:
        """Whether training leaves its moving statistics as they are."""
        return not self.layer.trainable or not self.features.update_statistics

    @property
    def always_batch(self) -> bool:
        """Whether it normalizes with the batch's statistics in inference, too."""
        return self.features.use_batch_statistics is True or (True in self.inference and self.layer.trainable)

    def axes(self, rank: int) -> tuple[int, ...]:
        given = self.layer.axis
        return tuple(sorted(axis % rank for axis in ([given] if isinstance(given, int) else given)))


class Probe:
    """See the top of this file. Taps are in the order of `norms(model)`; `order` is that of the calls."""

    def __init__(self, model: Any) -> None:
        self.model = model
        found = list(norms(model))
        self.taps = [Tap(layer, name, i) for i, (layer, name) in enumerate(zip(found, names(found), strict=True))]
        self.order: list[int] = []
        self.structure: Any = None  # of the model's outputs
        self.observe: Observer | None = None
        self._weights: Any = None
        self._functions: dict[Any, Any] = {}
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def __enter__(self) -> Probe:
        self._before = [(variable, value(variable)) for variable in _state(self.model)]
        self._losses = [(layer, list(layer._losses), set(layer._loss_ids)) for layer in self.model._flatten_layers()]
        self._attributes = [(layer, dict(vars(layer))) for layer in self.model._flatten_layers()]
        for tap in self.taps:
            vars(tap.layer)["call"] = self._tapped(tap, vars(tap.layer).get("call"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for layer, before in self._attributes:
            attributes = vars(layer)
            for name in attributes.keys() - before.keys():
                del attributes[name]
            attributes.update((name, old) for name, old in before.items() if attributes.get(name) is not old)
        for layer, losses, ids in self._losses:
            layer._losses[:] = losses
            layer._loss_ids.clear()
            layer._loss_ids.update(ids)
        for variable, array in self._before:
            if value(variable).tobytes() != array.tobytes():
                variable.assign(array)

    # ---- running ----------------------------------------------------------------------------------------------------

    def run(self, inputs: Any, weights: Any = None) -> tuple[list[Any], float]:
        """The outputs of the model as a flat list of arrays, and the sum of the losses that its layers add.

        weights: of the samples, in the statistics.
        """
        self._weights, self._error = weights, None
        inputs = _like_the_models(self.model, inputs)
        leaves = [tf.convert_to_tensor(leaf) if not tf.is_tensor(leaf) else leaf for leaf in tf.nest.flatten(inputs)]
        try:
            outputs, loss = self._function(inputs, leaves)(*leaves)
        except (tf.errors.OpError, BaseException):
            if self._error is not None:
                error, self._error = self._error, None
                raise error from None
            raise
        return [np.asarray(y) for y in outputs], float(loss)

    def forget(self) -> None:
        """Trace the model anew at the next run: attributes of its layers have changed."""
        self._functions.clear()

    def training_seen(self, inputs: Any) -> list[set[bool]]:
        """The values of `training` that each batch norm is given in training, from a trace; nothing is computed."""
        inputs = _like_the_models(self.model, inputs)
        leaves = [tf.convert_to_tensor(leaf) if not tf.is_tensor(leaf) else leaf for leaf in tf.nest.flatten(inputs)]
        kept, order = [(tap.inference, tap.sites) for tap in self.taps], self.order
        for tap in self.taps:
            tap.inference = set()

        def forward(*tensors: Any) -> Any:
            return self.model(tf.nest.pack_sequence_as(inputs, tensors), training=True)

        try:
            tf.function(forward, autograph=False).get_concrete_function(*leaves)
            return [tap.inference for tap in self.taps]
        finally:
            self.order = order
            for tap, (inference, sites) in zip(self.taps, kept, strict=True):
                tap.inference, tap.sites = inference, sites

    def _function(self, inputs: Any, leaves: list[Any]) -> Any:
        """The model as a function of these leaves, traced once for all batch sizes."""

        def forward(*tensors: Any) -> Any:
            for tap in self.taps:
                tap.sites = 0
                tap.loops.clear()
            self.order = []
            outputs = self.model(tf.nest.pack_sequence_as(inputs, tensors), training=False)
            self.structure = keras.tree.map_structure(lambda _: 0, outputs)
            losses = [tf.reduce_sum(tf.cast(loss, tf.float32)) for loss in self.model.losses]
            return keras.tree.flatten(outputs), tf.add_n([tf.constant(0.0), *losses])

        if self.model.run_eagerly if self.model.compiled else False:
            return forward
        specs = [_any_batch(leaf) for leaf in leaves]
        key = (tuple(specs), repr(keras.tree.map_structure(lambda _: 0, inputs)))
        if key not in self._functions:
            self._functions[key] = tf.function(forward, input_signature=specs, autograph=False)
        return self._functions[key]

    # ---- what a batch norm's call becomes ----------------------------------------------------------------------------

    def _tapped(self, tap: Tap, own: Any) -> Any:
        layer = tap.layer

        def call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            placed = dict(zip(("training", "mask"), args, strict=False))
            training, mask = ({**placed, **kwargs}.get(name) for name in ("training", "mask"))
            with self._lock:
                site, certain = self._site(tap)
                if tap.index not in self.order:
                    self.order.append(tap.index)
            static = tf.get_static_value(training) if tf.is_tensor(training) else training
            if static is not None:
                tap.inference.add(bool(static))
            vectors = self._vectors(tap, site, certain, inputs, mask)
            kwargs = {**{name: value for name, value in kwargs.items() if name != "training"}, "training": False}
            kwargs |= {"mask": placed["mask"]} if "mask" in placed else {}
            attributes = vars(layer)
            names = ("moving_mean", "moving_variance")
            kept, tapped = {name: attributes[name] for name in names}, attributes.pop("call")
            if own is not None:
                attributes["call"] = own
            attributes.update(zip(names, vectors, strict=True))
            try:
                return layer.call(inputs, **kwargs)
            finally:
                attributes.update(kept)
                attributes["call"] = tapped

        return call

    def _site(self, tap: Tap) -> tuple[int | None, bool]:
        """Which call of this batch norm it is, None for one whose result Keras discards; and whether it is certain
        that the call counts, even if nobody reads its result."""
        try:
            loop = loop_around(tap.name)
        except RuntimeError as error:  # without what Keras would add to its message
            self._error = error
            raise
        known = {} if loop is None else tap.loops.setdefault(loop.key, {})
        path = () if loop is None else loop.path
        if loop is not None and loop.starts:
            known.clear()
        if loop is not None and loop.discarded:
            return None, False
        if path not in known:
            known[path] = tap.sites
            tap.sites += 1
        # A tf.function in a loop has one trace for the steps and for the call for the shape, which TensorFlow prunes.
        return known[path], loop is None or not loop.starts

    def _vectors(self, tap: Tap, site: int | None, certain: bool, inputs: Any, mask: Any) -> list[Any]:
        """The mean and variance that a call normalizes with, as tensors in the shape of the layer's weights."""
        first = inputs[0] if isinstance(inputs, (list, tuple)) else inputs
        x = as_input(first, getattr(tap.layer.input_spec, "ndim", None))
        tap.shape, tap.dtype = tuple(x.shape), x.dtype.name
        mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        mask = masks.attached(first) if mask is None else mask
        weights = []
        if mask is not None:
            is_attached = masks.is_attached(mask, first, tap.layer)
            weights = [Axes.of(list(tap.axes(x.shape.rank)), x.shape).mask(mask, x, is_attached)]

        def see(x: Any, *weights: Any) -> Any:
            try:
                return self._see(tap, site, x, weights[0] if weights else None)
            except BaseException as error:
                self._error = self._error or error
                raise

        dtype = tf.float64 if x.dtype == tf.float64 else tf.float32
        # Stateful, so that a call counts even if nobody reads its output, as a training step's update does: an early
        # step of an unrolled RNN, say.
        found = tf.numpy_function(see, [x, *weights], [tf.float64, tf.float64], stateful=certain)
        shape = tap.layer.moving_mean.shape
        return [tf.cast(tf.reshape(vector, shape), dtype) for vector in found]

    def _see(self, tap: Tap, site: int | None, x: Any, mask: Any) -> Any:
        told = self.observe is not None and tap.observed and site is not None
        statistics = BATCH if tap.always_batch and tap.statistics == MOVING else tap.statistics
        if told or statistics == BATCH:
            weights = self._weighed(tap, x, mask)
            found = moments(x, axis=tap.axes(x.ndim), mask=weights)
            if told:
                assert self.observe is not None
                assert site is not None
                with self._lock:
                    self.observe(tap, site, x, weights, found)
            if statistics == BATCH:
                return (found.mean.ravel(), found.variance.ravel()) if found.count else tap.moving
        return tap.moving if statistics == MOVING else statistics

    def _weighed(self, tap: Tap, x: Any, mask: Any) -> Any:
        """The weights of the values of x: its mask times the weights of the samples."""
        if mask is not None and any(mask.shape[axis] != 1 for axis in tap.axes(x.ndim)):
            raise ValueError(
                f"layer {tap.name} has a mask that varies along its channel axis ({tap.layer.axis}, behind a layer "
                "like Masking): its channels have counts of their own, which can't be measured yet"
            )
        if self._weights is None:
            return mask
        if len(x) != len(self._weights):
            raise ValueError(
                f"sample weights can't be used: layer {tap.name} sees {len(x)} rows for {len(self._weights)} samples"
            )
        weights = np.reshape(self._weights, [-1] + [1] * (x.ndim - 1)).astype(np.float32)
        return weights if mask is None else weights * mask


def value(variable: Any) -> Any:
    """A copy of a variable's value."""
    return np.asarray(keras.ops.convert_to_numpy(variable)).copy()


def names(layers: list[Any]) -> list[str]:
    """The names of layers; their paths where several have one name."""
    plain = [layer.name for layer in layers]
    return [name if plain.count(name) == 1 else layer.path or name for name, layer in zip(plain, layers, strict=True)]


def _state(model: Any) -> list[Any]:
    """Everything that running a model can change: its variables, with seeds, and Keras's own seed."""
    return [*model.variables, *model.metrics_variables, global_seed_generator().state]


def _any_batch(leaf: Any) -> Any:
    """The specification of a tensor whose first extent may be any."""
    spec = tf.type_spec_from_value(leaf)
    if isinstance(spec, tf.TensorSpec) and spec.shape.rank:
        return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)
    return spec


def _like_the_models(model: Any, inputs: Any) -> Any:
    """tf.data makes tuples of lists: inputs in the kind of sequence that a functional model was made with."""
    functional = model._functional if isinstance(model, keras.Sequential) else model
    struct = functional._inputs_struct if isinstance(functional, Functional) else None
    if isinstance(inputs, (list, tuple)) and isinstance(struct, (list, tuple)) and len(inputs) == len(struct):
        return type(struct)(inputs)
    if isinstance(inputs, (list, tuple)) and len(inputs) == 1 and isinstance(struct, keras.KerasTensor):
        return inputs[0]
    return list(inputs) if isinstance(inputs, tuple) else inputs
