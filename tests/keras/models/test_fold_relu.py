"""fold: a batch norm with a ReLU between it and the layer into which it is folded.

The folded ReLU is clip(x, low, high): for a channel with a positive slope a, relu(a*x + b) = a*max(x, -b/a) + b.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
from bnfast.keras import BatchNormalization, BatchNormalizationAdd, fold
from fold_cases import AFTER, SHAPES, chain, check_fold, fresh_names, randomize
from keras import layers

__all__ = ["fresh_names"]
Keras = layers.BatchNormalization
BOTH_SIGNS = [1.0, -0.7, 0.5, -1.2, 0.9, 0.0]  # gamma of six channels; the last one makes a*x + b constant


def signed(model: Any) -> Any:
    for weight in model.weights:
        if weight.name == "gamma":
            weight.assign(BOTH_SIGNS)
    return model


def operations(model: Any) -> list[str]:
    return [type(operation).__name__ for operation in model.operations[1:]]


@pytest.mark.parametrize("name", AFTER)
def test_into_the_layer_after_the_relu(name: str) -> None:
    rank, make = AFTER[name]
    folded = check_fold(signed(chain(SHAPES[rank], Keras(), layers.ReLU(), make())))
    assert operations(folded) == ["Maximum", "Minimum", type(make()).__name__]
    assert folded.layers[-1].use_bias


RELUS: dict[str, Callable[[], Any]] = {
    "ReLU": layers.ReLU,
    "ReLU(6)": lambda: layers.ReLU(6),
    "Activation": lambda: layers.Activation("relu"),
    "keras.ops.relu": lambda: keras.ops.relu,
    "keras.ops.relu6": lambda: keras.ops.relu6,
    "keras.activations.relu": lambda: keras.activations.relu,
    "keras.activations.relu, 6": lambda: lambda x: keras.activations.relu(x, max_value=6.0),
}


@pytest.mark.parametrize("name", RELUS)
def test_forms_of_relu(name: str) -> None:
    make, bounded = RELUS[name], ["Minimum"] if "6" in name else []
    check_fold(signed(chain((6,), Keras(), make(), layers.Dense(3))))
    folded = check_fold(chain((6,), Keras(), make(), layers.Dense(3)))
    assert operations(folded) == ["Maximum", *bounded, "Dense"]


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_our_layer_with_a_fused_activation(activation: str) -> None:
    norm = BatchNormalization(activation=activation)
    check_fold(signed(chain((9, 7, 6), norm, layers.Conv2D(4, 1, padding="same"))))


def test_limits_are_exact() -> None:
    """Inputs far beyond the limits, of both signs, show any error of a limit."""
    for relu, most in ((layers.ReLU(), np.inf), (layers.ReLU(6), 6.0)):
        model = signed(chain((6,), Keras(epsilon=0.5), relu, layers.Dense(6, kernel_initializer="identity")))
        dense, norm = model.layers[-1], model.layers[1]
        dense.set_weights([np.eye(6), np.zeros(6)])
        x = np.outer([-100, -1, 0, 1, 100], np.ones(6)).astype("float32")
        a = norm.gamma.numpy() / np.sqrt(norm.moving_variance.numpy() + 0.5)
        wanted = np.clip(a * (x - norm.moving_mean.numpy()) + norm.beta.numpy(), 0, most)
        np.testing.assert_allclose(fold(model)(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("channels_first_convolutions")
def test_channels_first() -> None:
    first = {"data_format": "channels_first"}
    model = chain((6, 9, 8), Keras(axis=1), layers.ReLU(), layers.Conv2D(4, 3, **first))
    assert operations(check_fold(signed(model)))[-1] == "Conv2D"


def after(norm: Any, relu: Any, **kwargs: Any) -> list[Any]:
    return [norm, relu, layers.Conv2D(4, kwargs.pop("size", 1), **kwargs)]


KEPT: dict[str, Callable[[Any], list[Any]]] = {
    "a leaky ReLU": lambda norm: after(norm, layers.LeakyReLU()),
    "a ReLU with a threshold": lambda norm: after(norm, layers.ReLU(threshold=0.1)),
    "another bound": lambda norm: after(norm, layers.ReLU(5.0)),
    "a padded convolution": lambda norm: after(norm, layers.ReLU(), size=3, padding="same"),
    "another dtype": lambda norm: after(norm, layers.ReLU(dtype="float64")),
    "an activity regularizer": lambda norm: after(norm, layers.ReLU(activity_regularizer="l2")),
    "a pooling layer in between": lambda norm: [norm, layers.ReLU(), layers.MaxPooling2D(), layers.Conv2D(4, 1)],
}


@pytest.mark.parametrize("why", KEPT)
def test_inexact_folds_are_kept(why: str) -> None:
    check_fold(chain(SHAPES[2], *KEPT[why](Keras(name="bn"))), ["bn"])


def test_norms_with_another_consumer_are_kept() -> None:
    inputs = layers.Input((6,))
    y = Keras(name="bn")(inputs)
    z = layers.ReLU()(y)
    check_fold(keras.Model(inputs, [layers.Dense(3)(z), z]), ["bn"])
    check_fold(keras.Model(inputs, [layers.Dense(3)(z), y]), ["bn"])


def test_residual_layers_are_kept() -> None:
    inputs, residual = layers.Input((6,)), layers.Input((6,))
    y = BatchNormalizationAdd(activation="relu", name="bn")([inputs, residual])
    check_fold(keras.Model([inputs, residual], layers.Dense(3)(y)), ["bn"])


def test_norms_in_sequential_models_are_kept() -> None:
    model = keras.Sequential([layers.Input((6,)), Keras(name="bn"), layers.ReLU(), layers.Dense(3)])
    check_fold(model, ["bn"])


def test_half_precision_norms_are_kept() -> None:
    check_fold(chain((6,), Keras(name="bn", dtype="float16"), layers.ReLU(dtype="float16"),
                 layers.Dense(3, dtype="float16"), dtype="float16"), ["bn"])  # fmt: skip


@pytest.mark.parametrize(("gamma", "beta"), [(1e-33, 0.5), (1.0, 30.0), (1.0, -30.0)])
def test_folds_with_large_rounding_errors_are_kept(gamma: float, beta: float) -> None:
    """gamma 1e-33: the limit nearly overflows, and the weight vanishes. beta 30: a zero is a difference of two 30s."""
    model = chain((6,), Keras(name="bn"), layers.ReLU(), layers.Dense(3))
    model.get_layer("bn").gamma.assign([gamma, *[1.0] * 5])
    model.get_layer("bn").beta.assign([*[0.1] * 5, beta] if gamma == 1 else [beta, *[0.1] * 5])
    check_fold(model, ["bn"])


def test_norms_with_a_mask_are_kept() -> None:
    """keras.ops, unlike layers, do not propagate masks. Masking masks zeros, so the input has some."""
    inputs = layers.Input((4, 6))
    x = layers.Dense(3)(layers.ReLU()(Keras(name="bn")(layers.Masking()(inputs))))
    model = randomize(keras.Model(inputs, layers.GlobalAveragePooling1D()(x), name="chain"))
    x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype("float32")
    x[:, 2:] = 0
    np.testing.assert_allclose(check_fold(model, ["bn"])(x), model(x), rtol=1e-5, atol=1e-5)


def test_names_come_from_the_relu() -> None:
    inputs = layers.Input((6,))
    x = layers.ReLU(name="act")(Keras()(inputs))
    model = keras.Model(inputs, layers.Dense(6, name="maximum")(x), name="chain")
    assert [operation.name for operation in check_fold(signed(model)).operations[1:]] == ["act_low", "act", "maximum"]


def test_a_name_that_is_taken_gets_a_line() -> None:
    model = chain((6,), Keras(), lambda x: keras.activations.relu(x, max_value=6.0), layers.Dense(6))
    relu = model.operations[2]
    model.layers[-1].name = f"{relu.name}_low"
    names = [operation.name for operation in check_fold(signed(model)).operations[1:]]
    assert names == [f"{relu.name}_low_", relu.name, f"{relu.name}_low"]


@pytest.mark.parametrize("most", [None, 6])
def test_saves_and_loads(tmp_path: Path, most: int | None) -> None:
    folded = fold(signed(chain((9, 7, 6), Keras(), layers.ReLU(most), layers.Conv2D(4, 3))))
    json.loads(folded.to_json(), parse_constant=pytest.fail)  # called for infinities
    folded.save(tmp_path / "m.keras")
    x = np.random.default_rng(0).normal(size=(2, 9, 7, 6)).astype("float32")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "m.keras")(x), folded(x))


def test_nested_and_chained() -> None:
    block = chain((6,), Keras(), layers.ReLU(), layers.Dense(5), Keras(), layers.ReLU(), layers.Dense(4))
    folded = check_fold(chain((6,), layers.ReLU(), block, Keras(), layers.Activation("relu"), layers.Dense(2)))
    inner = next(layer for layer in folded.layers if isinstance(layer, keras.Model))
    assert operations(inner)[:2] == ["Maximum", "Dense"]
