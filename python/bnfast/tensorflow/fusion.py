"""Fusion while a graph is traced: what reads a batch norm's output becomes part of the batch norm's op.

A batch norm marks its output y with a `Stage`. `add(y, residual)` and `activate(y, ...)` find the mark and emit a
second op for the same call, which computes the whole in one pass over memory. The first op stays in the graph for other
readers of y. TensorFlow prunes it if there are none, and the sum of BN + Add + activation likewise.

Gradients stay those of the ops as written: what is fused hands dy = dout*activation'(out) to y, where readers of y and
gradients at y find it.

    a stage is used only in the graph that made it, so inside one tf.function, tf.cond branch or loop body
    eager tensors carry no stage: eager calls run unfused
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from .._arguments.trace import GATES, Trace
from .batch import Batch, Options
from .custom_gradient import custom_gradient
from .reference import before_activation

__all__ = ["GATES", "Record", "Stage", "Trace", "activate", "add", "last_operation", "mark"]

_STAGE = "_bnfast_stage"  # the attribute of a tensor, as Keras's `_keras_mask`


@dataclass(eq=False)
class Record(ABC):
    """One call of a batch norm in a graph: its arguments and how to compute it."""

    batch: Batch
    moving: tuple[tf.Tensor, tf.Tensor]
    options: Options
    trace: Trace
    last: int  # the id of the last operation that the graph had before

    @abstractmethod
    def run(self, options: Options, residual: tf.Tensor | None = None) -> tf.Tensor:
        """Emits an op for the call, with these options and this residual."""

    def accepts(self, operation: str) -> bool:
        """Whether this operation should be fused with the call."""
        return self.trace.alone or operation not in GATES

    def gradient_of_residual(self, dsum: tf.Tensor) -> tf.Tensor:
        """The gradient of a residual, from that of the sum."""
        return dsum

    def gradient_before_activation(
        self, dout: tf.Tensor, z: tf.Tensor, out: tf.Tensor, options: Options, residual: tf.Tensor | None
    ) -> tf.Tensor:
        """The gradient of z, which an activation read, from that of out, the output of `run` with these arguments."""
        return before_activation(dout, z, out, options)


@dataclass(eq=False)
class Stage:
    """The mark of a tensor: the call that made it, and the residual that was added to its output."""

    record: Record
    residual: tf.Tensor | None = None


def last_operation() -> int:
    """The id of the last operation of the graph being traced."""
    return int(tf.compat.v1.get_default_graph().version) + 1


def mark(y: tf.Tensor, record: Record) -> None:
    """Marks y, the output of `run` with the record's own options, so that what reads it may be fused."""
    setattr(y, _STAGE, Stage(record))


def add(tensor: tf.Tensor, other: tf.Tensor) -> tf.Tensor | None:
    """tensor + other as part of the batch norm that made one of them, or None if neither carries a stage."""
    for y, residual in ((tensor, other), (other, tensor)):
        stage = _stage(y, "add")
        if stage is not None and stage.residual is None and _fits(y, residual, stage.record):
            break
    else:
        return None
    record = stage.record

    def forward(*_: tf.Tensor) -> Any:
        def backward(dsum: tf.Tensor) -> Any:
            return dsum, record.gradient_of_residual(dsum)

        return record.run(record.options, residual), backward

    total = custom_gradient(forward, y, residual)
    total.set_shape(y.shape)
    setattr(total, _STAGE, Stage(record, residual))
    record.trace.fused = ("add",)
    return total


def activate(tensor: tf.Tensor, activation: str, negative_slope: float = 0.2) -> tf.Tensor | None:
    """The activation of a tensor as part of the batch norm that made it, or None if it can't be or shouldn't be."""
    stage = _stage(tensor, activation)
    if stage is None:
        return None
    record, residual = stage.record, stage.residual
    options = record.options._replace(activation=activation, negative_slope=negative_slope)

    def forward(_: tf.Tensor) -> Any:
        out = record.run(options, residual)

        def backward(dout: tf.Tensor) -> Any:
            return record.gradient_before_activation(tf.convert_to_tensor(dout), tensor, out, options, residual)

        return out, backward

    out = custom_gradient(forward, tensor)
    out.set_shape(tensor.shape)
    record.trace.fused = (*record.trace.fused, activation)
    return out


def _stage(tensor: Any, operation: str) -> Stage | None:
    """The stage of a tensor, if this graph made it, nothing reads it yet, and the operation may be fused.

    With another reader the tensor is needed anyway: a fused op would be a second pass, not a saved one.
    """
    stage: Stage | None = getattr(tensor, _STAGE, None)
    if stage is None or tensor.graph is not tf.compat.v1.get_default_graph() or tensor.consumers():
        return None
    record = stage.record
    if len(record.trace.fused) >= record.trace.most or not record.accepts(operation):
        return None
    return None if _may_wait(tensor.graph._current_control_dependencies(), record) else stage


def _fits(y: tf.Tensor, residual: Any, record: Record) -> bool:
    """Whether the op of the step can add the residual: no broadcasting that the graph knows of, no cast, no cycle."""
    if not isinstance(residual, tf.Tensor) or getattr(residual, "graph", None) is not y.graph or y.shape.rank is None:
        return False
    alike = residual.shape.rank == y.shape.rank and list(residual.shape) == list(y.shape)
    return alike and residual.dtype == y.dtype and not _may_wait([residual.op], record)


def _may_wait(operations: Iterable[Any], record: Record) -> bool:
    """Whether operations may depend on statistics that a batch norm updates after this call was emitted.

    With a layer that is called twice, or a script that reads moving_mean, the call would wait for itself. Looks at
    operations that are newer than the call, and gives up at 64 of them.
    """
    seen: set[int] = set()
    waiting = list(operations)
    while waiting:
        op = waiting.pop()
        if op._id <= record.last or op._id in seen:
            continue
        seen.add(op._id)
        resources = [tensor for tensor in op.inputs if tensor.dtype == tf.resource]
        if len(seen) > 64 or any(_is_assigned(handle) for handle in resources):
            return True
        waiting += [tensor.op for tensor in op.inputs] + list(op.control_inputs)
    return False


def _is_assigned(handle: tf.Tensor) -> bool:
    """Whether anything but a plain read uses the variable in this graph."""
    return any(reader.type != "ReadVariableOp" for reader in handle.consumers())
