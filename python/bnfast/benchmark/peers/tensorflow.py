"""TensorFlow's fused batch norm op, called eagerly (a tf.function around one op costs more than it saves).

train and infer call tf.compat.v1.nn.fused_batch_norm; grad calls tf.raw_ops.FusedBatchNormGradV3, as its gradient does.
The op needs four axes, so a dense layer is passed as (N, 1, 1, C).
"""

from __future__ import annotations

from typing import Any

from bnfast._arguments.arrays import Array
from bnfast.benchmark import quiet
from bnfast.benchmark.cases import EPSILON, MOMENTUM, Arrays, Case
from bnfast.benchmark.peers.base import Calls, Peer, Unsupported


def start(threads: int) -> Any:
    """Import TensorFlow without its log lines, `threads` threads in each of its two pools.

    Raises RuntimeError if TensorFlow already runs with another number.
    """
    quiet.prepare_tensorflow()
    with quiet.quiet_stderr():
        import tensorflow as tf

        config = tf.config.threading
        pools = (config.get_intra_op_parallelism_threads(), config.get_inter_op_parallelism_threads())
        if pools != (threads, threads):
            config.set_intra_op_parallelism_threads(threads)
            config.set_inter_op_parallelism_threads(threads)
        tf.constant(0)
    return tf


class TensorFlow(Peer):
    """tf.compat.v1.nn.fused_batch_norm."""

    name = "tensorflow"
    title = "TF fused op"
    distribution = "tensorflow"

    def __init__(self, threads: int) -> None:
        self.tf = start(threads)

    def version(self) -> str:
        return str(self.tf.__version__)

    def prepare(self, case: Case, arrays: Arrays) -> Calls:
        if case.dtype == "float64":
            raise Unsupported("the fused op does not support float64")
        tf = self.tf
        fused_shape, data_format = _four_axes(case)
        x = tf.reshape(arrays.keep("tf x", lambda: tf.constant(arrays.x)), fused_shape)
        gamma, beta = tf.constant(arrays.gamma), tf.constant(arrays.beta)
        moving = tf.constant(arrays.moving_mean), tf.constant(arrays.moving_variance)
        if case.op == "grad":
            return self._grad(case, arrays, x, gamma, beta)
        training = case.op == "train"
        fused_batch_norm = tf.compat.v1.nn.fused_batch_norm
        factor = MOMENTUM if training else 1.0  # inference accepts only the default, 1

        def fresh() -> Any:
            return fused_batch_norm(x, gamma, beta, *moving, EPSILON, data_format, training, None, factor)

        return Calls(fresh, lambda result: {"y": result[0].numpy().reshape(case.array_shape)})

    def _grad(self, case: Case, arrays: Arrays, x: Any, gamma: Any, beta: Any) -> Calls:
        tf = self.tf
        fused_shape, data_format = _four_axes(case)
        dy = tf.reshape(arrays.keep("tf dy", lambda: tf.constant(arrays.dy)), fused_shape)
        attributes = {"epsilon": EPSILON, "data_format": data_format, "is_training": True}
        forward = tf.raw_ops.FusedBatchNormV3(x=x, scale=gamma, offset=beta, mean=beta, variance=gamma, **attributes)
        saved = {f"reserve_space_{k}": getattr(forward, f"reserve_space_{k}") for k in (1, 2, 3)}
        backward = tf.raw_ops.FusedBatchNormGradV3

        def fresh() -> Any:
            return backward(y_backprop=dy, x=x, scale=gamma, **saved, **attributes)

        def read(result: Any) -> dict[str, Array]:
            dx, dgamma, dbeta = (tensor.numpy() for tensor in result[:3])
            return {"dx": dx.reshape(case.array_shape), "dgamma": dgamma, "dbeta": dbeta}

        return Calls(fresh, read)


def _four_axes(case: Case) -> tuple[tuple[int, ...], str]:
    """The shape (N, S, 1, C) or (N, C, S, 1), and its data format. The memory, and the op's work, stay the same."""
    s = case.shape
    inner = s.size // (s.n * s.c)
    return ((s.n, s.c, inner, 1), "NCHW") if case.layout == "channels_first" else ((s.n, inner, 1, s.c), "NHWC")
