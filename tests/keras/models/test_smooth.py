"""Smooth activations behind a batch norm: fused while traced, with Keras's values and gradients."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalization, accelerate, fold, patch, report
from bnfast.tensorflow import folding
from graph_operations import live
from keras import layers as L
from keras_models import randomize, same_steps

SHAPE = (6, 6, 4)
WORDS = {
    "swish": "silu",
    "hard_swish": "hard_silu",
    "tanh": "tanh",
    "gelu": "gelu",
    "elu": "elu",
    "selu": "selu",
    "softplus": "softplus",
    "mish": "mish",
    "hard_sigmoid": "hard_sigmoid",
    "sigmoid": "sigmoid",
}
OPERATIONS: list[tuple[Callable[[Any], Any], str]] = [
    (keras.ops.silu, "silu"),
    (keras.ops.gelu, "gelu_tanh"),
    (keras.ops.hard_silu, "hard_silu"),
    (keras.ops.tanh, "tanh"),
    (L.ELU(), "elu"),
]


def conv_bn(x: Any) -> Any:
    return L.BatchNormalization()(L.Conv2D(4, 3, padding="same")(x))


def batch(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape or (5, *SHAPE))


def every() -> Any:
    """Every smooth activation, as a layer, a name and an operation."""
    x = inputs = keras.Input(SHAPE)
    for name in WORDS:
        x = L.Activation(name)(conv_bn(x))
    for operation, _ in OPERATIONS:
        x = operation(conv_bn(x))
    return randomize(keras.Model(inputs, L.Dense(3)(L.Flatten()(x))))


def by_hand() -> Any:
    """A sum before an activation; and what isn't fused: another slope, and gates that multiply what they read."""
    inputs = keras.Input(SHAPE)
    x = L.ELU(0.5)(conv_bn(inputs))
    x = L.Activation("silu")(L.Add()([x, conv_bn(x)]))
    y = conv_bn(x)
    x = L.Multiply()([y, L.Activation("sigmoid")(y)])
    y = conv_bn(x)
    x = L.Multiply()([y, L.ReLU(6.0)(y + 3.0) * (1.0 / 6.0)])
    return randomize(keras.Model(inputs, L.Dense(3)(L.Flatten()(x))))


def alone(activation: Any) -> Any:
    inputs = keras.Input(SHAPE)
    return randomize(keras.Model(inputs, L.Dense(3)(L.Flatten()(activation(conv_bn(inputs))))))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", [*WORDS, "by hand", *range(len(OPERATIONS))])
def test_steps_equal_keras(name: Any, training: bool, each_bridge: str, float64: None) -> None:
    def make() -> Any:
        if name == "by hand":
            return by_hand()
        return alone(OPERATIONS[name][0] if isinstance(name, int) else L.Activation(name))

    # TensorFlow's gelu in float64 is off by up to 5e-9 (near z = 1.414 and 1.84), the kernels' by 4 ulp.
    tolerance = 1e-7 if name in ("gelu", 1) else 1e-9
    same_steps(accelerate(make(), verbose=False), make(), batch(), training=training, tolerance=tolerance)


@pytest.mark.parametrize("made", ["accelerate", "patch"])
def test_what_is_fused(made: str) -> None:
    if made == "patch":
        with patch():
            models = [every(), by_hand()]
    else:
        models = [accelerate(make(), verbose=False) for make in (every, by_hand)]
    wanted = [[*WORDS.values(), *(word for _, word in OPERATIONS)], ["", "add + silu", "", ""]]
    for model, words in zip(models, wanted, strict=True):
        model.compile("sgd", "mse")
        model.train_on_batch(batch(), np.zeros((5, 3)))
        assert [row.fused for row in report(model).rows] == words


class Gates(keras.Model):  # type: ignore[misc]
    """x*sigmoid(x), where Keras doesn't know the readers of x."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = L.BatchNormalization()

    def call(self, x: Any, training: Any = None) -> Any:
        y = self.norm(x, training=training)
        return y * keras.ops.sigmoid(y)


def test_a_gate_is_not_fused_where_the_readers_are_unknown(float64: None) -> None:
    """Fused, the batch norm would run twice."""
    models = [Gates() for _ in range(2)]
    for model in models:
        model(batch())
    fast = accelerate(models[0], verbose=False, bridge="op")
    same_steps(fast, models[1], batch())
    function = tf.function(lambda x: fast(x, training=True)).get_concrete_function(tf.TensorSpec([None, *SHAPE]))
    assert live(function).count("BnfastTrain") == 1


def test_predict_folds_or_takes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """conv -> BN -> ReLU folds; conv -> BN -> SiLU runs normalization and activation in one pass; equal values."""
    monkeypatch.setenv("BNFAST_BRIDGE", "op")
    for activation, inferences, convolutions in (("relu", 0, 1), ("silu", 1, 1)):
        inputs = keras.Input(SHAPE)
        model = randomize(keras.Model(inputs, L.Activation(activation)(conv_bn(inputs))))
        fast, x = accelerate(model, verbose=False), batch().astype("float32")
        np.testing.assert_allclose(fast.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-5)
        (function,) = fast.predict_function._list_all_concrete_functions()
        found = live(function)
        assert (found.count("BnfastInfer"), found.count("Conv2D")) == (inferences, convolutions)
        export = live(tf.function(lambda x, fast=fast: fast(x)).get_concrete_function(tf.TensorSpec(x.shape)))
        assert not [kind for kind in export if "Bnfast" in kind]


def test_mish_of_a_sum_with_a_folded_convolution() -> None:
    """TensorFlow has no kernel for convolution + bias + sum + x*tanh(softplus(x)), which it makes in float32."""
    by_name, by_hand = L.Activation("mish"), lambda z: z * keras.ops.tanh(keras.ops.softplus(z))
    for activation in (by_name, by_hand):
        inputs = keras.Input(SHAPE)
        model = randomize(keras.Model(inputs, activation(conv_bn(inputs) + inputs)))
        x = 9 * batch().astype("float32")
        wanted = np.asarray(model(x))
        for fast in (accelerate(model, verbose=False), fold(model), fold(accelerate(model, verbose=False))):
            np.testing.assert_allclose(fast.predict(x, verbose=0), wanted, rtol=1e-5, atol=1e-5)
    # The form that stands in for Softplus, and its gradient.
    z = tf.constant([-np.inf, -800.0, -9.0, 0.0, 9.0, 39.9, 40.1, 800.0, np.nan], tf.float64)

    @tf.function
    def both(z: Any) -> Any:
        total = tf.nn.bias_add(
            tf.nn.conv2d(tf.zeros((1, 1, 9, 1), z.dtype), tf.ones((1, 1, 1, 1), z.dtype), 1, "SAME"), [0.0]
        )
        summed = total + tf.reshape(z, (1, 1, 9, 1))
        special = folding.softplus(summed)
        return special, tf.gradients(special, z)[0], tf.math.softplus(z), tf.sigmoid(z)

    special, slope, wanted, wanted_slope = both(z)
    np.testing.assert_allclose(tf.reshape(special, [-1]), wanted, rtol=1e-14)
    np.testing.assert_allclose(slope, wanted_slope, rtol=1e-14)


def test_softplus_of_a_sum_with_a_convolution_in_half_types() -> None:
    """The form that stands in for TensorFlow's Softplus: e^12 is infinite in float16, softplus of 12 is not."""
    for dtype in (tf.float16, tf.bfloat16):

        @tf.function
        def both(z: Any) -> Any:
            zero = tf.zeros((1, 1, 64, 1), z.dtype)
            product = tf.nn.conv2d(zero, tf.ones((1, 1, 1, 1), z.dtype), 1, "SAME")
            total = tf.nn.bias_add(product, tf.zeros(1, z.dtype)) + z
            special = folding.softplus(total)
            return special, tf.gradients(special, z)[0]

        z = tf.reshape(tf.cast(tf.linspace(-20.0, 60.0, 64), dtype), (1, 1, 64, 1))
        special, slope = both(z)
        wide = tf.cast(z, tf.float32)
        precision = 2.0**-9 if dtype == tf.float16 else 2.0**-6
        np.testing.assert_allclose(tf.cast(special, tf.float32), tf.math.softplus(wide), rtol=precision, atol=precision)
        np.testing.assert_allclose(tf.cast(slope, tf.float32), tf.sigmoid(wide), rtol=precision, atol=precision)


def test_a_sigmoid_keeps_its_logits() -> None:
    """Keras's binary cross-entropy computes from the logits that its sigmoid attaches."""
    y = np.random.default_rng(2).integers(0, 2, (5, 3)).astype("float64")
    losses = []
    for kind in ("keras", "accelerate", "built in"):
        keras.utils.set_random_seed(0)
        norm = [L.BatchNormalization(), L.Activation("sigmoid")]
        norm = [BatchNormalization(activation="sigmoid")] if kind == "built in" else norm
        model = keras.Sequential([keras.Input((4,)), L.Dense(3), *norm])
        model.layers[1].gamma.assign([40.0] * 3)  # saturated: without the logits, the loss is clipped
        model = accelerate(model, verbose=False) if kind == "accelerate" else model
        model.compile("sgd", "binary_crossentropy")
        losses.append([float(model.train_on_batch(1e3 * batch(5, 4), y)) for _ in range(3)])
    np.testing.assert_allclose(losses[1:], losses[:1] * 2, rtol=1e-4)


@pytest.mark.parametrize("word", WORDS)
def test_a_gradient_penalty(word: str, each_bridge: str, float64: None) -> None:
    """Second derivatives through the fused op. A batch norm of one channel per value keeps Keras's own exact, too."""

    def step(model: Any) -> list[np.ndarray]:
        @tf.function
        def run(x: Any) -> Any:
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    y = tf.reduce_sum(tf.sin(model(x, training=True)))
                penalty = tf.reduce_sum(tape.gradient(y, x) ** 2)
            sources = [x, *(v.value for v in model.trainable_variables)]
            return outer.gradient(penalty, sources, unconnected_gradients="zero")

        return [np.asarray(gradient) for gradient in run(tf.constant(batch(6, 3)))]

    class Exact(keras.layers.BatchNormalization):  # type: ignore[misc]
        """Keras's own moments stop a term of the second derivative."""

        def _moments(self, inputs: Any, mask: Any) -> Any:
            mean = tf.reduce_mean(inputs, 0)
            return mean, tf.reduce_mean((inputs - mean) ** 2, 0)

    def make(norm: Any) -> Any:
        inputs = keras.Input((3,))
        return randomize(keras.Model(inputs, L.Activation(word)(norm()(L.Dense(4, use_bias=False)(inputs)))))

    tolerance = 1e-6 if word == "gelu" else 1e-8  # TensorFlow's is off, as above
    wanted = step(make(Exact))
    for a, b in zip(step(accelerate(make(L.BatchNormalization), verbose=False)), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_half_types_are_as_near_to_float64_as_keras(dtype: str) -> None:
    def make(policy: str) -> Any:
        inputs = keras.Input((64,))
        x = L.BatchNormalization(dtype=policy)(inputs)
        return randomize(keras.Model(inputs, L.Activation("silu", dtype=policy)(x)))

    x = batch(40, 64).astype("float32")
    truth = np.asarray(make("float64")(x, training=True))
    with tf.device("CPU"):
        errors = [
            np.abs(np.asarray(tf.function(model)(x, training=True), "float64") - truth).max()
            for model in (make(dtype), accelerate(make(dtype), verbose=False))
        ]
    assert errors[1] <= errors[0] * 1.001
