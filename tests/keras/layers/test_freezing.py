"""update_statistics, use_batch_statistics and trainable_affine in every combination, against Keras's layer."""

import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalization, fold

pytestmark = pytest.mark.usefixtures("each_bridge")
KERAS = keras.layers.BatchNormalization


def filled(layer: Any, shape: tuple[int, ...] = (6, 3, 4)) -> Any:
    layer.build(shape)
    rng = np.random.default_rng(7)
    layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.weights])
    return layer


def step(layer: Any, x: Any, training: Any) -> list[Any]:
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=training)
        loss = tf.reduce_sum(tf.sin(y))
    return [y, *tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])]


@pytest.mark.parametrize("how", ["eager", "graph", "tensor"])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("use", [None, False, True])
def test_every_combination(
    use: bool | None, update: bool, training: bool, trainable: bool, how: str, rng: np.random.Generator
) -> None:
    ours = filled(BatchNormalization(dtype="float64", update_statistics=update, use_batch_statistics=use))
    ours.trainable = trainable
    before = ours.get_weights()
    is_training = training and trainable
    x = tf.constant(rng.normal(1, 2, (6, 3, 4)))
    if how == "tensor":
        traces = []

        @tf.function
        def run(x: Any, training: Any) -> list[Any]:
            traces.append(training)
            return step(ours, x, training)

        actual = run(x, tf.constant(training))
        assert isinstance(traces[0], tf.Tensor)
    elif how == "graph":
        actual = tf.function(lambda x: step(ours, x, training))(x)
    else:
        actual = step(ours, x, training)
    normalizing, moved = (filled(KERAS(dtype="float64")) for _ in range(2))
    for a, b in zip(actual, step(normalizing, x, is_training if use is None else use), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
    moved(x, training=is_training and update)
    for name, old in zip(("moving_mean", "moving_variance"), before[2:], strict=True):
        np.testing.assert_allclose(getattr(ours, name), getattr(moved, name), rtol=1e-13)
        assert np.array_equal(getattr(ours, name), old) != (is_training and update)


@pytest.mark.parametrize("renorm", [False, True])
def test_statistics_updates_do_not_depend_on_use_batch_statistics(renorm: bool, rng: np.random.Generator) -> None:
    kwargs: dict[str, Any] = {"renorm": True} if renorm else {"momentum": None, "correction": 1}
    layers = [filled(BatchNormalization(use_batch_statistics=use, **kwargs)) for use in (None, False, True)]
    for _ in range(2):
        x = tf.constant(rng.normal(1, 2, (6, 3, 4)), "float32")
        mask = tf.constant(rng.random((6, 3)) < 0.7)
        for layer in layers:
            layer(x, training=True, mask=mask)
    for other in layers[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(layers[0].get_weights(), other.get_weights(), strict=True))


def test_update_statistics_can_change_between_calls(rng: np.random.Generator) -> None:
    layer, x = filled(BatchNormalization()), tf.constant(rng.normal(1, 2, (6, 3, 4)), "float32")
    layer.update_statistics = False
    before = layer.get_weights()
    layer(x, training=True)
    assert all(np.array_equal(a, b) for a, b in zip(layer.get_weights(), before, strict=True))
    layer.update_statistics = True
    layer(x, training=True)
    assert not np.array_equal(layer.get_weights()[2], before[2])


def test_trainable_affine_false(rng: np.random.Generator) -> None:
    layer = filled(BatchNormalization(trainable_affine=False), (6, 4))
    assert [w.name for w in layer.weights] == ["gamma", "beta", "moving_mean", "moving_variance"]
    layer.trainable = False
    layer.trainable = True
    assert layer.trainable_weights == []
    model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    before = layer.get_weights()
    x = rng.normal(1, 2, (8, 4)).astype("float32")
    model.fit(x, x[:, :1], epochs=1, verbose=0)
    after = layer.get_weights()
    assert [np.array_equal(a, b) for a, b in zip(after, before, strict=True)] == [True, True, False, False]


def test_layers_with_batch_statistics_in_inference_are_not_folded(rng: np.random.Generator) -> None:
    norms = [BatchNormalization(use_batch_statistics=True, name="kept"), BatchNormalization(name="folded")]
    layers = [layer for norm in norms for layer in (keras.layers.Dense(4), norm)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    folded = fold(model)
    assert [layer.name for layer in folded.layers if isinstance(layer, BatchNormalization)] == ["kept"]
    x = tf.constant(rng.normal(1, 2, (6, 3)), "float32")
    np.testing.assert_allclose(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_configs_contain_only_non_default_options() -> None:
    assert not {"update_statistics", "use_batch_statistics", "trainable_affine"} & set(
        BatchNormalization().get_config()
    )
    kwargs = {"update_statistics": False, "use_batch_statistics": False, "trainable_affine": False}
    config = json.loads(json.dumps(BatchNormalization(**kwargs).get_config()))
    assert kwargs.items() <= config.items()
    again = BatchNormalization.from_config(config)
    assert {name: getattr(again, name) for name in kwargs} == kwargs


@pytest.mark.parametrize("name", ["update_statistics", "use_batch_statistics", "trainable_affine"])
def test_only_bools(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be True or False. Received: 1 \\(int\\)"):
        BatchNormalization(**{name: 1})
