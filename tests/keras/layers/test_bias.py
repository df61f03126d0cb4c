"""A bias before a batch norm cancels in training: accelerate skips it there, and only rounding errors change."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import accelerate, fold, to_keras
from keras import layers as L

KERAS = keras.layers.BatchNormalization
BEFORE: dict[str, tuple[Any, tuple[int, ...]]] = {
    "Conv1D": (lambda: L.Conv1D(4, 3), (9, 3)),
    "Conv2D": (lambda: L.Conv2D(4, 3), (6, 6, 3)),
    "Conv2DTranspose": (lambda: L.Conv2DTranspose(4, 3), (6, 6, 3)),
    "Conv3D": (lambda: L.Conv3D(4, 2), (4, 4, 4, 2)),
    "Dense": (lambda: L.Dense(4), (7,)),
    "Dense of rank 3": (lambda: L.Dense(4), (5, 7)),
    "DepthwiseConv2D": (lambda: L.DepthwiseConv2D(3, depth_multiplier=2), (6, 6, 2)),
    "SeparableConv2D": (lambda: L.SeparableConv2D(4, 3), (6, 6, 3)),
}


def model_of(before: Any, shape: tuple[int, ...], follow: Any = L.ReLU, **norm: Any) -> Any:
    inputs = keras.Input(shape)
    x = KERAS(momentum=0.8, **norm)(before()(inputs))
    model = keras.Model(inputs, follow()(x) if follow else x)
    rng = np.random.default_rng(5)
    model.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in model.weights])
    return model


def quiet(model: Any, **kwargs: Any) -> Any:
    return accelerate(model, verbose=False, **kwargs)


def step_of(model: Any, training: bool = True) -> Any:
    """(x, dy) -> y and the gradients of every trainable variable, in one graph."""

    def step(x: Any, dy: Any) -> Any:
        with tf.GradientTape() as tape:
            y = model(x, training=training)
        return y, tape.gradient(y, model.trainable_variables, output_gradients=dy)

    return tf.function(step)


def data(model: Any, samples: int = 6) -> tuple[Any, Any]:
    rng = np.random.default_rng(6)
    shapes = ((samples, *model.input_shape[1:]), (samples, *model.output_shape[1:]))
    return tuple(tf.constant(rng.normal(size=shape), keras.backend.floatx()) for shape in shapes)


def absorbed(model: Any) -> list[str]:
    return [layer.replaces["bias"] for layer in model.layers if "bias" in getattr(layer, "replaces", {})]


def bias_gradients(model: Any) -> int:
    """The number of BiasAddGrad ops, each a pass over a gradient, in the pruned graph of a training step."""
    step = step_of(model).get_concrete_function(*data(model))
    wanted = {id(tensor.op) for tensor in step.outputs}
    reached = list(step.outputs)
    for tensor in reached:
        fresh = [i for i in tensor.op.inputs if id(i.op) not in wanted]
        wanted |= {id(i.op) for i in fresh}
        reached += fresh
    return len({id(tensor.op) for tensor in reached if tensor.op.type == "BiasAddGrad"})


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("name", BEFORE)
def test_a_step_equals_keras_and_the_bias_gradient_is_zero(name: str) -> None:
    model = model_of(*BEFORE[name])
    ours = quiet(model)
    assert absorbed(ours) == [model.layers[1].name]
    x, dy = data(model)
    (y, wanted), (our_y, got) = step_of(model)(x, dy), step_of(ours)(x, dy)
    np.testing.assert_allclose(our_y, y, rtol=1e-4, atol=1e-5)
    for variable, a, b in zip(model.trainable_variables, wanted, got, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-3, err_msg=variable.path)
        if variable.name == "bias":
            assert not np.any(b)
    for a, b in zip(model.non_trainable_variables, ours.non_trainable_variables, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6, err_msg=a.path)
    assert (bias_gradients(model), bias_gradients(ours)) == (1, 0)


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("norm", [{"scale": False}, {"center": False}], ids=str)
def test_the_bias_is_skipped_with_gamma_or_beta_alone(norm: dict[str, Any]) -> None:
    ours = quiet(model_of(*BEFORE["Conv2D"], **norm))
    gradients = dict(zip([v.name for v in ours.trainable_variables], step_of(ours)(*data(ours))[1], strict=True))
    assert not np.any(gradients["bias"])
    assert np.any(gradients["kernel"])
    assert bias_gradients(ours) == 0


def test_the_bias_is_kept_without_gamma_and_beta() -> None:
    ours = quiet(model_of(*BEFORE["Conv2D"], scale=False, center=False))
    assert bias_gradients(ours) == 1


@pytest.mark.usefixtures("each_bridge")
def test_an_empty_batch_keeps_the_bits_of_the_moving_mean() -> None:
    ours = quiet(model_of(*BEFORE["Dense"]))  # Dense: TensorFlow 2.21's Conv2D gives an empty batch a wrong shape
    before = [v.numpy() for v in ours.non_trainable_variables]
    step_of(ours)(*data(ours, samples=0))
    for a, b in zip(before, ours.non_trainable_variables, strict=True):
        np.testing.assert_array_equal(b, a)


def test_frozen_layers_and_inference_use_the_bias() -> None:
    model = model_of(*BEFORE["Conv2D"])
    ours = quiet(model)
    x, dy = data(model)
    for training in (False, True):
        model.layers[2].trainable = ours.layers[2].trainable = not training  # training=True is run with frozen layers
        (y, wanted), (our_y, got) = step_of(model, training)(x, dy), step_of(ours, training)(x, dy)
        np.testing.assert_allclose(our_y, y, rtol=1e-5, atol=1e-5)
        assert all(np.any(gradient) for gradient in got)
        for a, b in zip(wanted, got, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4)


def test_eager_equals_graph() -> None:
    ours, eager = quiet(model_of(*BEFORE["Conv2D"])), quiet(model_of(*BEFORE["Conv2D"]))
    x, dy = data(ours)
    (y, graph), (eager_y, direct) = step_of(ours)(x, dy), step_of(eager).python_function(x, dy)
    np.testing.assert_allclose(eager_y, y, rtol=1e-4, atol=1e-5)
    for a, b in zip(graph, direct, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4)


def test_a_layer_with_another_consumer_keeps_its_bias() -> None:
    inputs = keras.Input((6, 6, 3))
    first, second = L.Conv2D(4, 3, name="first")(inputs), L.Conv2D(4, 3, name="second")(inputs)
    both = L.Concatenate()([KERAS()(first), KERAS()(second), first])
    assert absorbed(quiet(keras.Model(inputs, both))) == ["second"]
    assert absorbed(quiet(keras.Model(inputs, [both, second]))) == []


def test_residual_blocks_and_layers_without_a_bias() -> None:
    inputs = keras.Input((6, 6, 4))
    x = KERAS()(L.Conv2D(4, 3, padding="same", name="plain", use_bias=False)(inputs))
    x = KERAS()(L.Conv2D(4, 3, padding="same", name="conv")(x))
    ours = quiet(keras.Model(inputs, L.ReLU()(L.Add()([inputs, x]))))
    assert absorbed(ours) == ["conv"]
    assert bias_gradients(ours) == 0


def test_a_layer_with_an_activation_keeps_its_bias() -> None:
    model = model_of(lambda: L.Conv2D(4, 3, activation="relu"), (6, 6, 3))
    ours = quiet(model)
    x, dy = data(model)
    for a, b in zip(step_of(model)(x, dy)[1], step_of(ours)(x, dy)[1], strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-3)
    assert bias_gradients(ours) == 1


def test_fit_files_and_to_keras(tmp_path: Path) -> None:
    model = model_of(*BEFORE["Conv2D"], follow=L.GlobalAveragePooling2D)
    x, y = np.random.default_rng(0).normal(size=(32, 6, 6, 3)), np.arange(32) % 4
    for each in (model, ours := quiet(model)):
        each.compile(keras.optimizers.SGD(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # for example "Gradients do not exist for variables"
            each.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    wanted = model.predict(x, verbose=0)
    ours.save(tmp_path / "ours.keras")
    again = keras.models.load_model(tmp_path / "ours.keras")
    assert absorbed(again) == absorbed(ours) == [model.layers[1].name]
    assert bias_gradients(again) == 0
    for other in (ours, again, to_keras(ours), fold(ours)):
        np.testing.assert_allclose(other.predict(x, verbose=0), wanted, rtol=1e-4, atol=1e-5)
    assert type(to_keras(ours).layers[2]) is KERAS


def test_in_place() -> None:
    model = model_of(*BEFORE["Conv2D"], follow=None)
    assert quiet(model, inplace=True) is model
    assert absorbed(model) == [model.layers[1].name]
    assert bias_gradients(model) == 0


def test_bias_and_activity_regularizers_still_apply() -> None:
    kwargs = {"bias_regularizer": keras.regularizers.L2(0.5), "activity_regularizer": keras.regularizers.L2(0.1)}
    model = model_of(lambda: L.Conv2D(4, 3, **kwargs), (6, 6, 3))
    grads = []
    for each in (model, quiet(model)):

        def step(x: Any, each: Any = each) -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(each(x, training=True)) + sum(each.losses)
            return tape.gradient(loss, each.trainable_variables)

        grads.append(tf.function(step)(data(model)[0]))
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-3)
