"""Chains of layers around a batch norm, and the check that a folded model computes the same."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from bnfast.keras import fold
from bnfast.keras.models.graph import layers as all_layers
from keras import layers

Keras = layers.BatchNormalization
SHAPES = {0: (6,), 1: (12, 6), 2: (10, 9, 6), 3: (6, 7, 5, 6)}  # by spatial rank, channels_last


@pytest.fixture(autouse=True)
def fresh_names() -> None:
    keras.backend.clear_session()


RANGES = {"gamma": (0.5, 1.5), "beta": (-0.5, 0.5), "moving_mean": (-0.5, 0.5), "moving_variance": (0.3, 2.0)}


def randomize(model: Any, kernels: tuple[float, float] | None = (-1.0, 1.0)) -> Any:
    """Give every weight random values, so that an error in folding changes the output."""
    rng = np.random.default_rng(7)
    for weight in model.weights:
        if ends := RANGES.get(weight.name, kernels):
            weight.assign(rng.uniform(*ends, weight.shape))
    return model


def norms(model: Any) -> list[str]:
    return [layer.name for layer in all_layers(model) if isinstance(layer, Keras)]


def check_fold(model: Any, kept: list[str] | tuple[str, ...] = ()) -> Any:
    """Fold `model` and return the result, after checking it.

    It must compute the same, `kept` must be its remaining batch norms, and the original must be unchanged.
    """
    before, config = [np.array(w) for w in model.get_weights()], model.to_json()
    folded = fold(model, check=True)
    assert norms(folded) == list(kept)
    assert (folded.name, folded.compiled) == (model.name, False)
    assert model.to_json() == config
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert not {id(w) for w in model.weights} & {id(w) for w in folded.weights}
    return folded


def chain(shape: tuple[int, ...], *steps: Any, dtype: str = "float32") -> Any:
    """A Functional model of these layers in sequence, with random weights."""
    x = inputs = layers.Input(shape, dtype=dtype)
    for step in steps:
        x = step(x)
    return randomize(keras.Model(inputs, x, name="chain"))


AFTER: dict[str, tuple[int, Callable[[], Any]]] = {
    "Dense": (0, lambda: layers.Dense(4, activation="tanh")),
    "Dense on images": (2, lambda: layers.Dense(4, use_bias=False)),
    "Conv1D": (1, lambda: layers.Conv1D(4, 3, activation="relu")),
    "Conv2D": (2, lambda: layers.Conv2D(4, 3, strides=2, use_bias=False)),
    "grouped Conv2D": (2, lambda: layers.Conv2D(4, 3, groups=2)),
    "Conv2D 1x1": (2, lambda: layers.Conv2D(4, 1, padding="same")),
    "Conv3D": (3, lambda: layers.Conv3D(4, 2)),
    "DepthwiseConv1D": (1, lambda: layers.DepthwiseConv1D(3, depth_multiplier=2)),
    "DepthwiseConv2D": (2, lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False)),
    "SeparableConv1D": (1, lambda: layers.SeparableConv1D(4, 3, depth_multiplier=2)),
    "SeparableConv2D": (2, lambda: layers.SeparableConv2D(4, 3)),
}
