"""Scripts of strangers: what they do to Keras's batch norm, under patch and accelerate, has Keras's results."""

import abc
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import accelerate, fold, patch, report, to_keras, uses_bnfast
from bnfast.keras.models.patch import made
from graph_operations import live
from keras import layers as L

X = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")


def activated() -> Any:
    class Activated(keras.layers.BatchNormalization):
        """A batch norm and an activation in one layer, as in ports of timm."""

        def __init__(self, activation: str = "tanh", **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.activation = keras.activations.get(activation)

        def call(self, x: Any, training: Any = None, mask: Any = None) -> Any:
            return self.activation(super().call(x, training=training, mask=mask))

    return Activated()


def named() -> Any:
    class Named(keras.layers.BatchNormalization):
        """Attributes with the names of bnfast's arguments and of what it once kept beside them."""

        def __init__(self) -> None:
            super().__init__()
            self.update_statistics = self.use_batch_statistics = False
            self.nan_policy, self.correction, self.entry, self.trace = 7, 3, "mine", None
            self.virtual_batch_size, self.adjustment, self.bridge = 2, "x", 1

        @property
        def trainable_affine(self) -> bool:
            return False

    return Named()


def abstract() -> Any:
    class Abstract(keras.layers.BatchNormalization, abc.ABC):
        pass

    return Abstract()


def protocol() -> Any:
    class Callable_(Protocol):
        def call(self, x: Any) -> Any: ...

    class Implements(keras.layers.BatchNormalization, Callable_):
        def __init__(self) -> None:
            keras.layers.BatchNormalization.__init__(self)

    return Implements()


def private() -> Any:
    class Private(keras.layers.BatchNormalization):
        """A method whose name bnfast's layer uses, too."""

        def _prepare(self) -> int:
            return 3

    return Private()


SUBCLASSES: list[Callable[[], Any]] = [activated, named, abstract, protocol, private]


def results(layer: Any) -> list[np.ndarray]:
    ys = [layer(X, training=True), tf.function(lambda x: layer(x, training=True))(X), layer(X)]
    return [np.asarray(value) for value in (*ys, *layer.weights)]


@pytest.mark.parametrize("make", SUBCLASSES, ids=lambda make: make.__name__)
def test_subclasses_made_under_the_patch(make: Any) -> None:
    wanted = results(make())
    with patch():
        layer = make()
    assert uses_bnfast(layer) == (make is not private)
    for a, b in zip(results(layer), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_subclass_whose_instances_are_made_after_the_patch() -> None:
    with patch():

        class Sub(keras.layers.BatchNormalization):
            def __init__(self) -> None:
                keras.layers.BatchNormalization.__init__(self)

    for a, b in zip(results(Sub()), results(keras.layers.BatchNormalization()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def always_frozen(own: Any) -> Any:
    return lambda self, inputs, training=None, mask=None: own(self, inputs, training=False, mask=mask)


@pytest.mark.parametrize("how", ["accelerate", "patch"])
def test_an_assigned_call_is_called(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = keras.layers.BatchNormalization
    monkeypatch.setattr(kind, "call", always_frozen(kind.call))

    def make() -> Any:
        inputs = keras.Input((3,))
        return keras.Model(inputs, keras.layers.BatchNormalization()(inputs))

    if how == "patch":
        with patch():
            model = make()
    else:
        model = accelerate(make(), verbose=False)
    np.testing.assert_allclose(model(X, training=True), make()(X, training=True), rtol=1e-6)
    assert not np.any(model.layers[1].moving_mean)
    (row,) = report(model).rows
    assert row.state == "keras"
    assert "call" in row.reason


def test_a_call_assigned_to_the_layer_is_reported() -> None:
    inputs = keras.Input((3,))
    model = accelerate(keras.Model(inputs, L.BatchNormalization()(inputs)), verbose=False)
    layer = model.layers[1]
    layer.call = lambda x, training=None, mask=None: x + 1
    np.testing.assert_array_equal(model(X, training=True), X + 1)
    assert report(model).rows[0].reason == "its call is overridden"


def test_attributes_of_the_user_stay() -> None:
    inputs = keras.Input((3,))
    layer = L.BatchNormalization()
    model = keras.Model(inputs, L.ReLU()(layer(L.Dense(3)(inputs))))
    layer.activation, layer.entry, layer.correction, layer.use_batch_statistics = "mine", 7, 1, True
    plain = [np.asarray(value) for value in (model(X), model(X, training=True), layer.moving_variance)]
    layer.moving_mean.assign(tf.zeros(3))
    layer.moving_variance.assign(tf.ones(3))
    fast = accelerate(model, verbose=False)
    ours = fast.layers[2]
    got = [np.asarray(value) for value in (fast(X), fast(X, training=True), ours.moving_variance)]
    for a, b in zip(got, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for each in (fast.layers[2], to_keras(fast).layers[2]):
        assert (each.activation, each.entry, each.correction) == ("mine", 7, 1)
    np.testing.assert_allclose(fold(model)(X), model(X), rtol=1e-5, atol=1e-6)


def test_only_what_ran_counts_as_trained() -> None:
    class Outer(L.Layer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.norm = keras.layers.BatchNormalization()

        def call(self, x: Any) -> Any:
            return keras.ops.relu(self.norm(x, training=True))

    with patch():
        layer = Outer()
    entry = made[-1]
    layer(keras.Input((3,)))
    assert entry.state == "never called"
    layer(X)
    assert entry.state.startswith("trained on")


def test_a_patch_is_entered_twice() -> None:
    own, again = keras.layers.BatchNormalization, patch()
    for _ in range(2):
        with again:
            assert keras.layers.BatchNormalization is not own
        assert keras.layers.BatchNormalization is own


def test_a_function_of_the_user_inside_of_predict_can_be_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is traced inside of predict and kept by TensorFlow, so it must hold TensorFlow's own ops."""
    monkeypatch.setenv("BNFAST_BRIDGE", "op")

    class Served(keras.Model):  # type: ignore[misc]
        @tf.function(input_signature=[tf.TensorSpec([None, 3])])
        def serve(self, x: Any) -> Any:
            return self(x, training=False)

        def predict_step(self, data: Any) -> Any:
            return self.serve(data) + super().predict_step(data)

    inputs = keras.Input((3,))
    model = Served(inputs, L.ReLU()(L.BatchNormalization()(inputs)))
    fast = accelerate(model, verbose=False)
    np.testing.assert_allclose(fast.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-5, atol=1e-6)
    assert "BnfastInfer" in live(*fast.predict_function._list_all_concrete_functions())
    assert "BnfastInfer" not in live(fast.serve.get_concrete_function())
