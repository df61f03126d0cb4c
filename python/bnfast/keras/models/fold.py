"""`fold(model)`: the model for inference, its batch norms gone into the weights of the layers beside them.

    a = gamma/sqrt(moving_variance + epsilon), b = beta - a*moving_mean, per channel
    layer -> BN:    a*(x @ kernel + bias) + b  =  x @ (kernel*a) + (bias*a + b)
    BN -> layer:    (a*x + b) @ kernel + bias  =  x @ (a*kernel) + (bias + b @ kernel)
    BN -> ReLU -> layer:      relu(a*x + b)    =  a*max(x, -b/a) + b, and what is linear in it goes into the layer;
                                                  min where a < 0, and ReLU6 is both

The last two are exact only where every output sees the whole kernel: Dense, and convolutions that don't pad. Arithmetic
is float64, rounded once to the dtype of the layer's weights (linear.py). The model given is only read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from ..layers import activation as activations
from ..layers.batch_norm import KERAS, BatchNormalization
from ..layers.batch_norm_add import BatchNormalizationAdd
from .foldable import Affine, Linear, channel_axis, values
from .fusion import layer_of
from .graph_copy import (
    Graph,
    Replacement,
    calls,
    clone,
    graphs,
    is_graph,
    layers,
    nothing_else,
    only_input,
    operations,
    rebuild,
    transfer,
)
from .patch import PatchedBatchNormalization

NORMS = (KERAS, BatchNormalization, PatchedBatchNormalization, BatchNormalizationAdd)
MOST = {"relu": np.inf, "relu6": 6.0}
TOLERANCE = {"float16": 2e-2, "bfloat16": 1e-1}  # of check; others 1e-5


def fold(model: Any, *, check: bool = False) -> Any:
    """A copy of the model for inference in which batch norms are folded into the layers before or after them.

    Folds keras.layers.BatchNormalization and bnfast's into the layer before: Dense, Conv1D/2D/3D, DepthwiseConv1D/2D,
    SeparableConv1D/2D, Conv1D/2D/3DTranspose with a linear activation, whose output goes nowhere else and whose
    channels lie along the batch norm's axis; or into the one after: Dense, and the convolutions that pad nothing. In
    Functional models that compute in float32 or float64 a ReLU or ReLU6 may stand between it and the layer after: it
    becomes keras.ops.maximum (and minimum) with a limit for each channel.
    Shared layers, and batch norms called in training mode, stay as they are. An activation fused into bnfast's layer
    stays behind as a layer of its name. The copy computes what `model(x, training=False)` does, to rounding. It isn't
    compiled, folded layers have biases and lose their weights' regularizers and constraints, and where everything
    folded it holds Keras's own layers and operations only.

    Args:
        model: a built Functional or Sequential model; models nested in it are folded too. It is never changed.
        check: run both on random input, and raise if an output differs by more than 1e-5 times its largest absolute
            value, or more than 1e-5 where that is below 1 (float16 2e-2, bfloat16 1e-1).

    Raises:
        TypeError: model is no Keras model.
        ValueError: model isn't built, is subclassed, or has no batch norm; the check failed.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2.
    """
    _validate(model)
    folding = Folding(model)
    copy = rebuild(model, folding.plan).model
    for linear, new in folding.folded:
        new.set_weights(linear.weights())
    for activation, new in folding.left:
        transfer(activation, new)
    if check:
        _check(model, copy)
    return copy


def _validate(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a Keras model. Received: {type(model).__name__}")
    if not model.built or (type(model) is keras.Sequential and not is_graph(model)):
        raise ValueError(f"model must be built: give it an Input or call it once. Received: {model.name}, not built")
    if not is_graph(model):
        raise ValueError(
            "model must be Functional or Sequential: how layers are connected can't be read from a subclass. "
            f"Received: {model.name}, a {type(model).__name__}"
        )
    if not any(isinstance(layer, KERAS) for layer in layers(model)):
        raise ValueError(f"model has no batch norm to fold. Received: {model.name}")


class Folding:
    """What becomes of a model's layers: the plan for `rebuild`, and whose values go into what it put in.

    folded: layers with new weights, each with the layer that will have them.
    left:   activations that were part of a batch norm, each with the layer of its own that they become.
    """

    def __init__(self, model: Any) -> None:
        self.plan: dict[int, Replacement] = {}
        self.left: list[tuple[Any, Any]] = []
        self._linears: dict[int, Linear] = {}  # by id of the layer, and of every batch norm that is part of it by now
        self._calls = calls(model)
        self._taken = {operation.name for operation in operations(model)}
        training = _called_in_training(model)
        usual = [graph for graph in graphs(model) if id(graph.model) not in training]
        norms = [(graph, node) for graph in usual for node in graph.nodes if type(node.operation) in NORMS]
        for graph, node in norms:
            if self._once(node) and isinstance(node.operation.axis, int):  # not several axes
                self._fold(graph, node)

    @property
    def folded(self) -> list[tuple[Linear, Any]]:
        linears = {id(linear.layer): linear for linear in self._linears.values()}
        return [(linear, self.plan[key][0]) for key, linear in linears.items()]

    def _once(self, node: Any) -> bool:
        return len(self._calls[id(node.operation)]) == 1

    def _fold(self, graph: Graph, node: Any) -> None:
        norm, x = node.operation, _normalized(node)
        affine = _affine(norm)
        if x is None or affine is None or norm.activity_regularizer is not None:
            return
        rest = _rest(norm)
        if rest and not nothing_else(node):  # the activation takes no training=False
            return
        axis = norm.axis % len(x.shape)
        before, after = graph.producer(x), graph.follower(node)
        if before is not None and graph.follower(before) is node:
            linear = self._beside(before, norm, len(x.shape), axis)
            if linear is not None and _plain_output(linear.layer) and self._commit(linear.after(affine)):
                self._drop(norm, rest, linear.layer)
                return
        if after is not None and not rest:
            linear = self._beside(after, norm, len(x.shape), axis)
            if linear is not None and not linear.pads and self._commit(linear.before(affine)):
                self._drop(norm, (), None)
                return
        self._limit(graph, node, affine, axis)

    def _limit(self, graph: Graph, node: Any, affine: Affine, axis: int) -> None:
        """BN -> ReLU -> layer, the ReLU a layer or op of its own or part of the batch norm."""
        norm, relu, rank = node.operation, node, len(node.outputs[0].shape)
        if isinstance(norm, BatchNormalizationAdd) or isinstance(graph.model, keras.Sequential):
            return  # no layer of Keras's has such limits, and a Sequential holds layers only
        if norm.compute_dtype not in ("float32", "float64"):
            return  # half types would round them too coarsely
        activation = getattr(norm, "activation", None)
        if activation in (None, keras.activations.linear):
            relu = graph.follower(node)
            if relu is None or only_input(relu) is None or not self._once(relu):
                return
            activation = layer_of(relu.operation, norm)
        if getattr(relu.outputs[0], "_keras_mask", None) is not None:
            return  # layers pass masks on, keras.ops don't
        fused, after = activations.fuse(activation, norm.compute_dtype), graph.follower(relu)
        if fused is None or fused.activation not in MOST or after is None:
            return
        linear = self._beside(after, norm, rank, axis)
        if linear is None or linear.pads:
            return
        names = self._names(relu.operation.name)  # a fused ReLU is the batch norm's
        clip, rest = _clip(affine, MOST[fused.activation], norm.compute_dtype, rank - 1 - axis, names)
        if clip is not None and self._commit(linear.before(rest)):
            self._drop(norm, (), None)
            self.plan[id(relu.operation)] = (clip,)

    def _names(self, name: str) -> tuple[str, str]:
        """For two operations in the place of one of this name, the last of which keeps it."""
        first = f"{name}_low"
        while first in self._taken:
            first += "_"
        self._taken.add(first)
        return first, name

    def _beside(self, node: Any, norm: Any, rank: int, axis: int) -> Linear | None:
        """The weights of the layer called there, where the batch norm's channels are its own."""
        linear = self._linears.get(id(node.operation))
        if linear is None and Linear.takes(node.operation) and self._once(node) and only_input(node) is not None:
            linear = Linear(node.operation)
        if linear is None or linear.layer.compute_dtype != norm.compute_dtype:
            return None
        return linear if channel_axis(linear.layer, rank) == axis else None

    def _commit(self, linear: Linear) -> bool:
        """Take these as the layer's weights, if they are finite in its dtype."""
        if not all(np.isfinite(array).all() for array in linear.weights()):
            return False
        layer = linear.layer
        if id(layer) not in self.plan:
            penalties = {name: None for name in layer.get_config() if name.endswith(("_regularizer", "_constraint"))}
            penalties.pop("activity_regularizer", None)
            self.plan[id(layer)] = (clone(layer, use_bias=True, **penalties),)
        for key in (id(layer), *(key for key, known in self._linears.items() if known.layer is layer)):
            self._linears[key] = linear
        return True

    def _drop(self, norm: Any, rest: Replacement, into: Any) -> None:
        self.plan[id(norm)] = rest
        if into is not None and not rest:  # a batch norm that follows this one follows that layer now
            self._linears[id(norm)] = self._linears[id(into)]
        activation = getattr(norm, "activation", None)
        if rest and isinstance(activation, keras.layers.Layer):
            self.left.append((activation, rest[-1]))


def _called_in_training(model: Any) -> set[int]:
    """ids of the nested models called with training=True, and of those in them: they use the batch's moments."""
    found: set[int] = set()
    for graph in graphs(model):
        for node in graph.nodes:
            args, kwargs = node.arguments.args, node.arguments.kwargs
            if is_graph(node.operation) and (kwargs.get("training") or any(arg is True for arg in args[1:])):
                found.update(id(inner.model) for inner in graphs(node.operation))
    return found


def _normalized(node: Any) -> Any:
    """The tensor that a call of a batch norm normalizes, None where it may do so with its own moments."""
    args, kwargs = node.arguments.args, node.arguments.kwargs
    if len(args) != 1 or kwargs.get("training") or set(kwargs) - {"training", "mask"}:
        return None
    return args[0][0] if isinstance(node.operation, BatchNormalizationAdd) else args[0]


def _affine(norm: Any) -> Affine | None:
    """a and b of y = a*x + b, in float64; None where the variance allows none, or the batch's is used in inference."""
    if getattr(norm, "use_batch_statistics", None):
        return None
    mean, variance = values(norm.moving_mean), values(norm.moving_variance) + norm.epsilon
    if not (variance > 0).all():
        return None
    a = (values(norm.gamma) if norm.scale else 1.0) / np.sqrt(variance)
    return Affine(a, (values(norm.beta) if norm.center else 0.0) - a * mean)


def _clip(
    affine: Affine, most: float, dtype: str, trailing: int, names: tuple[str, str]
) -> tuple[Callable[[Any], Any] | None, Affine]:
    """clip and a', b' with min(max(a*x + b, 0), most) = a'*clip(x) + b', x with that many axes after its channels.

    None where a zero would be off by more than 1e-5, because it is now the difference of two numbers like b; or where a
    limit nearly overflows in dtype, because then a vanishes.
    """
    a, b = affine
    constant, precision = a == 0, np.finfo(dtype)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        zero, top = (np.where(constant, 0, (y - b) / a) for y in (0, most))
    largest = np.abs([zero, top] if most < np.inf else [zero]).max(initial=0)
    if np.abs(b).max(initial=0) > 2e-6 / float(precision.eps) or largest > float(precision.max) ** 0.8:
        return None, affine
    low = np.where(constant, -np.inf, np.where(a > 0, zero, top)).astype(dtype).reshape(-1, *[1] * trailing)
    high = np.where(constant, np.inf, np.where(a > 0, top, zero)).astype(dtype).reshape(-1, *[1] * trailing)
    limits = [pair for pair in ((keras.ops.maximum, low), (keras.ops.minimum, high)) if np.isfinite(pair[1]).any()]
    bounds = [(op, np.clip(y, precision.min, precision.max)) for op, y in limits]  # JSON has no infinity

    def clip(x: Any) -> Any:
        for (op, limit), name in zip(bounds, names[-len(bounds) :], strict=True):
            x = op(x, limit)
            x._keras_history.operation.name = name  # the automatic one may be another operation's
        return x

    return clip if bounds else None, Affine(a, np.where(constant, np.clip(b, 0, most), b))


def _rest(norm: Any) -> Replacement:
    """The layers that do what else was fused into a batch norm: the sum, the activation."""
    activation, words = getattr(norm, "activation", None), {"name": norm.name, "dtype": norm.dtype_policy}
    rest: list[Any] = []
    if isinstance(activation, keras.layers.Layer):
        rest = [clone(activation, name=norm.name)]
    elif activation not in (None, keras.activations.linear):
        rest = [keras.layers.Activation(activation, **words)]
    if isinstance(norm, BatchNormalizationAdd):
        rest.insert(
            0, keras.layers.Add(**{**words, "name": norm.replaces.get("add", f"{norm.name}_add")} if rest else words)
        )
    return tuple(rest)


def _plain_output(layer: Any) -> bool:
    return layer.activation in (None, keras.activations.linear) and layer.activity_regularizer is None


def _check(model: Any, copy: Any) -> None:
    rng = np.random.default_rng(0)
    inputs = keras.tree.map_structure(lambda tensor: _random(tensor, rng), Graph(model).inputs)
    pairs = zip(*(keras.tree.flatten(each(inputs, training=False)) for each in (model, copy)), strict=True)
    tolerance = max(TOLERANCE.get(layer.compute_dtype, 1e-5) for layer in layers(model))
    for index, (wanted, folded) in enumerate((values(wanted), values(folded)) for wanted, folded in pairs):
        allowed = tolerance * max(1.0, float(np.abs(wanted).max(initial=0)))
        difference = np.abs(wanted - folded)
        if not (difference <= allowed).all():
            raise ValueError(
                f"check: output {index} of the folded model must be within {allowed:.3g} of the original's. "
                f"Received: a difference of {difference.max():.3g}"
            )


def _random(tensor: Any, rng: np.random.Generator) -> np.ndarray:
    """A batch of 4 for a model input; other unknown extents are 64, integers 0 or 1."""
    if tensor.dtype == "string":
        raise ValueError(f"check makes numbers only. Received: an input of strings, {tensor.name}")
    first, *rest = tensor.shape
    shape = (first or 4, *(extent or 64 for extent in rest))
    kind = keras.backend.standardize_dtype(tensor.dtype)
    random = rng.normal(size=shape) if "float" in kind else rng.integers(0, 2, size=shape)
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(random, kind)))
