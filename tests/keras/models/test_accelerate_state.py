"""accelerate: layer state, subclassed models in place, layers that stay on Keras, the report, errors."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalization, ConditionalBatchNormalization, accelerate, report
from keras import layers as L
from keras_models import KERAS, data, dense_net, quiet, randomize, residual_net, same_predictions, states, subclassed


def test_frozen_layers_stay_frozen() -> None:
    model = residual_net()
    for name in ("conv0", "bn0", "bn2"):
        model.get_layer(name).trainable = False
    fast = quiet(model)
    assert {layer.name for layer in fast.layers if not layer.trainable} == {"conv0", "relu0", "out2"}
    assert len(fast.trainable_variables) == len(model.trainable_variables)
    fast.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = [w.numpy().tobytes() for name in ("relu0", "out2") for w in fast.get_layer(name).weights]
    fast.fit(*data(), verbose=0)
    assert [w.numpy().tobytes() for name in ("relu0", "out2") for w in fast.get_layer(name).weights] == before


def test_a_frozen_model_with_a_trainable_layer() -> None:
    model = residual_net()
    model.trainable = False
    model.get_layer("bn2").trainable = True
    fast = quiet(model)
    assert not fast.trainable
    assert [layer.name for layer in fast.layers if layer.trainable and layer.weights] == ["out2"]
    fast.trainable = model.trainable = True
    assert len(fast.trainable_variables) == len(model.trainable_variables)


def test_batch_norm_arguments_are_kept() -> None:
    kwargs: dict[str, Any] = {
        "axis": 1,
        "momentum": 0.7,
        "epsilon": 1e-5,
        "center": False,
        "gamma_initializer": keras.initializers.Constant(2.0),
        "gamma_regularizer": keras.regularizers.L2(0.1),
        "gamma_constraint": keras.constraints.NonNeg(),
    }
    inputs = keras.Input((4, 5))
    model = randomize(keras.Model(inputs, L.ReLU(name="relu")(KERAS(**kwargs)(inputs))))
    fast = quiet(model)
    config = fast.get_layer("relu").get_config()
    wanted = KERAS(**kwargs).get_config()
    assert {name: config[name] for name in wanted if name != "name"} == {n: wanted[n] for n in wanted if n != "name"}
    np.testing.assert_allclose(fast.losses[0], model.losses[0], rtol=1e-6)
    same_predictions(model, fast)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_dtype_policies(policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    try:
        model = dense_net()
    finally:
        keras.config.set_dtype_policy("float32")
    fast = quiet(model)
    assert states(fast) == {"relu": "bnfast + relu"}
    assert fast.dtype_policy.name == fast.get_layer("relu").dtype_policy.name == policy
    x = np.random.default_rng(0).normal(size=(3, 4))
    np.testing.assert_allclose(np.asarray(fast(x), "float64"), np.asarray(model(x), "float64"), atol=2e-2)
    assert fast(x).dtype == model(x).dtype


@pytest.mark.parametrize("fused", [False, True])
def test_masks(fused: bool) -> None:
    """Masked values do not enter the statistics, and the next layer still receives the mask."""
    inputs = keras.Input((5, 3))
    x = KERAS(name="bn", momentum=0.5)(L.Masking()(inputs))
    x = L.ReLU(name="relu")(x) if fused else L.Activation("tanh")(x)
    model = randomize(keras.Model(inputs, L.LSTM(4)(x)))
    fast = quiet(model)
    assert states(fast) == ({"relu": "bnfast + relu"} if fused else {"bn": "bnfast"})
    x = np.random.default_rng(1).normal(size=(6, 5, 3)).astype("float32")
    x[:, 3:] = 0
    for training in (False, True):
        np.testing.assert_allclose(fast(x, training=training), model(x, training=training), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(fast.weights, model.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_seeds_vocabularies_and_functions_are_kept() -> None:
    lookup = L.StringLookup()
    lookup.adapt(np.array(["a", "b", "b", "c"]))
    scale = L.Normalization()
    texts, numbers = keras.Input((1,), dtype="string"), keras.Input((2,))
    x = L.Embedding(5, 3)(lookup(texts))
    x = L.Concatenate()([L.Flatten()(x), L.Lambda(lambda t: t * 3, name="triple")(scale(numbers))])
    x = L.Dense(4, activation=lambda t: t * 2)(L.Dropout(0.5, seed=3, name="dropout_of_three")(x))
    model = randomize(keras.Model([texts, numbers], L.ReLU()(KERAS()(x))))
    scale.adapt(np.arange(8.0).reshape(4, 2))
    model.get_layer("dropout_of_three").seed_generator.next()
    fast = quiet(model)
    given = [tf.constant([["b"], ["c"], ["?"]]), tf.constant([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])]
    np.testing.assert_allclose(fast(given), model(given), rtol=1e-5, atol=1e-6)
    state = fast.get_layer("dropout_of_three").seed_generator.state
    np.testing.assert_array_equal(state, model.get_layer("dropout_of_three").seed_generator.state)


def test_subclassed_models_in_place() -> None:
    model, twin = subclassed(), subclassed()
    for m in (model, twin):
        m.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 4)).astype("float32"), rng.normal(size=(16, 2))
    for m in (model, twin):
        m.train_on_batch(x, y)
    variables, optimizer, norm = [id(v) for v in model.variables], model.optimizer, model.norms[0]
    assert quiet(model, inplace=True) is model
    assert states(model) == {"n0": "bnfast", "n1": "bnfast", "in_dict": "bnfast"}
    assert type(norm) is BatchNormalization
    assert model.norms[0] is norm is model.more["again"]
    assert [id(v) for v in model.variables] == variables
    assert model.optimizer is optimizer
    for _ in range(3):
        losses = [m.train_on_batch(x, y) for m in (model, twin)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for ours, theirs in zip(model.weights, twin.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_functional_models_in_place() -> None:
    model, twin = residual_net(compiled="sgd"), residual_net()
    norm = model.get_layer("bn2")
    quiet(model, inplace=True)
    assert states(model) == dict.fromkeys(("bn0", "bn1", "bn1s", "bn2"), "bnfast")
    assert type(norm) is BatchNormalization
    assert all(row.reason for row in report(model).rows)
    same_predictions(twin, model)
    model.fit(*data(), verbose=0)


def test_layers_inside_other_layers() -> None:
    """Wrappers and custom layers are copied by config, and the batch norms inside them are replaced."""
    inputs = keras.Input((3, 4))
    x = L.TimeDistributed(KERAS(name="inner"))(inputs)
    model = randomize(keras.Model(inputs, L.TimeDistributed(L.Dense(2))(x)))
    fast = quiet(model)
    assert states(fast) == {"inner": "bnfast"}
    assert type(model.layers[1].layer) is KERAS
    same_predictions(model, fast)


class Custom(KERAS):  # type: ignore[misc,valid-type]
    pass


STAYS_ON_KERAS = {
    "Custom is a class of its own": lambda: Custom(name="bn"),
}


if "renorm" in KERAS().get_config():  # Keras 3.14 and later
    STAYS_ON_KERAS["renorm=True with sync"] = lambda: KERAS(name="bn", renorm=True, synchronized=True)


@pytest.mark.parametrize("reason", STAYS_ON_KERAS)
@pytest.mark.parametrize("inplace", [False, True])
def test_layers_that_stay_on_keras(reason: str, inplace: bool) -> None:
    model = dense_net(norm=STAYS_ON_KERAS[reason]())
    with pytest.raises(ValueError, match=f"strict=True, and batch norm bn stays on Keras's layer: {reason}"):
        accelerate(model, strict=True, inplace=inplace)
    (row,) = report(quiet(model, inplace=inplace)).rows
    assert (row.name, row.state, row.bridge) == ("bn", "keras", "")
    assert row.reason.startswith(reason)


def test_the_report_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    fast = accelerate(residual_net())
    out = capsys.readouterr().out
    assert out == f"{report(fast)}\n"
    assert out.startswith("net: 4 of 4 batch norms on bnfast, 3 fused\nlayer")
    assert "bn2, add2" in out
    (row,) = report(dense_net()).rows
    assert row.reason == "accelerate() has not been applied"


def test_errors() -> None:
    inputs = keras.Input((4,))
    plain = keras.Model(inputs, L.Dense(2)(inputs), name="plain")
    with pytest.raises(ValueError, match="model plain has no batch norm"):
        accelerate(plain)
    with pytest.raises(ValueError, match="model late is not built"):
        accelerate(keras.Sequential([KERAS()], name="late"))
    with pytest.raises(ValueError, match=r"model block \(Block\) is neither Functional nor Sequential.*inplace=True"):
        accelerate(subclassed())
    with pytest.raises(TypeError, match=r"model must be a keras\.Model\. Received: .*Dense"):
        accelerate(L.Dense(3))


def test_a_layer_that_cannot_be_copied() -> None:
    class Secret(L.Layer):  # type: ignore[misc]
        def __init__(self, key: Any) -> None:
            super().__init__(name="secret")

        def call(self, x: Any) -> Any:
            return x

    inputs = keras.Input((4,))
    model = keras.Model(inputs, KERAS()(Secret(object())(inputs)))
    with pytest.raises(ValueError, match=r"secret \(Secret\) can't be copied"):
        accelerate(model)


def test_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_net()
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match=r"needs the TensorFlow backend.*Received: jax"):
        accelerate(model)


@keras.saving.register_keras_serializable("test_accelerate_state")
class Doubled(BatchNormalization):  # type: ignore[misc]
    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return 2 * super().call(inputs, training=training, mask=mask)


@pytest.mark.parametrize("inplace", [False, True])
def test_subclasses_of_our_layer_are_not_changed(inplace: bool) -> None:
    inputs, labels = keras.Input((6,)), keras.Input((), dtype="int32")
    y = ConditionalBatchNormalization(3)([Doubled()(KERAS()(inputs)), labels])
    model = randomize(keras.Model([inputs, labels], y))
    x = [np.random.default_rng(0).normal(size=(8, 6)).astype("float32"), np.arange(8) % 3]
    wanted = model(x)
    fast = quiet(model, inplace=inplace)
    kinds = [type(layer) for layer in fast.layers if not isinstance(layer, keras.layers.InputLayer)]
    assert kinds == [BatchNormalization, Doubled, ConditionalBatchNormalization]
    np.testing.assert_allclose(fast(x), wanted, rtol=1e-5, atol=1e-5)


def test_options_outside_the_config_are_kept() -> None:
    def adjustment(shape: Any) -> Any:
        return tf.fill([shape[0], 1], 3.0), tf.zeros([shape[0], 1])

    ours = BatchNormalization(adjustment=adjustment)
    model = keras.Sequential([keras.Input((6,)), ours, KERAS()])
    assert quiet(model).layers[0].adjustment is adjustment


def test_arguments_out_of_range_stay_on_keras() -> None:
    model = keras.Sequential([keras.Input((6,)), KERAS(momentum=1.5), KERAS()])
    fast = quiet(model)
    assert [type(layer) for layer in fast.layers] == [KERAS, BatchNormalization]
    assert "momentum=1.5" in report(fast).rows[0].reason
