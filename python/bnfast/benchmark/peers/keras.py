"""Keras 3's BatchNormalization on TensorFlow: eager, in a tf.function, and in a tf.function compiled by XLA.

grad is the gradient of a recorded forward, taken repeatedly from a persistent tape. Under tf.function the gradient is a
function of its own, so it is timed without the forward.
"""

from __future__ import annotations

from typing import Any, ClassVar

from bnfast._arguments.arrays import Array
from bnfast.benchmark.cases import EPSILON, MOMENTUM, Arrays, Case
from bnfast.benchmark.peers.base import Calls, Peer
from bnfast.benchmark.peers.tensorflow import start

POLICIES = {"float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}


class _Keras(Peer):
    distribution = "keras"
    function: ClassVar[dict[str, bool] | None]  # the arguments of tf.function; None: eager

    def __init__(self, threads: int) -> None:
        self.tf = start(threads)
        import keras

        if keras.backend.backend() != "tensorflow":
            raise ImportError(f"Keras runs on {keras.backend.backend()}")
        self.keras = keras

    def version(self) -> str:
        return str(self.keras.__version__)

    def prepare(self, case: Case, arrays: Arrays) -> Calls:
        tf = self.tf
        layer = self.keras.layers.BatchNormalization(
            axis=case.axis, momentum=MOMENTUM, epsilon=EPSILON, dtype=POLICIES.get(case.dtype, case.dtype)
        )
        layer.build(case.array_shape)
        layer.set_weights([arrays.gamma, arrays.beta, arrays.moving_mean, arrays.moving_variance])
        x = arrays.keep("tf x", lambda: tf.constant(arrays.x))
        training = case.op != "infer"

        def call(x: Any) -> Any:
            return layer(x, training=training)

        forward = call if self.function is None else tf.function(call, **self.function)
        if case.op != "grad":
            return Calls(lambda: forward(x), lambda y: {"y": y.numpy()})
        dy = arrays.keep("tf dy", lambda: tf.constant(arrays.dy))
        sources = [x, layer.gamma.value, layer.beta.value]
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = forward(x)

        def fresh() -> Any:
            return tape.gradient(y, sources, output_gradients=dy)

        def read(result: Any) -> dict[str, Array]:
            dx, dgamma, dbeta = (tensor.numpy() for tensor in result)
            return {"dx": dx, "dgamma": dgamma, "dbeta": dbeta}

        return Calls(fresh, read)


class KerasEager(_Keras):
    """The layer, called eagerly."""

    name = "keras-eager"
    title = "Keras eager"
    function = None


class KerasFunction(_Keras):
    """The layer inside tf.function, as in `fit` without XLA."""

    name = "keras-function"
    title = "Keras tf.function"
    function: ClassVar[dict[str, bool] | None] = {}


class KerasXla(_Keras):
    """The layer inside tf.function(jit_compile=True), as in `fit` with XLA."""

    name = "keras-xla"
    title = "Keras XLA"
    function: ClassVar[dict[str, bool] | None] = {"jit_compile": True}
