"""Fusion while JAX traces: what reads a batch norm's output becomes part of the batch norm's call.

A batch norm marks its output y. `add(y, residual)` and `activate(y, ...)` find the mark and emit the same call anew,
with the sum and the activation built in, as a function of x, gamma, beta and the residual. Variables that hold the
first call's moving statistics get those of the second, which are the same bits. Nothing reads the first call then, and
it is dropped, as a custom call without side effects. Where something else reads y, the first call stays, and its
gradient is that of y: so every gradient is right, at the price of a second call.

    a mark counts in the trace and in the Keras scope that made it: not in a loop body or a checkpoint around or inside
    an array with a value carries no mark: outside of jit, also under jax.grad, calls run as they are written
    a variable that has changed since (a layer called twice) keeps its value: then nothing is fused
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.extend
from keras.src.backend.common.stateless_scope import get_stateless_scope

from ...._arguments.trace import GATES, Trace
from ....jax import support
from .batch import Options

__all__ = ["GATES", "Trace", "activate", "add", "keep", "mark", "updated"]

Run = Callable[[Options, Any], tuple[Any, Any, Any]]  # options, residual -> y, moving mean, moving variance


@dataclass(eq=False)
class Record:
    """One call of a batch norm: how to run it anew, and where it was traced.

    It is kept as long as y, so it must not lead to y: what may depend on y is held by weak references.
    """

    run: Run
    options: Options
    trace: Trace
    state: Any  # JAX's, of the trace that made it
    scope: Any  # of Keras, which holds the values of variables: a weak reference, or None
    updates: list[tuple[Any, Any]] = field(default_factory=list)  # variables, and weakly the values that they got

    def updated(self, variables: list[Any]) -> None:
        """Notes that these variables, the moving mean and variance, have got what the call returned."""
        self.updates = [(variable, weakref.ref(variable.value)) for variable in variables]

    def is_current(self) -> bool:
        """Whether we are in the trace and scope of the call, and the variables hold what it returned."""
        if self.state != _trace_state():
            return False
        scope = get_stateless_scope()
        here = self.scope is scope if scope is None else self.scope is not None and self.scope() is scope
        return not self.updates or (here and all(variable.value is value() for variable, value in self.updates))


@dataclass(eq=False)
class Stage:
    """The mark of a tensor: the call that made it, and the residual that was added to its output."""

    record: Record
    residual: Any = None


_stages: dict[int, tuple[Any, Stage]] = {}  # by the id of a tracer, which has no room for an attribute and no hash


def keep(x: Any) -> None:
    """Marks x as a tensor that something else will read: nothing is folded here."""


def mark(y: Any, x: Any, run: Run, options: Options, trace: Trace) -> None:
    """Marks y, the output of `run` with these options, so that what reads it may be fused."""
    trace.in_graph = _is_staged()
    state = _trace_state()
    if trace.in_graph and state is not None and isinstance(y, jax.core.Tracer) and support.way(x) == support.KERNELS:
        scope = get_stateless_scope()
        _set(y, Stage(Record(run, options, trace, state, None if scope is None else weakref.ref(scope))))


def updated(y: Any, variables: list[Any]) -> None:
    """Notes that these variables, the moving mean and variance, have got what the call that made y returned."""
    stage = _get(y)
    if stage is not None:
        stage.record.updated(variables)


def add(tensor: Any, other: Any) -> Any:
    """tensor + other as part of the batch norm that made one of them, or None if neither carries a mark."""
    for y, residual in ((tensor, other), (other, tensor)):
        stage = _stage(y, "add")
        if stage is None or stage.residual is not None:
            continue
        if isinstance(residual, jax.Array) and residual.shape == y.shape and residual.dtype == y.dtype:
            record = stage.record
            total = _emit(record, record.options, residual)
            _set(total, Stage(record, residual))
            record.trace.fused = ("add",)
            return total
    return None


def activate(tensor: Any, activation: str) -> Any:
    """The activation of a tensor as part of the batch norm that made it, or None if it can't be or shouldn't be."""
    stage = _stage(tensor, activation)
    if stage is None:
        return None
    record = stage.record
    out = _emit(record, record.options._replace(activation=activation), stage.residual)
    record.trace.fused = (*record.trace.fused, activation)
    return out


def _emit(record: Record, options: Options, residual: Any) -> Any:
    y, *statistics = record.run(options, residual)
    variables = [variable for variable, _ in record.updates]
    for variable, value in zip(variables, statistics, strict=False):  # without updates there are no variables
        variable.assign(value.reshape(variable.shape))
    record.updated(variables)
    return y


def _stage(tensor: Any, operation: str) -> Stage | None:
    """The stage of a tensor, if it is of this trace and scope, and the operation may be fused."""
    stage = _get(tensor)
    if stage is None:
        return None
    record = stage.record
    trace = record.trace
    if len(trace.fused) >= trace.most or not (trace.alone or operation not in GATES):
        return None
    return stage if record.is_current() else None


def _set(y: Any, stage: Stage) -> None:
    def forget(_: Any, key: int = id(y), stages: dict[int, Any] = _stages) -> None:  # at exit globals are gone
        stages.pop(key, None)

    _stages[id(y)] = weakref.ref(y, forget), stage


def _get(y: Any) -> Stage | None:
    found = _stages.get(id(y))
    return found[1] if found is not None and found[0]() is y else None


def _is_staged() -> bool:
    """Whether operations become part of a program, as inside of jax.jit, rather than run at once."""
    return isinstance(jax.numpy.zeros(()), jax.core.Tracer)


def _trace_state() -> Any:
    """What tells the innermost trace from any other; None if this JAX doesn't say."""
    for module in (getattr(jax.extend, "core", None), jax.core):  # JAX 0.7 and later; earlier
        state = getattr(module, "get_opaque_trace_state", None)
        if state is not None:
            return state(convention="nnx")
    return None
