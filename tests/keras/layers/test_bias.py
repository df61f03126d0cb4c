"""The gradient of a bias before a batch norm: exactly 0, without a sum over pixels, if only the batch norm reads it.

Everywhere else it is Keras's sum. Keras's own gradient is a sum of rounding errors where ours is 0.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalization, fold, patch, to_keras
from keras import layers as L
from keras_models import KERAS, quiet, randomize, same_steps

pytestmark = pytest.mark.usefixtures("float64")
IMAGE = (6, 6, 3)
KINDS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "Conv1D": (lambda **k: L.Conv1D(4, 3, **k), (9, 3)),
    "Conv1DTranspose": (lambda **k: L.Conv1DTranspose(4, 3, **k), (9, 3)),
    "Conv2D": (lambda **k: L.Conv2D(4, 3, **k), IMAGE),
    "Conv2DTranspose": (lambda **k: L.Conv2DTranspose(4, 3, **k), IMAGE),
    "Conv3D": (lambda **k: L.Conv3D(4, 2, **k), (4, 4, 4, 2)),
    "Conv3DTranspose": (lambda **k: L.Conv3DTranspose(4, 2, **k), (3, 3, 3, 2)),
    "Dense": (lambda **k: L.Dense(4, **k), (7,)),
    "Dense of rank 3": (lambda **k: L.Dense(4, **k), (5, 7)),
    "DepthwiseConv1D": (lambda **k: L.DepthwiseConv1D(3, depth_multiplier=2, **k), (9, 2)),
    "DepthwiseConv2D": (lambda **k: L.DepthwiseConv2D(3, depth_multiplier=2, **k), (6, 6, 2)),
    "SeparableConv1D": (lambda **k: L.SeparableConv1D(4, 3, **k), (9, 3)),
    "SeparableConv2D": (lambda **k: L.SeparableConv2D(4, 3, **k), IMAGE),
}


def model_of(follow: Callable[[Any], Any], shape: tuple[int, ...] = IMAGE) -> Any:
    inputs = keras.Input(shape)
    return randomize(keras.Model(inputs, follow(inputs)))


def plain(name: str, norm: Any = None, **kwargs: Any) -> Any:
    kind, shape = KINDS[name]
    return model_of(lambda i: L.ReLU()((norm or KERAS(momentum=0.8))(kind(**kwargs)(i))), shape)


def batch(model: Any, samples: int = 6) -> np.ndarray:
    return np.random.default_rng(6).normal(size=(samples, *model.input_shape[1:]))


def gradients(model: Any, training: Any = True, samples: int = 6) -> tuple[dict[str, np.ndarray], int]:
    """The gradients by path, and the number of BiasAddGrad ops, each a pass over a gradient, in the pruned graph."""

    def run(x: Any) -> Any:
        with tf.GradientTape() as tape:
            outputs = keras.tree.flatten(model(x, training=training))
            loss = sum(tf.reduce_sum(tf.sin(y) * tf.cast(tf.range(y.shape[-1]), y.dtype)) for y in outputs)
        return tape.gradient(loss, [v.value for v in model.trainable_variables])

    x = tf.constant(batch(model, samples))
    function = tf.function(run).get_concrete_function(x)
    reached = {id(tensor.op): tensor.op for tensor in function.outputs}
    waiting = list(reached.values())
    while waiting:
        fresh = {id(tensor.op): tensor.op for tensor in waiting.pop().inputs if id(tensor.op) not in reached}
        reached.update(fresh)
        waiting += fresh.values()
    sums = sum(op.type == "BiasAddGrad" for op in reached.values())
    paths = [v.path for v in model.trainable_variables]
    return dict(zip(paths, map(np.asarray, function(x)), strict=True)), sums


def biases(found: dict[str, np.ndarray]) -> list[bool]:
    """For each bias whether its gradient is exactly 0."""
    return [not value.any() for path, value in found.items() if path.endswith("bias")]


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("made", ["accelerate", "patch"])
@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_is_zero_and_the_rest_equals_keras(name: str, made: str) -> None:
    model = plain(name)
    if made == "accelerate":
        ours = quiet(model)
    else:
        with patch():
            ours = plain(name, keras.layers.BatchNormalization(momentum=0.8))
    (_, before), (got, sums) = gradients(model), gradients(ours)
    adopted = "Dense" not in name  # Keras quantizes a Dense layer only if it is exactly of its class
    assert (biases(got)[0] or not adopted, before, sums) == (True, 1, 0 if adopted else 1)
    assert all(value.any() for path, value in got.items() if not path.endswith("bias"))
    same_steps(ours, model, batch(model), tolerance=1e-8)
    assert type(model.layers[1]).__name__ == type(ours.layers[1]).__name__


def read_by_two(x: Any) -> Any:
    y = L.Conv2D(4, 3)(x)
    return [KERAS()(y), y]


def read_by_two_norms(x: Any) -> Any:
    y = L.Conv2D(4, 3)(x)
    return [KERAS()(y), KERAS(momentum=0.5)(y)]


def shared_convolution(x: Any) -> Any:
    conv = L.Conv2D(3, 3, padding="same")
    return [KERAS()(conv(x)), KERAS()(conv(L.Conv2D(3, 1, use_bias=False)(x)))]


def shared_with_another_reader(x: Any) -> Any:
    conv = L.Conv2D(3, 3, padding="same")
    return [KERAS()(conv(x)), L.Softmax()(conv(L.Conv2D(3, 1, use_bias=False)(x)))]


def masked(x: Any) -> Any:
    return KERAS()(L.Dense(4)(L.Masking()(L.Reshape((36, 3))(x))))


def own(**kwargs: Any) -> Callable[[Any], Any]:
    return lambda x: L.ReLU()(BatchNormalization(**kwargs)(L.Conv2D(4, 3)(x)))


CASES: dict[str, tuple[Callable[[Any], Any], list[bool], int]] = {  # is the gradient of each bias 0; BiasAddGrad ops
    "no gamma": (lambda x: KERAS(scale=False)(L.Conv2D(4, 3)(x)), [True], 0),
    "no beta": (lambda x: KERAS(center=False)(L.Conv2D(4, 3)(x)), [True], 0),
    "neither": (lambda x: L.ReLU()(KERAS(scale=False, center=False)(L.Conv2D(4, 3)(x))), [True], 0),
    "no bias": (lambda x: L.ReLU()(KERAS()(L.Conv2D(4, 3, use_bias=False)(x))), [], 0),
    "activation": (lambda x: KERAS()(L.Conv2D(4, 3, activation="relu")(x)), [False], 1),
    "linear activation": (lambda x: KERAS()(L.Conv2D(4, 3, activation="linear")(x)), [True], 0),
    "something between": (lambda x: KERAS()(L.MaxPooling2D()(L.Conv2D(4, 3)(x))), [False], 1),
    "another axis": (lambda x: KERAS(axis=1)(L.Conv2D(4, 3)(x)), [False], 1),
    "a derived layer": (lambda x: KERAS()(type("Mine", (L.Conv2D,), {})(4, 3)(x)), [False], 1),
    "another reader": (read_by_two, [False], 1),
    "two batch norms": (read_by_two_norms, [False], 1),
    "a shared convolution": (shared_convolution, [True], 0),
    "shared with another reader": (shared_with_another_reader, [False], 1),
    "a frozen batch norm": (lambda x: L.ReLU()(KERAS(trainable=False)(L.Conv2D(4, 3)(x))), [False], 1),
    "a mask": (masked, [False], 1),
    "a block": (lambda x: L.Add()([x, KERAS()(L.Conv2D(3, 1)(L.ReLU()(KERAS()(L.Conv2D(4, 1)(x)))))]), [True, True], 0),
}
if "renorm" in KERAS().get_config():  # Keras 3.14 and later
    CASES["renorm"] = lambda x: KERAS(renorm=True)(L.Conv2D(4, 3)(x)), [True], 0


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("case", CASES)
def test_where_the_gradient_is_zero(case: str) -> None:
    follow, zero, sums = CASES[case]
    model = model_of(follow)
    ours = quiet(model)
    (found, passes), _ = gradients(ours), gradients(model)
    assert (biases(found), passes) == (zero, sums)
    same_steps(ours, model, batch(model), tolerance=1e-3 if case == "a mask" else 1e-8)  # Keras adds 1e-7 to counts


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("kwargs", [{"correction": 1}, {"momentum": None}, {"nan_policy": "skip_update"}], ids=str)
def test_options_of_our_layer(kwargs: dict[str, Any]) -> None:
    model = quiet(model_of(lambda x: KERAS()(L.Conv2D(4, 1)(own(**kwargs)(x)))))
    found, _ = gradients(model)
    assert biases(found) == [False, True], "accelerate looks at the batch norms that it changes"


def test_inference_and_tensors_as_training() -> None:
    model = plain("Conv2D")
    ours = quiet(model)
    same_steps(ours, model, batch(model), training=False, tolerance=1e-5)
    (found, sums), (wanted, _) = gradients(ours, training=False), gradients(model, training=False)
    assert sums == 1
    for path in wanted:
        np.testing.assert_allclose(found[path], wanted[path], rtol=1e-6, atol=1e-6)
    x = batch(model)
    switched = tf.function(lambda training: ours(x, training=training))
    for training in (True, False):
        np.testing.assert_allclose(switched(tf.constant(training)), ours(x, training=training), rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("each_bridge")
def test_an_empty_batch_keeps_the_bits_of_the_moving_mean() -> None:
    ours = quiet(plain("Dense"))  # Dense: TensorFlow 2.21's Conv2D gives an empty batch a wrong shape
    before = [v.numpy() for v in ours.non_trainable_variables]
    assert biases(gradients(ours, samples=0)[0]) == [True]
    for a, b in zip(before, ours.non_trainable_variables, strict=True):
        np.testing.assert_array_equal(b, a)


def test_regularizers_still_apply() -> None:
    model = plain("Conv2D", bias_regularizer="l2", activity_regularizer="l1")
    same_steps(quiet(model), model, batch(model))


def test_fit_files_fold_to_keras_clones_and_lora(tmp_path: Path) -> None:
    keras.config.set_dtype_policy("float32")
    model = plain("Dense")
    x, y = np.random.default_rng(0).normal(size=(32, 7)).astype("float32"), np.arange(32) % 4
    for each in (model, ours := quiet(model)):
        each.compile(keras.optimizers.SGD(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # for example "Gradients do not exist for variables"
            each.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    wanted = model.predict(x, verbose=0)
    ours.save(tmp_path / "ours.keras")
    again = keras.models.load_model(tmp_path / "ours.keras")
    assert type(again.layers[1]) is type(to_keras(ours).layers[1]) is L.Dense
    for other in (ours, again, quiet(again), to_keras(ours), fold(ours)):
        np.testing.assert_allclose(other.predict(x, verbose=0), wanted, rtol=1e-4, atol=1e-5)
    cloned = keras.models.clone_model(ours)
    cloned.set_weights(ours.get_weights())
    np.testing.assert_allclose(cloned(x), wanted, rtol=1e-4, atol=1e-5)
    for each in (model, ours):
        each.layers[1].enable_lora(2)
    np.testing.assert_allclose(ours(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("back", [True, False])
def test_quantize(back: bool) -> None:
    model = quiet(plain("Dense"))
    model = to_keras(model) if back else model
    model.quantize("int8")
    assert model.layers[1].quantization_mode == "int8"
