"""What `fold` makes of each batch norm of a model: the layer that takes it in, or why none does."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, NamedTuple

import keras
import numpy as np

from ..layers.batch_norm import KERAS, BatchNormalization, features_of
from ..layers.batch_norm_add import BatchNormalizationAdd
from .foldable import Affine, FoldableLayer, channel_axis, values
from .graph import Graph, Replacement, calls, graphs, has_default_arguments, is_graph, layers, only_input, operations
from .norms import part
from .patch import PatchedBatchNormalization
from .relu_limits import clip_of, upper_limit
from .text import listed

NORMS = (KERAS, BatchNormalization, PatchedBatchNormalization, BatchNormalizationAdd)
CONVOLVED = ("Conv1D", "Conv2D", "Conv3D", "SeparableConv1D", "SeparableConv2D")  # end in Conv2D or Conv3D and a bias
STAYS = "stays, because "


class Candidate(NamedTuple):
    """One way to fold a batch norm."""

    foldable: FoldableLayer  # the layer, with the weights that it would have
    replaces_norm: Replacement  # what stays of the batch norm: the sum and the activation that are fused into it
    limit: tuple[Any, Any] | None = None  # a ReLU of the model, and the function that takes its place
    before: bool = False  # whether the layer precedes the batch norm


class Call(NamedTuple):
    """One call of a batch norm in a graph."""

    graph: Graph
    node: Any
    affine: Affine
    axis: int
    rank: int
    rest: Replacement  # the layers for the sum and the activation that are fused into it

    @property
    def norm(self) -> Any:
        return self.node.operation


class FoldPlan:
    """What becomes of a model's layers.

    replacements: for `rewire`: the batch norms, and activations that become limits
    folded:       the layers that get other weights
    outcomes:     by the name of each batch norm, the layer it was folded into, or why it stays
    """

    def __init__(self, model: Any) -> None:
        self.replacements: dict[int, Replacement] = {}
        self.outcomes: dict[str, str] = {}
        self._into: dict[int, str] = {}  # by id of a folded batch norm, the name of the layer
        self._foldables: dict[int, FoldableLayer] = {}  # by id of the layer, and of every batch norm folded into it
        self._calls = calls(model)
        held = [{id(variable) for variable in getattr(each, "variables", ())} for each in operations(model)]
        self._owners = Counter(key for keys in held for key in keys)  # how many operations hold a variable
        self._kinds = {operation.name: type(operation).__name__ for operation in operations(model)}
        self._taken = {operation.name for operation in operations(model)}
        in_training = _called_in_training(model)
        for graph in graphs(model):
            for node in graph.nodes:
                if type(node.operation) in NORMS:
                    reason = "its model is called in training mode" if id(graph.model) in in_training else None
                    found = reason or self._fold(graph, node)
                    nested = "" if graph.model is model else f"{graph.model.name}/"
                    outcome = f"{STAYS}{found}" if found else self._where(node)
                    self.outcomes[f"{nested}{node.operation.name}"] = outcome
        in_graphs = {id(operation) for operation in operations(model)}
        for layer in layers(model):
            if isinstance(layer, KERAS) and (type(layer) not in NORMS or id(layer) not in in_graphs):
                found = "it lies inside another layer" if type(layer) in NORMS else "it is a class of its own"
                self.outcomes.setdefault(layer.path or layer.name, f"{STAYS}{found}")

    @property
    def folded(self) -> list[FoldableLayer]:
        return list({id(foldable.layer): foldable for foldable in self._foldables.values()}.values())

    def summary(self, model: str, verbose: int) -> str:
        """How many batch norms were folded; and each, or for each reason those that stay."""
        staying: dict[str, list[str]] = {}
        for name, outcome in self.outcomes.items():
            if outcome.startswith(STAYS):
                staying.setdefault(self._general(outcome.removeprefix(STAYS)), []).append(name)
        folded = len(self.outcomes) - sum(map(len, staying.values()))
        lines = [f"{model}: {folded} of {len(self.outcomes)} batch norms folded"]
        if verbose == 2:
            lines += [f"{name}: {outcome}" for name, outcome in self.outcomes.items()]
        else:
            for reason, names in staying.items():
                lines.append(f"{len(names)} stay{'s' * (len(names) == 1)}, because {reason}: {listed(names)}")
        return "\n".join([*lines, "The model that fold returned is for inference. The given model is unchanged."])

    def _general(self, reason: str) -> str:
        """A reason with the kinds of layers in place of their names, so that equal cases are told once."""

        def kind(match: re.Match[str]) -> str:
            return match[1] + (f"a {self._kinds[match[2]]}" if match[2] in self._kinds else match[2])

        parts = [re.sub(r"(^|\bof )(\S+)", kind, part) for part in reason.split("; ")]
        return "; ".join(dict.fromkeys(parts))

    def _where(self, node: Any) -> str:
        return f"folded into {self._into[id(node.operation)]}"

    def _is_called_once(self, node: Any) -> bool:
        """Whether nothing else in the model uses the operation or, as part of another layer, its variables."""
        variables = getattr(node.operation, "variables", ())
        return len(self._calls[id(node.operation)]) == 1 and all(self._owners[id(v)] == 1 for v in variables)

    def _fold(self, graph: Graph, node: Any) -> str | None:
        """Folds one batch norm into the first layer that accepts it; why it stays, or None."""
        call = self._call(graph, node)
        if isinstance(call, str):
            return call
        reasons = []
        for attempt in (self._into_before, self._into_after, self._through_relu):
            candidate = attempt(call)
            if isinstance(candidate, str):
                reasons.append(candidate)
            elif not all(np.isfinite(array).all() for array in candidate.foldable.weights()):
                reasons.append(f"the weights of {candidate.foldable.layer.name} would not be finite")
            else:
                self._commit(call, candidate)
                return None
        return "; ".join(dict.fromkeys(reasons))

    def _call(self, graph: Graph, node: Any) -> Call | str:
        """The call as far as every way of folding needs it, or why none applies."""
        norm, x = node.operation, _normalized(node)
        if not self._is_called_once(node):
            return "it is shared"
        if not isinstance(norm.axis, int):
            return "it has several axes"
        if x is None:
            return "it is called in training mode or with other arguments"
        if norm.activity_regularizer is not None:
            return "it has an activity regularizer"
        if features_of(norm).use_batch_statistics:
            return "it always normalizes with the batch's statistics"
        affine = _affine(norm)
        if affine is None:
            return "its variance + epsilon isn't positive"
        rest = _rest(norm)
        if rest and not has_default_arguments(node):
            return "its activation can't take the arguments of the call"
        return Call(graph, node, affine, norm.axis % len(x.shape), len(x.shape), rest)

    def _into_before(self, call: Call) -> Candidate | str:
        """layer -> BN."""
        before = call.graph.producer(_normalized(call.node))
        if before is None:
            return "no layer comes before it"
        if call.graph.sole_consumer(before) is not call.node:
            return f"{before.operation.name} before it is read elsewhere, too"
        foldable = self._foldable(before, call)
        if isinstance(foldable, str):
            return foldable
        if type(foldable.layer).__name__ in CONVOLVED and _is_summed_for_mish(call):
            return "TensorFlow has no kernel for a convolution with a bias, a sum and mish"
        if not _has_linear_output(foldable.layer):
            return f"{foldable.layer.name} has an activation or an activity regularizer"
        return Candidate(foldable.after(call.affine), call.rest, before=True)

    def _into_after(self, call: Call) -> Candidate | str:
        """BN -> layer."""
        after = call.graph.sole_consumer(call.node)
        if call.rest:
            return "an activation or a sum is fused into it"
        if after is None:
            return "its output is read by several layers or is an output of the model"
        foldable = self._unpadded(after, call)
        return foldable if isinstance(foldable, str) else Candidate(foldable.before(call.affine), ())

    def _through_relu(self, call: Call) -> Candidate | str:
        """BN -> ReLU -> layer. The ReLU is a layer, an operation, or part of the batch norm."""
        graph, norm, relu = call.graph, call.norm, call.node
        activation = features_of(norm).activation
        if activation in (None, keras.activations.linear):
            relu = graph.sole_consumer(call.node)
            if relu is None or only_input(relu) is None or not self._is_called_once(relu):
                return "no ReLU of its own follows it"
            activation = relu.operation
        if getattr(relu.outputs[0], "_keras_mask", None) is not None:
            return "keras.ops, unlike layers, don't pass its mask on"
        limit, after = upper_limit(activation, norm.compute_dtype), graph.sole_consumer(relu)
        if limit is None:
            return "no ReLU or ReLU6 follows it"
        if isinstance(norm, BatchNormalizationAdd) or isinstance(graph.model, keras.Sequential):
            return "its ReLU comes after a sum or in a Sequential model, and can't become per-channel limits"
        if norm.compute_dtype not in ("float32", "float64"):
            return f"{norm.compute_dtype} would round the limits of its ReLU too coarsely"
        if after is None:
            return "the output of its ReLU is read by several layers or is an output of the model"
        foldable = self._unpadded(after, call)
        if isinstance(foldable, str):
            return foldable
        clip, rest = clip_of(
            call.affine,
            limit,
            norm.compute_dtype,
            call.rank - 1 - call.axis,
            self._two_names(relu.operation.name),
        )
        if isinstance(clip, str):
            return clip
        return Candidate(foldable.before(rest), (), (relu.operation, clip))

    def _two_names(self, name: str) -> tuple[str, str]:
        """Names for two operations that replace one of this name; the last one keeps it."""
        first = f"{name}_low"
        while first in self._taken:
            first += "_"
        self._taken.add(first)
        return first, name

    def _unpadded(self, node: Any, call: Call) -> FoldableLayer | str:
        """The layer called there, if every output sees its whole kernel."""
        foldable = self._foldable(node, call)
        if not isinstance(foldable, str) and foldable.pads:
            return f"{foldable.layer.name} pads its inputs"
        return foldable

    def _foldable(self, node: Any, call: Call) -> FoldableLayer | str:
        """The weights of the layer called there, if the batch norm's channels are its channels; else why not."""
        layer = node.operation
        foldable = self._foldables.get(id(layer))
        if foldable is None:
            if not FoldableLayer.accepts(layer):
                return f"{layer.name} is no Dense or convolution layer, or a subclass, quantized, or has LoRA"
            if not self._is_called_once(node) or only_input(node) is None:
                return f"{layer.name} is shared or called with other arguments"
            foldable = FoldableLayer(layer)
        if foldable.layer.compute_dtype != call.norm.compute_dtype:
            return f"{layer.name} computes in another dtype"
        if channel_axis(foldable.layer, call.rank) != call.axis:
            return f"the channels of {layer.name} lie along another axis"
        return foldable

    def _commit(self, call: Call, candidate: Candidate) -> None:
        """Enters the candidate into the plan."""
        layer, norm = candidate.foldable.layer, call.norm
        for key in (id(layer), *(key for key, known in self._foldables.items() if known.layer is layer)):
            self._foldables[key] = candidate.foldable
        self.replacements[id(norm)] = candidate.replaces_norm
        if candidate.before and not call.rest:  # a batch norm that follows this one now follows that layer
            self._foldables[id(norm)] = candidate.foldable
        if candidate.limit is not None:
            operation, clip = candidate.limit
            self.replacements[id(operation)] = (clip,)
        self._into[id(norm)] = layer.name


def _called_in_training(model: Any) -> set[int]:
    """The ids of nested models called with training=True, and of models in them: they use the batch's moments."""
    found: set[int] = set()
    for graph in graphs(model):
        for node in graph.nodes:
            args, kwargs = node.arguments.args, node.arguments.kwargs
            if is_graph(node.operation) and (kwargs.get("training") or any(arg is True for arg in args[1:])):
                found.update(id(inner.model) for inner in graphs(node.operation))
    return found


def _normalized(node: Any) -> Any:
    """The tensor that a call of a batch norm normalizes; None if it may use the batch's moments."""
    args, kwargs = node.arguments.args, node.arguments.kwargs
    if len(args) != 1 or kwargs.get("training") or set(kwargs) - {"training", "mask"}:
        return None
    return args[0][0] if isinstance(node.operation, BatchNormalizationAdd) else args[0]


def _is_summed_for_mish(call: Call) -> bool:
    """Whether x*tanh(softplus(x)) reads a sum that the batch norm's output is a term of (tensorflow/folding.py)."""
    if isinstance(call.norm, BatchNormalizationAdd) and _holds_softplus(call.norm):
        return True
    sums = [node for node in call.graph.consumers(call.node) if type(node.operation).__name__ == "Add"]
    return any(_holds_softplus(node.operation) for total in sums for node in call.graph.consumers(total))


def _holds_softplus(operation: Any) -> bool:
    activation = getattr(operation, "activation", None)
    inner = getattr(activation, "activation", activation)  # a layer in a batch norm
    return inner is keras.activations.mish or type(operation).__name__ in ("Mish", "Softplus")


def _affine(norm: Any) -> Affine | None:
    """a and b of y = a*x + b in float64; None if variance + epsilon isn't positive."""
    mean, variance = values(norm.moving_mean), values(norm.moving_variance) + float(norm.epsilon)
    if not (variance > 0).all():
        return None
    a = (values(norm.gamma) if norm.scale else 1.0) / np.sqrt(variance)
    return Affine(a, (values(norm.beta) if norm.center else 0.0) - a * mean)


def _rest(norm: Any) -> Replacement:
    """The layers for the sum and the activation that are fused into a batch norm."""
    activation, kwargs = features_of(norm).activation, {"name": norm.name, "dtype": norm.dtype_policy}
    rest: list[Any] = []
    if isinstance(activation, keras.layers.Layer):
        rest = [part(activation, norm.name, norm)]
    elif activation not in (None, keras.activations.linear):
        rest = [keras.layers.Activation(activation, **kwargs)]
    if isinstance(norm, BatchNormalizationAdd):
        rest.insert(0, keras.layers.Add(**{**kwargs, "name": f"{norm.name}_add"} if rest else kwargs))
    return tuple(rest)


def _has_linear_output(layer: Any) -> bool:
    return layer.activation in (None, keras.activations.linear) and layer.activity_regularizer is None
