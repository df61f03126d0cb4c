"""renorm=True against Keras's layer and against the formula in float64; r = 1, d = 0; argument errors."""

import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalization, BatchNormalizationAdd, to_keras

KERAS = keras.layers.BatchNormalization
if "renorm" not in KERAS().get_config():
    pytest.skip("Keras before 3.14 has no renorm", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("each_bridge")
CLIPPING = {"rmin": 0.7, "rmax": 1.4, "dmax": 0.6}
CASES = [((6, 4), -1), ((4, 5, 4), 1), ((3, 4, 2, 5), 1), ((3, 4, 2, 5), -1), ((2, 3, 2, 2, 5), 2)]


def pair(shape: tuple[int, ...], **kwargs: Any) -> tuple[Any, Any]:
    rng = np.random.default_rng(7)
    layers = [kind(renorm=True, momentum=0.8, renorm_momentum=0.6, **kwargs) for kind in (BatchNormalization, KERAS)]
    for layer in layers:
        layer.build(shape)
    layers[0].set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layers[0].weights])
    layers[1].set_weights(layers[0].get_weights())
    return layers[0], layers[1]


def close(actual: Any, wanted: Any, tolerance: float) -> None:
    assert actual.dtype == wanted.dtype
    actual, wanted = (np.asarray(tf.cast(t, tf.float64)) for t in (actual, wanted))
    assert np.abs(actual - wanted).max() <= tolerance * max(1.0, np.abs(wanted).max())


def gradients(layer: Any, x: Any, dy: Any, **kwargs: Any) -> list[Any]:
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True, **kwargs)
    return [
        y,
        *tape.gradient(y, [x, *(w.value for w in layer.trainable_weights)], output_gradients=tf.cast(dy, y.dtype)),
    ]


@pytest.mark.parametrize("policy", ["float64", "float32", "mixed_float16"])
@pytest.mark.parametrize("clipping", [None, CLIPPING, {"rmax": 1.1}, {"dmax": 0.0}], ids=str)
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_equal_to_keras(shape: Any, axis: int, clipping: Any, policy: str, rng: np.random.Generator) -> None:
    tolerance = {"float64": 1e-12, "float32": 5e-6, "mixed_float16": 4e-3}[policy]
    ours, theirs = pair(shape, axis=axis, renorm_clipping=clipping, dtype=policy)
    run = tf.function(gradients) if axis == -1 else gradients
    for _ in range(3):
        x = tf.constant(rng.normal(1, 2, shape), ours.compute_dtype)
        dy = rng.normal(size=shape)
        for actual, wanted in zip(run(ours, x, dy), gradients(theirs, x, dy), strict=True):
            close(actual, wanted, tolerance)
        for actual, wanted in zip(ours.weights, theirs.weights, strict=True):
            assert actual.name == wanted.name
            close(actual, wanted, tolerance)
        close(ours(x), theirs(x), tolerance)


@pytest.mark.parametrize(("scale", "center"), [(False, True), (True, False), (False, False)])
def test_without_gamma_or_beta_and_masked_equal_to_keras(scale: bool, center: bool, rng: np.random.Generator) -> None:
    before = keras.config.epsilon()
    keras.config.set_epsilon(0.0)  # Keras divides by the mask's sum + epsilon()
    try:
        ours, theirs = pair((4, 5, 3), scale=scale, center=center, renorm_clipping=CLIPPING, dtype="float64")
        x, dy = tf.constant(rng.normal(1, 2, (4, 5, 3))), rng.normal(size=(4, 5, 3))
        for mask in (None, tf.constant(rng.random((4, 5)) < 0.6)):
            for a, b in zip(gradients(ours, x, dy, mask=mask), gradients(theirs, x, dy, mask=mask), strict=True):
                close(a, b, 1e-12)
            for a, b in zip(ours.weights, theirs.weights, strict=True):
                close(a, b, 1e-12)
    finally:
        keras.config.set_epsilon(before)


def test_against_the_formula(rng: np.random.Generator) -> None:
    """dx uses gamma*r, dgamma = sum(dy*(xhat*r + d)). float32 with a large offset, against float64."""
    ours, _ = pair((64, 3), renorm_clipping=CLIPPING)
    gamma, beta, _, _, _, mu, sigma = (w.astype(np.float64) for w in ours.get_weights())
    x, dy = rng.normal(1e3, 2, (64, 3)).astype(np.float32), rng.normal(size=(64, 3)).astype(np.float32)
    wide, g = x.astype(np.float64), dy.astype(np.float64)
    invstd = 1 / np.sqrt(wide.var(0) + 1e-3)
    xhat = (wide - wide.mean(0)) * invstd
    r, d = np.clip(1 / (invstd * sigma), 0.7, 1.4), np.clip((wide.mean(0) - mu) / sigma, -0.6, 0.6)
    dx = gamma * r * invstd * (g - g.mean(0) - xhat * (g * xhat).mean(0))
    wanted = [gamma * (xhat * r + d) + beta, dx, (g * (xhat * r + d)).sum(0), g.sum(0)]
    for actual, right in zip(gradients(ours, tf.constant(x), dy), wanted, strict=True):
        np.testing.assert_allclose(actual, right, rtol=3e-6, atol=3e-6 * np.abs(right).max())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_r_1_and_d_0_have_the_bits_of_the_plain_layer(dtype: str, rng: np.random.Generator) -> None:
    shape = (3, 6, 5, 4)
    clipping = {"rmin": 1.0, "rmax": 1.0, "dmax": 0.0}
    ours = BatchNormalization(dtype=dtype, activation="relu", renorm=True, renorm_clipping=clipping)
    plain = BatchNormalization(dtype=dtype, activation="relu")
    for layer in (ours, plain):
        layer.build(shape)
    ours.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in ours.weights])
    plain.set_weights(ours.get_weights()[:4])
    x, dy = tf.constant(rng.normal(1, 2, shape), dtype), rng.normal(size=shape)
    for actual, wanted in zip(gradients(ours, x, dy), gradients(plain, x, dy), strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_clipping_variables_change_without_retracing(rng: np.random.Generator) -> None:
    rmax, dmax = tf.Variable(1.0), tf.Variable(0.0)
    ours, _ = pair((8, 3), renorm_clipping={"rmin": 0.0, "rmax": rmax, "dmax": dmax})
    assert len(ours.weights) == 7
    start, traces = ours.get_weights(), []

    @tf.function
    def step(x: Any) -> Any:
        traces.append(1)
        return ours(x, training=True)

    x = tf.constant(rng.normal(3, 5, (8, 3)), "float32")
    for r, d in ((1.0, 0.0), (2.0, 1.0), (9.0, 50.0)):
        rmax.assign(r)
        dmax.assign(d)
        fixed, _ = pair((8, 3), renorm_clipping={"rmin": 0.0, "rmax": r, "dmax": d})
        ours.set_weights(start)
        np.testing.assert_array_equal(step(x), fixed(x, training=True))
    assert len(traces) == 1
    config = json.loads(json.dumps(ours.get_config()))
    assert config["renorm_clipping"] == {"rmin": 0.0, "rmax": 9.0, "dmax": 50.0}
    assert BatchNormalization.from_config(config).get_config() == config


@pytest.mark.parametrize("by_channel", [False, True])
def test_an_empty_batch_changes_nothing(by_channel: bool) -> None:
    ours, _ = pair((None, 5, 4), axis=1)
    before = ours.get_weights()
    mask = tf.zeros((2, 5), tf.bool) if by_channel else tf.zeros((2, 4), tf.bool)
    ours(tf.ones((2, 5, 4)), training=True, mask=mask)
    ours(tf.ones((0, 5, 4)), training=True)
    assert all(np.array_equal(a, b) for a, b in zip(ours.get_weights(), before, strict=True))


@pytest.mark.parametrize("value", [False, True])
def test_training_as_a_tensor_residual_and_activation(value: bool, rng: np.random.Generator) -> None:
    ours, theirs = pair((6, 4), renorm_clipping=CLIPPING, dtype="float64")
    fused = BatchNormalizationAdd.from_config({**ours.get_config(), "activation": "relu"})
    fused.build([(6, 4), (6, 4)])
    fused.set_weights(ours.get_weights())
    x, residual = (tf.constant(rng.normal(1, 2, (6, 4))) for _ in range(2))
    y = tf.function(lambda x, residual, training: fused([x, residual], training=training))(
        x, residual, tf.constant(value)
    )
    close(y, tf.nn.relu(theirs(x, training=value) + residual), 1e-12)
    for actual, wanted in zip(fused.weights, theirs.weights, strict=True):
        close(actual, wanted, 1e-12)


def test_to_keras(rng: np.random.Generator) -> None:
    model = keras.Sequential([keras.Input((4,)), BatchNormalization(renorm=True, renorm_clipping=CLIPPING, name="bn")])
    model.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in model.get_weights()])
    restored = to_keras(model)
    assert type(restored.get_layer("bn")) is KERAS
    assert all(np.array_equal(a, b) for a, b in zip(restored.get_weights(), model.get_weights(), strict=True))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"renorm_clipping": {"rmax": "3"}}, TypeError, r"renorm_clipping\['rmax'\] must be a number or a scalar"),
        ({"renorm_clipping": {"rmax": float("nan")}}, ValueError, "Received: rmax=nan"),
        ({"renorm_clipping": {"rmin": -1.0}}, ValueError, "Received: rmin=-1.0"),
        ({"renorm_clipping": {"dmax": tf.Variable([1.0])}}, TypeError, "scalar tf.Variable"),
        ({"renorm_clipping": [1.0]}, TypeError, "renorm_clipping must be a dict"),
        ({"renorm_momentum": 1.5}, ValueError, r"renorm_momentum must be in \[0, 1\]. Received: 1.5"),
        ({"renorm_momentum": None}, ValueError, "renorm_momentum must be in"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BatchNormalization(renorm=True, **kwargs)
