"""bnfast.BatchNormalization over device arrays: the calls, gradients and state of the same layer on NumPy arrays."""

from typing import Any

import bnfast
import numpy as np
import pytest
from fake_cuda import Driver, Namespace

OPTIONS: list[dict[str, Any]] = [
    {},
    {"axis": 1, "activation": "relu", "correction": 1},
    {"momentum": None, "center": False},
    {"scale": False, "activation": "leaky_relu", "nan_policy": "skip_update"},
    {"axis": (1, 2), "dtype": "float64"},
    {"trainable_affine": False, "update_statistics": False},
    {"use_batch_statistics": False},
    {"use_batch_statistics": True},
    {"trainable": False},
]


def arrays(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0.5, 2, (6, 5, 4)).astype("float32") for _ in range(3)]


def close(actual: Any, desired: Any, xp: Namespace) -> None:
    if desired is None:
        assert actual is None
        return
    a = xp.host(actual)
    assert (a.shape, a.dtype) == (desired.shape, desired.dtype)
    np.testing.assert_allclose(a, desired, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_three_steps_and_inference(xp: Namespace, options: dict[str, Any]) -> None:
    ours, cpu = bnfast.BatchNormalization(**options), bnfast.BatchNormalization(**options)
    for seed, training in ((0, True), (1, True), (2, False), (3, True)):
        x, dy, residual = arrays(seed)
        y = ours(xp.to(x), training=training, residual=xp.to(residual))
        close(y, cpu(x, training=training, residual=residual), xp)
        close(ours.backward(xp.to(dy)), cpu.backward(dy), xp)
        for name in ("dgamma", "dbeta", "dresidual", "gamma", "beta", "moving_mean", "moving_variance"):
            close(getattr(ours, name), getattr(cpu, name), xp)
        assert ours.batches == cpu.batches
    assert ours.channels == cpu.channels
    for name, array in cpu.state_dict().items():
        found = ours.state_dict()[name]
        assert type(found) is np.ndarray
        np.testing.assert_allclose(found, array, rtol=1e-5, atol=1e-6)


def test_the_arrays_follow_x(xp: Namespace) -> None:
    x = arrays()[0]
    layer = bnfast.BatchNormalization(scale=False)
    layer(x, training=True)
    assert type(layer.moving_mean) is np.ndarray
    on_cpu = layer.moving_mean.copy()
    y = layer(xp.to(x))
    assert type(layer.moving_mean) is not np.ndarray
    np.testing.assert_array_equal(xp.host(layer.moving_mean), on_cpu)
    kept = layer.moving_mean
    layer(xp.to(x))
    assert layer.moving_mean is kept
    np.testing.assert_allclose(layer(x), xp.host(y), rtol=1e-5, atol=1e-5)
    assert type(layer.moving_mean) is np.ndarray


def test_state_goes_in_and_out(interface: Namespace) -> None:
    x = arrays()[0]
    layer = bnfast.BatchNormalization()
    layer(interface.to(x), training=True)
    other = bnfast.BatchNormalization()
    other.load_state_dict(layer.state_dict())
    np.testing.assert_array_equal(interface.host(other(interface.to(x))), interface.host(layer(interface.to(x))))
    layer.load_state_dict(other.state_dict())
    np.testing.assert_array_equal(layer.state_dict()["moving_mean"], other.state_dict()["moving_mean"])


@pytest.mark.parametrize(
    ("options", "call", "name"),
    [
        ({"renorm": True}, {}, "renorm"),
        ({"virtual_batch_size": 2}, {}, "virtual_batch_size"),
        ({"adjustment": lambda shape: (1.0, 0.0)}, {}, "adjustment"),
        ({}, {"mask": np.ones((6, 5))}, "mask"),
        ({"activation": "silu"}, {}, "activation"),
    ],
)
def test_what_is_not_there_is_refused_and_nothing_changes(
    interface: Namespace, options: dict[str, Any], call: dict[str, Any], name: str
) -> None:
    layer = bnfast.BatchNormalization(**options)
    with pytest.raises(NotImplementedError, match=f"{name} .*on a CUDA device yet"):
        layer(interface.to(arrays()[0]), training=True, **call)
    assert not layer.built


def test_a_failing_call_changes_nothing(interface: Namespace, driver: Driver) -> None:
    x = arrays()[0]
    layer = bnfast.BatchNormalization(nan_policy="raise")
    layer(x, training=True)
    before = layer.moving_mean
    assert before is not None
    values = before.copy()
    with pytest.raises(FloatingPointError):
        layer(interface.to(np.full_like(x, np.nan)), training=True)
    assert layer.moving_mean is before
    np.testing.assert_array_equal(before, values)
    with pytest.raises(ValueError, match="x must have 4 channels on axis -1, which this layer was built with"):
        layer(interface.to(x[..., :3].copy()))
    assert layer.batches == 1


def test_an_empty_batch_is_not_counted(interface: Namespace) -> None:
    layer = bnfast.BatchNormalization(momentum=None)
    layer(interface.to(np.zeros((0, 3), "float32")), training=True)
    assert layer.batches == 0
    np.testing.assert_array_equal(layer.state_dict()["moving_variance"], 1)
