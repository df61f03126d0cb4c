"""momentum and epsilon as variables and tensors: read at every call, equal to Keras's layer, floats in a config."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import bnfast.keras
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalization, BatchNormalizationAdd, ConditionalBatchNormalization

pytestmark = pytest.mark.usefixtures("each_bridge")

MOVING = ("moving_mean", "moving_variance")


def train(layer: Any, x: Any, **kwargs: Any) -> Any:
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True, **kwargs)
    return [y, tape.gradient(y, x, output_gradients=tf.cast(tf.cos(x), y.dtype))]


@pytest.mark.parametrize("shape", [(16, 5), (4, 3, 6, 5)])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_variables_that_change_equal_keras(graph: bool, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    """One traced function: assigning to the variables needs no new trace."""
    momentum, epsilon = tf.Variable(0.9), tf.Variable(1e-3)
    ours, theirs = BatchNormalization(momentum=momentum, epsilon=epsilon), keras.layers.BatchNormalization()
    theirs.momentum, theirs.epsilon = momentum, epsilon
    ours.build(shape)
    theirs.build(shape)
    functions = [tf.function(train) if graph else train for _ in range(2)]
    for weight, small in ((0.9, 1e-3), (0.5, 0.3), (0.0, 0.0), (1.0, 2.0), (0.25, 1e-5)):
        momentum.assign(weight)
        epsilon.assign(small)
        x = tf.constant(rng.normal(3, 2, shape), tf.float32)
        for actual, wanted in zip(functions[0](ours, x), functions[1](theirs, x), strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)
        for name in MOVING:
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-5)
        np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    if graph:
        assert functions[0].experimental_get_tracing_count() == 1


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"activation": "relu"},
    "sample variance": {"correction": 1, "nan_policy": "skip_update"},
    "several axes": {"axis": [1, 3]},
    "ghosts": {"virtual_batch_size": 2},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 1.2, "dmax": 0.3}},
    "adjustment": {"adjustment": lambda shape: (tf.fill([shape[0], 1, 1, 1], 1.5), tf.constant(0.25))},
    "frozen statistics": {"use_batch_statistics": False},
    "average": {"momentum": None},
    "half": {"dtype": "mixed_float16"},
    "float64": {"dtype": "float64"},
    "one replica": {"synchronized": True},
}


@pytest.mark.parametrize("masked", ["no mask", "mask", "mask by channel"])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_every_feature_computes_as_with_floats(
    graph: bool, feature: str, masked: str, rng: np.random.Generator
) -> None:
    kwargs = FEATURES[feature]
    x = tf.constant(rng.normal(3, 2, (6, 4, 3, 5)), "float64" if feature == "float64" else "float32")
    several = feature == "several axes"
    shape = {"no mask": None, "mask": (6, 3) if several else (6, 4, 3), "mask by channel": (6, 4, 3)}[masked]
    mask = None if shape is None else tf.constant(rng.random(shape) < 0.7)
    if mask is not None and masked == "mask by channel":
        x._keras_mask = mask  # with axis 1, the layer reads it along the last axis
        if not several:
            kwargs = {**kwargs, "axis": 1}
    momentum, epsilon = tf.Variable(0.9, dtype=tf.float64), tf.Variable(1e-3, dtype=tf.float64)
    tensors = BatchNormalization(**{"momentum": momentum, **kwargs}, epsilon=epsilon)
    floats = BatchNormalization(**{"momentum": 0.9, **kwargs})
    run = tf.function(train, reduce_retracing=True) if graph else train
    for weight, small in ((0.75, 0.1), (0.3, 0.01)):
        momentum.assign(weight)
        epsilon.assign(small)
        floats.momentum, floats.epsilon = kwargs.get("momentum", weight), small
        for actual, wanted in zip(run(tensors, x, mask=mask), train(floats, x, mask=mask), strict=True):
            np.testing.assert_allclose(tf.cast(actual, "float64"), tf.cast(wanted, "float64"), rtol=2e-3, atol=2e-3)
        for actual, wanted in zip(tensors.variables, floats.variables, strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-6, atol=1e-7)


def test_the_other_layers_accept_variables(rng: np.random.Generator) -> None:
    momentum, epsilon = tf.Variable(0.5), tf.constant(0.25)
    x = tf.constant(rng.normal(size=(8, 3)), tf.float32)
    labels = tf.constant(rng.integers(0, 2, 8))
    for made, inputs in (
        (BatchNormalizationAdd, [x, x]),
        (lambda **k: ConditionalBatchNormalization(2, **k), [x, labels]),
    ):
        layers = [made(momentum=m, epsilon=e) for m, e in ((momentum, epsilon), (0.5, 0.25))]
        ys = [layer(inputs, training=True) for layer in layers]
        np.testing.assert_array_equal(*ys)
        np.testing.assert_array_equal(*(layer.moving_mean for layer in layers))


def test_variables_of_keras_are_no_weights_and_keep_their_digits(rng: np.random.Generator) -> None:
    """In a layer of mixed precision Keras would cast its variables to float16: 0.999 to 0.99902."""
    x = tf.constant(rng.normal(3, 2, (8, 3)), tf.float16)
    values = {"momentum": 0.999, "epsilon": 1e-5}
    variables = {name: keras.Variable(value, dtype="float64") for name, value in values.items()}
    ours = BatchNormalization(dtype="mixed_float16", **variables)
    floats = BatchNormalization(dtype="mixed_float16", **values)
    for value in (0.999, 0.9):
        variables["momentum"].assign(value)
        floats.momentum = value
        np.testing.assert_array_equal(ours(x, training=True), floats(x, training=True))
        for name in MOVING:
            np.testing.assert_array_equal(getattr(ours, name), getattr(floats, name))
    assert [w.name for w in ours.weights] == [w.name for w in floats.weights]
    late = BatchNormalization(dtype="mixed_float16")
    late.momentum = variables["momentum"]
    late(x, training=True)
    again = BatchNormalization(dtype="mixed_float16", momentum=0.9)
    again(x, training=True)
    np.testing.assert_array_equal(late.moving_mean, again.moving_mean)


def test_no_gradient_reaches_them(rng: np.random.Generator) -> None:
    momentum, epsilon = tf.Variable(0.5), tf.Variable(0.25)
    layer = BatchNormalization(momentum=momentum, epsilon=epsilon)
    with tf.GradientTape() as tape:
        y = layer(tf.constant(rng.normal(size=(8, 3)), tf.float32), training=True)
    assert tape.gradient(y, [momentum, epsilon]) == [None, None]


def test_a_config_holds_the_current_values(tmp_path: Path, rng: np.random.Generator) -> None:
    momentum, epsilon = tf.Variable(0.5), tf.Variable(0.25)
    inputs = keras.Input((3,))
    model = keras.Model(inputs, BatchNormalization(momentum=momentum, epsilon=epsilon)(inputs))
    momentum.assign(0.75)
    config = model.layers[1].get_config()
    assert (config["momentum"], config["epsilon"]) == (0.75, 0.25)
    json.dumps(config)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert (again.layers[1].momentum, again.layers[1].epsilon) == (0.75, 0.25)
    x = rng.normal(size=(4, 3)).astype("float32")
    np.testing.assert_array_equal(again(x), model(x))
    model.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(str(tmp_path / "exported"))
    np.testing.assert_allclose(exported.serve(x), model(x), rtol=1e-6)


def test_models_keep_variables() -> None:
    momentum, epsilon = tf.Variable(0.5), tf.Variable(0.25)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.BatchNormalization()(keras.layers.Dense(3)(inputs)))
    model.layers[-1].momentum, model.layers[-1].epsilon = momentum, epsilon
    fast = bnfast.keras.accelerate(model, verbose=False)
    again = bnfast.keras.accelerate(fast, verbose=False)
    with bnfast.keras.patch():
        patched = keras.layers.BatchNormalization(momentum=momentum, epsilon=epsilon)
    assert bnfast.keras.uses_bnfast(patched)
    for layer in (fast.layers[-1], again.layers[-1], patched):
        assert isinstance(layer, BatchNormalization)
        assert layer.momentum is momentum
        assert layer.epsilon is epsilon
        assert (layer.get_config()["momentum"], layer.get_config()["epsilon"]) == (0.5, 0.25)
    x, folded = tf.ones((5, 4)), bnfast.keras.fold(fast)
    assert len(folded.layers) == 2
    np.testing.assert_allclose(folded(x), fast(x), rtol=1e-5)
    back = bnfast.keras.to_keras(fast)
    assert (back.layers[-1].momentum, back.layers[-1].epsilon) == (0.5, 0.25)


def test_a_keras_variable_among_the_weights_keeps_the_layer() -> None:
    inputs = keras.Input((3,))
    norm = keras.layers.BatchNormalization()
    norm.momentum = keras.Variable(0.5, trainable=False)
    model = keras.Model(inputs, norm(inputs))
    (row,) = bnfast.keras.report(model).rows
    assert row.reason == "momentum is a keras.Variable and so one of the layer's weights (a tf.Variable isn't)"


@pytest.mark.parametrize("name", ["momentum", "epsilon"])
def test_wrong_arguments(name: str) -> None:
    for wrong, kind, received in (
        ("0.5", TypeError, r"'0.5' \(str\)"),
        ([0.5], TypeError, r"\[0.5\] \(list\)"),
        (1j, TypeError, r"1j \(complex\)"),
        (np.array([0.5]), ValueError, r"shape \(1,\)"),
        (tf.Variable([0.5]), ValueError, r"shape \(1,\)"),
        (tf.Variable("a"), TypeError, "dtype string"),
        (tf.constant(True), TypeError, "dtype bool"),
    ):
        with pytest.raises(kind, match=f"{name} must be a number or a scalar tensor. Received: {received}"):
            BatchNormalization(**{name: wrong})
    for value in (-0.5, tf.constant(-0.5), np.float32(-0.5), float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{name} must be (in|finite)"):
            BatchNormalization(**{name: value})
    with pytest.raises(TypeError, match="epsilon must be a number"):
        BatchNormalization(epsilon=None)
    for value in (np.float32(0.5), np.array(0.5), 1, 0.5):
        held = getattr(BatchNormalization(**{name: value}), name)
        assert type(held) is float
        assert held == value


@pytest.mark.parametrize("name", ["momentum", "epsilon"])
def test_a_variable_out_of_range_fails_when_the_layer_trains(name: str) -> None:
    layer = BatchNormalization(**{name: tf.Variable(-0.5)})
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=f"{name} must"):
        layer(tf.ones((4, 3)), training=True)


REPLICAS = """
import numpy as np, tensorflow as tf
cpus = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], cpus)
from bnfast.keras import BatchNormalization

x = np.random.default_rng(1).normal(3, 2, (2, 6, 3)).astype("float32")
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    momentum, epsilon = tf.Variable(0.5, trainable=False), tf.Variable(0.0, trainable=False)
    layer = BatchNormalization(momentum=momentum, epsilon=epsilon, synchronized=True)
    layer.build((6, 3))
alone = BatchNormalization()

@tf.function
def step():
    def replica():
        mine = tf.gather(tf.constant(x), tf.distribute.get_replica_context().replica_id_in_sync_group)
        with tf.GradientTape() as tape:
            tape.watch(mine)
            y = layer(mine, training=True)
        return y, tape.gradient(y, mine, tf.cos(mine))
    return strategy.run(replica)

for value, small in ((0.5, 0.0), (0.25, 1.0)):
    momentum.assign(value)
    epsilon.assign(small)
    alone.momentum, alone.epsilon = value, small
    whole = tf.constant(x.reshape(12, 3))
    with tf.GradientTape() as tape:
        tape.watch(whole)
        y = alone(whole, training=True)
    wanted = y, tape.gradient(y, whole, tf.cos(whole))
    for found, right in zip(step(), wanted):
        both = tf.concat(strategy.experimental_local_results(found), 0)
        np.testing.assert_allclose(both, right, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.moving_mean, alone.moving_mean, rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, alone.moving_variance, rtol=1e-5)
print("equal")
"""


def test_synchronized_replicas_read_variables() -> None:
    found = subprocess.run([sys.executable, "-c", REPLICAS], capture_output=True, text=True)
    assert found.stdout.strip() == "equal", found.stderr[-3000:]
