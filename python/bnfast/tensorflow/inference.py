"""Batch normalization in inference mode.

    y = activation(gamma*(x - moving_mean)/sqrt(moving_variance + epsilon) + beta + residual)

Computes in float32, or in float64 for float64 x. After a convolution or matrix product of this graph the batch norm is
folded into that op (`folding`). Elsewhere it is made of TensorFlow's own ops, so that an exported graph runs without
bnfast. 4-D channels_last uses TensorFlow's fused op: (32, 56, 56, 64) takes 2.2 ms, Keras's own ops 4.0 ms. Other
layouts use those ops: fused channels_first is slower (5.0 ms against 2.8 ms), other ranks gain nothing, and float64 has
no fused op.

Graphs that are traced inside `on_kernels()`, which nobody exports, run bnfast's op instead, and what follows the batch
norm is fused with it: one pass over memory in place of two or three.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import tensorflow as tf
from tensorflow.python.framework.func_graph import FuncGraph
from tensorflow.python.ops.control_flow_v2_func_graphs import ControlFlowFuncGraph

from . import fusion, op, scalars
from .batch import Batch, Options, compute_dtype, per_channel
from .folding import fold
from .reference import SMOOTH, activate

_KERAS_STEP = "one_step_on_data"  # the tf.function that Keras calls in the one of `evaluate`

_local = threading.local()


@contextmanager
def on_kernels() -> Iterator[None]:
    """Graphs that this thread traces inside may hold bnfast's op for inference."""
    before, _local.on_kernels = getattr(_local, "on_kernels", False), True
    try:
        yield
    finally:
        _local.on_kernels = before


def infer(
    batch: Batch,
    moving: tuple[tf.Tensor, tf.Tensor],
    options: Options,
    bridge: str = "auto",
    trace: fusion.Trace | None = None,
) -> tf.Tensor:
    """y in the shape and dtype of x. gamma, beta and the moving mean and variance have shape (C,) and any float dtype.

    The mask of the batch is ignored.

    Args:
        trace: if given, what reads y may be fused with it. Batch and options then have no residual and no activation.
    """
    on_kernels = _may_run_on_kernels(bridge)
    last = fusion.last_operation() if on_kernels else 0
    y = fold(batch, moving, options, _normalize)
    folded = y is not None
    if on_kernels and (not folded or options.activation in SMOOTH):
        y = op.infer(batch, moving, options)
    else:
        y = y if folded else _normalize(batch, moving, options)
        y = activate(y if batch.residual is None else y + batch.residual, options)
    if on_kernels and trace is not None:
        fusion.mark(y, _Call(batch, moving, options, trace, last, folded))
    return y


@dataclass(eq=False)
class _Call(fusion.Record):
    """One call, which may run on bnfast's op."""

    folded: bool

    def accepts(self, operation: str) -> bool:
        """TensorFlow adds a relu or a sum to a product at no cost; a smooth activation takes it two passes or more."""
        return super().accepts(operation) and (not self.folded or operation in SMOOTH)

    def run(self, options: Options, residual: tf.Tensor | None = None) -> tf.Tensor:
        return op.infer(self.batch._replace(residual=residual), self.moving, options)


def _may_run_on_kernels(bridge: str) -> bool:
    """Whether `on_kernels` means this graph. A tf.function that is called in it may be exported by somebody else."""
    if not (tf.inside_function() and getattr(_local, "on_kernels", False)):
        return False
    graph = tf.compat.v1.get_default_graph()
    while isinstance(graph, ControlFlowFuncGraph):  # a branch or the body of a loop
        graph = graph.outer_graph
    outermost = not isinstance(getattr(graph, "outer_graph", None), FuncGraph)
    return (outermost or graph.name.startswith(_KERAS_STEP)) and op.choose(bridge) == "op"


def _normalize(batch: Batch, moving: tuple[tf.Tensor, tf.Tensor], options: Options) -> tf.Tensor:
    x = batch.x
    fused = x.shape.rank == 4 and options.axis % 4 == 3 and x.dtype != tf.float64
    return (_fused if fused else _unfused)(batch, moving, options)


def _fused(batch: Batch, moving: tuple[tf.Tensor, tf.Tensor], options: Options) -> tf.Tensor:
    # The raw op: tf.compat.v1.nn.fused_batch_norm silently raises an epsilon below 1.001e-5 to that value.
    mean, variance = (tf.cast(statistic, tf.float32) for statistic in moving)
    epsilon = options.epsilon
    if tf.is_tensor(epsilon):  # the op's epsilon is an attribute
        variance, epsilon = variance + tf.cast(epsilon, tf.float32), 0.0
    return tf.raw_ops.FusedBatchNormV3(
        x=batch.x,
        scale=tf.ones_like(mean) if batch.gamma is None else tf.cast(batch.gamma, tf.float32),
        offset=tf.zeros_like(mean) if batch.beta is None else tf.cast(batch.beta, tf.float32),
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        is_training=False,
    ).y


def _unfused(batch: Batch, moving: tuple[tf.Tensor, tf.Tensor], options: Options) -> tf.Tensor:
    def vector(values: tf.Tensor | None) -> tf.Tensor | None:
        return None if values is None else per_channel(values, batch.x, options.axis)

    x = tf.cast(batch.x, compute_dtype(batch.x))
    y = tf.nn.batch_normalization(
        x,
        mean=vector(moving[0]),
        variance=vector(moving[1]),
        offset=vector(batch.beta),
        scale=vector(batch.gamma),
        variance_epsilon=scalars.like(options.epsilon, x),
    )
    return tf.cast(y, batch.x.dtype)
