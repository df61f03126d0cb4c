"""Shared by the tests of layer, group and instance normalization: cases, pairs of layers, recorded kernel calls."""

from collections.abc import Iterator
from typing import Any

import bnfast
import numpy as np
import pytest
import tensorflow as tf
from bnfast.keras import GroupNormalization, InstanceNormalization, LayerNormalization
from bnfast.tensorflow import group_norm
from keras import layers as L

THEIRS = {LayerNormalization: L.LayerNormalization, GroupNormalization: L.GroupNormalization}
CASES: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = [
    (LayerNormalization, (4, 5), {}),
    (LayerNormalization, (3, 4, 6), {"epsilon": 1e-5}),
    (LayerNormalization, (3, 4, 5, 6), {"axis": [-1, -2]}),
    (LayerNormalization, (3, 4, 5, 6), {"axis": [1, 3]}),
    (LayerNormalization, (3, 4, 5, 6), {"axis": [1, -1]}),  # mixed signs: Keras's weights are (6, 4) for extents (4, 6)
    (LayerNormalization, (3, 4, 5), {"axis": 1, "scale": False}),
    (LayerNormalization, (3, 4, 5), {"axis": (0, 1, 2), "center": False}),
    (LayerNormalization, (3, 4), {"scale": False, "center": False}),
    (GroupNormalization, (3, 4, 5, 6), {"groups": 2}),
    (GroupNormalization, (3, 6, 4, 5), {"groups": 3, "axis": 1, "epsilon": 1e-5}),
    (GroupNormalization, (3, 4, 6, 5), {"groups": 2, "axis": 2}),
    (GroupNormalization, (3, 4, 6, 5), {"groups": 6, "axis": -2, "scale": False}),
    (GroupNormalization, (4, 6), {"groups": 1, "center": False}),
    (GroupNormalization, (3, 5, 4), {"groups": -1, "scale": False, "center": False}),
    (InstanceNormalization, (3, 4, 5, 6), {}),
    (InstanceNormalization, (3, 6, 4, 5), {"axis": 1, "epsilon": 1e-5, "scale": False}),
]
ONE_EACH = [CASES[3], CASES[8], CASES[15]]
NAMES = [f"{kind.__name__}-{shape}-{kwargs}" for kind, shape, kwargs in CASES]


def theirs(kind: Any, kwargs: dict[str, Any]) -> Any:
    return L.GroupNormalization(-1, **kwargs) if kind is InstanceNormalization else THEIRS[kind](**kwargs)


def pair(kind: Any, shape: Any, kwargs: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    """Our layer and Keras's, built with equal weights; no two values of a weight are equal."""
    layers = kind(**kwargs, **more), theirs(kind, {**kwargs, **more})
    rng = np.random.default_rng(3)
    for layer in layers:
        layer.build(shape)
    layers[0].set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layers[0].weights])
    layers[1].set_weights(layers[0].get_weights())
    return layers


def gradients(layer: Any, x: Any, dy: Any, training: Any = True) -> list[Any]:
    """y, dx, and those of dgamma and dbeta that the layer has."""
    kwargs = {"training": training} if type(layer) not in THEIRS.values() else {}
    weights = [weight.value for weight in layer.weights]
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, **kwargs)
    return [y, *tape.gradient(y, [x, *weights], output_gradients=tf.cast(dy, y.dtype))]


def assert_close(actual: Any, wanted: Any, tolerance: float) -> None:
    for one, other in zip(actual, wanted, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        one, other = (np.asarray(tf.cast(t, tf.float64)) for t in (one, other))
        assert np.abs(one - other).max(initial=0) <= tolerance * max(1.0, np.abs(other).max(initial=0))


def record_kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list to which every later call of a norm function of bnfast.functional appends its name."""
    calls: list[str] = []
    for name in ("layer_norm", "layer_norm_grad", "group_norm", "group_norm_grad"):
        function = getattr(bnfast.functional, name)

        def call(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(bnfast.functional, name, call)
    return calls


def force_implementation(implementation: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The body of a fixture. "ops": TensorFlow's ops, the default for small tensors. "kernels": our kernels.

    After the test, the recorded calls confirm that the chosen implementation ran.
    """
    calls = record_kernel_calls(monkeypatch)
    if implementation == "kernels":
        monkeypatch.setattr(group_norm, "SMALL_BYTES", 0)
    yield implementation
    assert bool(calls) == (implementation == "kernels")
