"""accelerate: layer state, subclassed models, layers that stay on Keras, errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalization, ConditionalBatchNormalization, accelerate, report, to_keras, uses_bnfast
from bnfast.tensorflow import op, op_library
from keras import layers as L
from keras_models import KERAS, data, fused, quiet, randomize, residual_net, states, subclassed


def test_frozen_layers_stay_frozen() -> None:
    model = residual_net(compiled="sgd")
    model.trainable = False
    for name in ("conv1", "bn2"):
        model.get_layer(name).trainable = True
    fast = quiet(model)
    assert not fast.trainable
    assert [layer.trainable for layer in fast.layers] == [layer.trainable for layer in model.layers]
    fast.trainable = model.trainable = True
    fast.get_layer("bn2").trainable = model.get_layer("bn2").trainable = False
    for each in (fast, model):
        each.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        each.fit(*data(), verbose=0)
    assert sorted(fused(fast)) == ["", "", "add + relu", "relu"]
    for a, b in zip(fast.weights, model.weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=a.path)


@pytest.mark.parametrize("inplace", [False, True])
def test_subclassed_models(inplace: bool) -> None:
    model, twin = subclassed(), subclassed()
    for m in (model, twin):
        m.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 4)).astype("float32"), rng.normal(size=(16, 2))
    for m in (model, twin):
        m.train_on_batch(x, y)
    variables, optimizer, norm = [id(v) for v in model.variables], model.optimizer, model.norms[0]
    fast = quiet(model, inplace=inplace)
    assert states(fast) == {"n0": "bnfast", "n1": "bnfast", "in_dict": "bnfast"}
    assert fast.norms[0] is fast.more["again"]
    assert isinstance(fast.norms[0], BatchNormalization)
    assert (fast is model) == (fast.norms[0] is norm) == (fast.optimizer is optimizer) == inplace
    assert ([id(v) for v in fast.variables] == variables) == inplace
    for _ in range(3):
        losses = [m.train_on_batch(x, y) for m in (fast, twin)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert fused(fast) == ["", "relu", ""], "the last call of n0 has no relu"
    for ours, theirs in zip(fast.weights, twin.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    restored = to_keras(fast, inplace=inplace)
    assert (restored is fast) == inplace
    assert {type(each) for each in (*restored.norms, *restored.more.values())} == {KERAS}
    assert ([id(v) for v in restored.variables] == variables) == inplace
    np.testing.assert_allclose(restored(x), fast(x), rtol=1e-5, atol=1e-6)


class Custom(KERAS):  # type: ignore[misc,valid-type]
    pass


def with_momenta() -> Any:
    norm = KERAS(name="bn")
    norm.momentum = np.array([0.5, 0.9])
    return norm


STAYS_ON_KERAS = {
    "Custom is a class of its own": lambda: Custom(name="bn"),
    "momentum=1.5": lambda: KERAS(name="bn", momentum=1.5),
    "epsilon=-1": lambda: KERAS(name="bn", epsilon=-1),
    "momentum must be": with_momenta,
    "it is quantized": lambda: KERAS(name="bn", dtype="int8_from_float32"),
}


if "renorm" in KERAS().get_config():  # Keras 3.14 and later
    STAYS_ON_KERAS["renorm=True with sync"] = lambda: KERAS(name="bn", renorm=True, synchronized=True)


@pytest.mark.parametrize("reason", STAYS_ON_KERAS)
@pytest.mark.parametrize("inplace", [False, True])
def test_layers_that_stay_on_keras(reason: str, inplace: bool) -> None:
    norm = STAYS_ON_KERAS[reason]()
    model = keras.Sequential([keras.Input((4,)), L.Dense(4), norm, KERAS(name="other")])
    with pytest.raises(ValueError, match=f"strict=True, and batch norm .*/bn stays on Keras's layer: {reason}"):
        accelerate(model, strict=True, inplace=inplace)
    assert not uses_bnfast(model.layers[2]), "nothing was changed"
    row, other = report(quiet(model, inplace=inplace)).rows
    assert (row.name, row.state, row.fused, row.bridge) == ("bn", "keras", "", "")
    assert row.reason.startswith(reason)
    assert other.state == "bnfast"


def test_report_of_what_cannot_run_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch norm that isn't built; and one that asks for an op whose library is gone: training says why."""
    assert report(keras.Sequential([KERAS()], name="late")).rows[0].reason == "it is not built"
    monkeypatch.setattr(op_library, "PATH", tmp_path / "gone.so")
    for name in ("_registered", "_library"):
        monkeypatch.setattr(op, name, None)
    model = keras.Sequential([keras.Input((4,)), BatchNormalization(bridge="op")])
    (row,) = report(model).rows
    assert (row.state, row.bridge) == ("bnfast", "op")
    with pytest.raises(RuntimeError, match=r"bnfast's TensorFlow op can't be used: .*gone\.so is not there"):
        model(np.ones((8, 4), "float32"), training=True)


def test_errors() -> None:
    inputs = keras.Input((4,))
    plain = keras.Model(inputs, L.Dense(2)(inputs), name="plain")
    with pytest.raises(ValueError, match="model plain has no batch norm"):
        accelerate(plain)
    with pytest.raises(ValueError, match="model late is not built"):
        accelerate(keras.Sequential([KERAS()], name="late"))
    with pytest.raises(TypeError, match=r"model must be a keras\.Model\. Received: .*Dense"):
        accelerate(L.Dense(3))


@keras.saving.register_keras_serializable("test_accelerate_state")
class Doubled(BatchNormalization):  # type: ignore[misc]
    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return 2 * super().call(inputs, training=training, mask=mask)


@pytest.mark.parametrize("inplace", [False, True])
def test_our_own_layers_are_not_changed(inplace: bool) -> None:
    """Nor are classes derived from them, and options that a config can't hold."""

    def adjustment(shape: Any) -> Any:
        return tf.fill([shape[0], 1], 3.0), tf.zeros([shape[0], 1])

    inputs, labels = keras.Input((6,)), keras.Input((), dtype="int32")
    y = ConditionalBatchNormalization(3)([Doubled(adjustment=adjustment)(KERAS()(inputs)), labels])
    model = randomize(keras.Model([inputs, labels], y))
    x = [np.random.default_rng(0).normal(size=(8, 6)).astype("float32"), np.arange(8) % 3]
    wanted = model(x)
    fast = quiet(model, inplace=inplace)
    kept = [layer for layer in fast.layers if type(layer) in (Doubled, ConditionalBatchNormalization)]
    assert [type(layer) for layer in kept] == [Doubled, ConditionalBatchNormalization]
    assert kept[0].adjustment is adjustment
    np.testing.assert_allclose(fast(x), wanted, rtol=1e-5, atol=1e-5)
