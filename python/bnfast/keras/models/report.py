"""The state of a model's batch norms, one row per layer; printed, one line per group of equal rows.

state   "bnfast", or "keras": the layer runs Keras's own code, or that of a derived class
fused   what the last training call of the layer that was traced is fused with: "relu", "add", "add + relu" ...
bridge  how TensorFlow calls the kernels: "numpy_function" or "op"; "tensorflow": its own ops compute instead. On other
        backends of Keras "torch" or "jax", or "keras.ops" where these compute instead. "" if the state is "keras"
reason  why the state is "keras", or why nothing is fused; "" otherwise
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import keras

from ..layers import arguments
from ..layers.batch_norm import KERAS
from ..layers.batch_norm_add import BatchNormalizationAdd
from ..layers.framework import FUSES, ON_TENSORFLOW, choose_bridge, scalars, why_slower
from .norms import OURS, norms
from .patch import PatchedBatchNormalization, overridden, uses_bnfast
from .text import check_verbose, html_table, listed, table

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # heads and rows
_COLUMNS = ("state", "fused", "bridge", "reason")


@dataclass(frozen=True)
class Row:
    """One batch norm, identified by its name, or by its path if several have that name."""

    name: str
    state: str
    fused: str
    bridge: str
    reason: str


@dataclass(frozen=True)
class Report:
    """All batch norms of a model, in the order of the data flow.

    str(), and what a notebook shows, is a table with one line per group of layers that have the same state, fused,
    bridge and reason; text(verbose=2) has one line per layer.
    """

    model: str
    rows: tuple[Row, ...]

    @property
    def keras(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.state == "keras")

    def __str__(self) -> str:
        return self.text()

    def text(self, verbose: int = 1) -> str:
        """The table: one line per group, or with verbose=2 per layer."""
        whole = check_verbose(verbose) == 2
        return "\n".join([self._title(), *table(*(self._layers() if whole else self._groups()))])

    def _repr_html_(self) -> str:
        return html_table(self._title(), *self._groups())

    def _title(self) -> str:
        ours = len(self.rows) - len(self.keras)
        fused = sum(bool(row.fused) for row in self.rows)
        return f"{self.model}: {ours} of {len(self.rows)} batch norms on bnfast, {fused} fused"

    def _layers(self) -> Table:
        return ("layer", *_COLUMNS), [(row.name, *_kind(row)) for row in self.rows]

    def _groups(self) -> Table:
        groups: dict[tuple[str, ...], list[str]] = {}
        for row in self.rows:
            groups.setdefault(_kind(row), []).append(row.name)
        rows = [(str(len(names)), *kind, listed(names)) for kind, names in groups.items()]
        return ("count", *_COLUMNS, "layers"), rows


def _kind(row: Row) -> tuple[str, ...]:
    return row.state, row.fused, row.bridge, row.reason


def report(model: Any) -> Report:
    """Which batch norms of a Keras model run on bnfast, what is fused with them, and why not. print() the result.

    The table has one line per group of layers that are alike; `report(model).text(verbose=2)` one per layer.

    Args:
        model: a keras.Model, accelerated or not.

    Returns:
        A Report: `rows`, one per batch norm, with name, state ("bnfast" or "keras"), fused, bridge and reason.

    Example:
        >>> import keras
        >>> from bnfast.keras import report
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="norm")])
        >>> report(model).rows[0].state
        'keras'
    """
    found = list(norms(model))
    times = Counter(layer.name for layer in found)
    names = [layer.name if times[layer.name] == 1 else layer.path or layer.name for layer in found]
    return Report(model.name, tuple(_row(name, layer) for name, layer in zip(names, found, strict=True)))


def shape_of(norm: Any) -> tuple[int | None, ...] | None:
    """The shape of a batch norm's input in the first model that calls it; None if no model does directly."""
    nodes = norm._inbound_nodes
    return tuple(nodes[0].input_tensors[0].shape) if nodes else None


def _row(name: str, layer: Any) -> Row:
    if type(layer) not in OURS or not uses_bnfast(layer):
        reason = why_unchanged(layer, shape_of(layer)) or "accelerate() has not been applied"
        return Row(name, "keras", "", "", reason)
    built_in = layer._built_in(layer._features)
    add = ("add",) if isinstance(layer, BatchNormalizationAdd) else ()
    trace = layer._bnfast_trace
    fused = (*add, *filter(None, [built_in and built_in.activation]), *(trace.fused if trace else ()))
    return Row(name, "bnfast", " + ".join(fused), _bridge(layer), "" if fused else _why_unfused(layer))


def _why_unfused(layer: Any) -> str:
    if layer.activity_regularizer is not None:
        return "it has an activity regularizer, which reads its output"
    features, trace = layer._features, layer._bnfast_trace
    if features.activation is not keras.activations.linear:
        return "its activation is not one that the kernels have"
    if not layer.trainable:
        return "it is frozen"
    if not FUSES:
        return "PyTorch's calls aren't fused: pass the activation to bnfast.keras.BatchNormalization"
    if trace is None:
        return "no training call of it has been seen yet"
    if not isinstance(layer.axis, int) or features.virtual_batch_size is not None or features.adjustment is not None:
        return "several axes, virtual_batch_size or adjustment change its output after the kernel"
    if not trace.in_graph:
        return "its last training call ran eagerly, and only graphs are fused"
    functions = "tf.nn functions" if ON_TENSORFLOW else "jax.nn functions, selu, leaky_relu"
    return f"no activation or add of Keras's alone reads its output ({functions} and + aren't seen)"


def _bridge(layer: Any) -> str:
    try:
        return choose_bridge(layer._features.bridge)
    except RuntimeError:  # the op was asked for and can't be loaded: training will raise the reason
        return str(layer._features.bridge)


def why_unchanged(layer: Any, shape: tuple[int | None, ...] | None, bridge: str = "auto") -> str | None:
    """Why `accelerate` leaves this batch norm unchanged, or None. shape: that of its input, None if unknown."""
    kind = type(layer)
    if (reason := overridden(layer)) is not None:
        return reason
    if kind not in (KERAS, PatchedBatchNormalization):
        return f"{kind.__name__} is a class of its own: what it computes is unknown"
    if getattr(layer, "renorm", False) and layer.synchronized:
        return "renorm=True with synchronized=True is not supported"
    if layer.dtype_policy.quantization_mode is not None:
        return "it is quantized"
    if not layer.built:
        return "it is not built"
    for name in arguments.SCALARS:
        value = getattr(layer, name)
        if any(value is weight for weight in layer.weights):
            return f"{name} is a keras.Variable and so one of the layer's weights (a tf.Variable isn't)"
        if isinstance(value, (int, float)) and not scalars.in_range(name, value):
            return f"{name}={value} is out of range"
        try:
            arguments.checked(name, value)
        except (TypeError, ValueError) as error:
            return str(error)
    return why_slower(shape, layer.compute_dtype, bridge)
