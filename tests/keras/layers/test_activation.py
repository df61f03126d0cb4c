"""activation=: which activations are fused, equality of fused and separate activations, and accepted arguments."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalization
from bnfast.keras.layers import activation
from bnfast.keras.layers.activation import Fused


class MyReLU(keras.layers.ReLU):  # type: ignore[misc]
    """A subclass of ReLU could compute something else, so it must not be fused."""


class Callable:
    """An activation object that can't be hashed."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, x: Any) -> Any:
        return x * x


RELU, LEAKY = Fused("relu"), Fused("leaky_relu", 0.2)
CASES = {
    "None": (None, Fused(None)),
    "linear": ("linear", Fused(None)),
    "name relu": ("relu", RELU),
    "name relu6": ("relu6", Fused("relu6")),
    "name leaky_relu": ("leaky_relu", LEAKY),
    "relu": (keras.activations.relu, RELU),
    "relu6": (keras.activations.relu6, Fused("relu6")),
    "leaky_relu": (keras.activations.leaky_relu, LEAKY),
    "ReLU()": (keras.layers.ReLU(), RELU),
    "ReLU(6)": (keras.layers.ReLU(max_value=6), Fused("relu6")),
    "ReLU(slope)": (keras.layers.ReLU(negative_slope=0.3), Fused("leaky_relu", 0.3)),
    "LeakyReLU()": (keras.layers.LeakyReLU(), Fused("leaky_relu", 0.3)),
    "LeakyReLU(0)": (keras.layers.LeakyReLU(0.0), RELU),
    "Activation(relu)": (keras.layers.Activation("relu"), RELU),
    "Activation(leaky)": (keras.layers.Activation("leaky_relu"), LEAKY),
    "ReLU(5)": (keras.layers.ReLU(max_value=5), None),
    "ReLU(6, slope)": (keras.layers.ReLU(max_value=6, negative_slope=0.1), None),
    "ReLU(threshold)": (keras.layers.ReLU(threshold=0.5), None),
    "ReLU(regularized)": (keras.layers.ReLU(activity_regularizer="l2"), None),
    "ReLU(float64)": (keras.layers.ReLU(dtype="float64"), None),
    "subclass": (MyReLU(), None),
    "ELU()": (keras.layers.ELU(), None),
    "gelu": ("gelu", Fused("gelu")),
    "swish": ("swish", Fused("silu")),
    "hard_swish": ("hard_swish", Fused("hard_silu")),
    "mish": (keras.activations.mish, Fused("mish")),
    "Activation(tanh)": (keras.layers.Activation("tanh"), Fused("tanh")),
    "softsign": ("softsign", None),
    "lambda": (lambda x: 3 * x, None),
    "object": (Callable(), None),
}


@pytest.mark.parametrize("case", CASES)
def test_which_activations_are_fused(case: str) -> None:
    given, wanted = CASES[case]
    assert activation.fuse(activation.get(given), "float32") == wanted


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_separate_activation(case: str, training: bool, graph: bool, rng: np.random.Generator) -> None:
    """Values and gradients equal those of Keras's layer followed by the same activation object."""
    given = CASES[case][0]
    apply = keras.activations.get(given)
    x = tf.constant(rng.normal(size=(4, 3, 3, 5)), "float32")
    gamma, beta, mean, variance = (rng.uniform(1, 4, 5) for _ in range(4))
    results = []
    for layer, after in ((BatchNormalization(activation=given), None), (keras.layers.BatchNormalization(), apply)):
        layer.build(x.shape)
        layer.set_weights([gamma, beta, mean, variance])

        def step(x: Any, layer: Any = layer, after: Any = after) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=training)
                y = y if after is None else tf.cast(after(y), "float32")
            return [y, *tape.gradient(y, [x, layer.gamma.value, layer.beta.value])]

        results.append((tf.function(step) if graph and after is None else step)(x))
    y, wanted = (result[0] for result in results)
    assert np.ptp(wanted) > 0.5
    for actual, right in zip(*results, strict=True):
        np.testing.assert_allclose(actual, right, rtol=1e-5, atol=2e-5)
    assert (y.dtype, y.shape) == (wanted.dtype, wanted.shape)


def test_an_activation_with_weights_trains(rng: np.random.Generator) -> None:
    layer = BatchNormalization(activation=keras.layers.PReLU(alpha_initializer="ones"))
    layer.build((None, 4))
    assert [w.name for w in layer.weights] == ["gamma", "beta", "moving_mean", "moving_variance", "alpha"]
    assert len(layer.trainable_weights) == 3
    x = tf.constant(rng.normal(size=(6, 4)), "float32")
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x, training=True) ** 2)
    assert all(np.abs(g).max() > 0 for g in tape.gradient(loss, layer.activation.trainable_variables))


def test_losses_of_an_activation_layer_are_collected(rng: np.random.Generator) -> None:
    layer = BatchNormalization(activation=keras.layers.ReLU(activity_regularizer="l2"))
    layer(tf.constant(rng.normal(size=(6, 4)), "float32"), training=True)
    assert len(layer.losses) == 1


def test_an_activation_layer_that_changes_the_shape() -> None:
    layer = BatchNormalization(activation=keras.layers.Flatten())
    assert layer(keras.Input((3, 4))).shape == (None, 12)
    assert layer(tf.ones([2, 3, 4]), training=True).shape == (2, 12)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_an_activation_layer_is_fused_only_with_the_same_dtype(policy: str) -> None:
    compute = keras.DTypePolicy(policy).compute_dtype
    assert activation.fuse(keras.layers.ReLU(dtype=policy), compute) == RELU
    assert activation.fuse(keras.layers.ReLU(dtype="float32"), compute) is None
    assert activation.fuse(keras.activations.relu, compute) == RELU
