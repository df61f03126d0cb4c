"""Updates of moving_mean and moving_variance: correction, momentum=None, nan_policy, infinite gradients."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalization

pytestmark = pytest.mark.usefixtures("each_bridge")


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_sample_variances_and_cumulative_averages_equal_torch(
    momentum: float | None, graph: bool, rng: np.random.Generator, need: Callable[[str], Any]
) -> None:
    torch = need("torch")
    theirs = torch.nn.BatchNorm1d(3, eps=1e-3, momentum=None if momentum is None else 1 - momentum, dtype=torch.float64)
    ours = BatchNormalization(momentum=momentum, correction=1, dtype="float64")
    run = tf.function(lambda x: ours(x, training=True)) if graph else lambda x: ours(x, training=True)
    for rows in (8, 5, 2):
        x = rng.normal(3, 2, (rows, 3))
        np.testing.assert_allclose(run(tf.constant(x)), theirs(torch.from_numpy(x)).detach(), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(ours.moving_mean, theirs.running_mean, rtol=1e-13)
        np.testing.assert_allclose(ours.moving_variance, theirs.running_var, rtol=1e-13)
    if momentum is None:
        assert int(ours.batches) == int(theirs.num_batches_tracked) == 3


@pytest.mark.parametrize("masked", ["no mask", "mask for all channels", "mask per channel"])
@pytest.mark.parametrize("correction", [0, 1])
def test_against_float64(correction: int, masked: str, rng: np.random.Generator) -> None:
    ours = BatchNormalization(axis=1, momentum=None, correction=correction)
    x = rng.normal(50, 2, (2, 6, 3, 4)).astype("float32")
    shape = {"no mask": (6, 1, 4), "mask for all channels": (6, 1, 4), "mask per channel": (6, 3, 1)}[masked]
    weights = np.ones((2, 6, 3, 4)) * (1 if masked == "no mask" else rng.random((2, *shape)) < 0.7)
    masks = {"no mask": [None, None], "mask for all channels": weights[:, :, 0], "mask per channel": weights[..., 0]}
    means, variances = [], []
    for batch, w, mask in zip(x, weights, masks[masked], strict=True):
        ours(tf.constant(batch), training=True, mask=mask)
        wide, total = batch.astype(np.float64), w.sum((0, 2))
        means.append((w * wide).sum((0, 2)) / total)
        squares = (w * (wide - means[-1][:, None]) ** 2).sum((0, 2))
        variances.append(squares / (total - correction))
    np.testing.assert_allclose(ours.moving_mean, np.mean(means, 0), rtol=1e-6)
    np.testing.assert_allclose(ours.moving_variance, np.mean(variances, 0), rtol=1e-6)


def test_an_empty_batch_is_not_counted() -> None:
    ours = BatchNormalization(momentum=None)
    ours(tf.random.normal((4, 3)), training=True)
    before = ours.get_weights()
    ours(tf.zeros((0, 3)), training=True)
    ours(tf.ones((4, 3)), training=True, mask=tf.zeros(4, tf.bool))
    assert same(ours.get_weights(), before)
    assert int(ours.batches) == 1


def test_the_largest_count_stays() -> None:
    ours = BatchNormalization(momentum=None)
    ours(tf.random.normal((4, 3)), training=True)
    largest = np.iinfo(np.int64).max
    ours.batches.assign(largest)
    ours(tf.random.normal((4, 3)), training=True)
    assert int(ours.batches) == largest


def test_one_value_per_channel_has_no_sample_variance() -> None:
    ours = BatchNormalization(momentum=0.5, correction=1)
    y = ours(tf.constant([[3.0, 4.0]]), training=True)
    np.testing.assert_array_equal(y, [[0, 0]])
    np.testing.assert_array_equal(ours.moving_variance, [0.5, 0.5])


def test_the_batch_count_is_saved(tmp_path: Path, rng: np.random.Generator) -> None:
    model = keras.Sequential([keras.Input((3,)), BatchNormalization(momentum=None, correction=1, name="bn")])
    for _ in range(2):
        model(rng.normal(size=(5, 3)).astype("float32"), training=True)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    x = rng.normal(size=(5, 3)).astype("float32")
    for each in (model, again):
        each(x, training=True)
    assert int(again.get_layer("bn").batches) == 3
    assert same(again.get_weights(), model.get_weights())


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"momentum": None}, {"renorm": True}, {"correction": 1}], ids=str)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_skip_update_keeps_the_statistics_of_the_channel(
    bad: float, kwargs: dict[str, Any], by_channel: bool, rng: np.random.Generator
) -> None:
    layers = [BatchNormalization(1, nan_policy=policy, **kwargs) for policy in ("skip_update", "propagate")]
    x = rng.normal(1, 2, (6, 4, 2)).astype("float32")
    mask = tf.ones((6, 4), tf.bool) if by_channel else None
    for layer in layers:
        layer.build(x.shape)
        layer(x, training=True, mask=mask)
    before = layers[0].get_weights()
    x *= 2
    x[2, 1, 1] = bad
    y, wanted = (np.asarray(layer(x, training=True, mask=mask)) for layer in layers)
    np.testing.assert_array_equal(y, wanted)
    vectors = [(a, b, c) for a, b, c in zip(before, *(e.get_weights() for e in layers), strict=True) if a.ndim]
    for old, skipped, propagated in vectors[2:]:
        assert skipped[1] == old[1]
        assert not np.isfinite(propagated[1])
        others = [0, 2, 3]
        np.testing.assert_array_equal(skipped[others], propagated[others])
        assert (skipped[others] != old[others]).all()


@pytest.mark.parametrize("nan_policy", ["propagate", "skip_update"])
def test_loss_scaling_trains_through_infinite_gradients(nan_policy: str, rng: np.random.Generator) -> None:
    """The initial scale of 2**30 overflows float16. The optimizer skips steps and halves the scale until it fits."""
    layer = BatchNormalization(nan_policy=nan_policy, dtype="mixed_float16", activation="relu")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, dtype="mixed_float16"), layer])
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=2.0**30)
    model.compile(optimizer, "mse", auto_scale_loss=False, jit_compile=False)
    x = rng.normal(size=(32, 8)).astype("float32")
    target = np.abs(rng.normal(size=(32, 16))).astype("float32")
    start = layer.gamma.numpy()
    model.train_on_batch(x, target)
    assert np.array_equal(layer.gamma, start), "the first step must have infinite gradients"
    losses = [float(model.train_on_batch(x, target)) for _ in range(40)]
    assert float(optimizer.dynamic_scale) < 2.0**30
    assert not np.array_equal(layer.gamma, start)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    assert losses[-1] < losses[0]


def test_configs() -> None:
    assert not {"correction", "nan_policy"} & set(BatchNormalization().get_config())
    kwargs = {"momentum": None, "correction": 1, "nan_policy": "skip_update"}
    config = json.loads(json.dumps(BatchNormalization(**kwargs).get_config()))
    assert kwargs.items() <= config.items()
    assert BatchNormalization.from_config(config).get_config() == config


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"correction": 2}, ValueError, r"correction must be 0 \(population variance\) or 1"),
        ({"correction": True}, TypeError, "correction must be an integer"),
        ({"correction": 1, "renorm": True}, ValueError, "correction must be 0 where renorm=True. Received: 1"),
        ({"nan_policy": "raise"}, ValueError, r"nan_policy must be one of \('propagate', 'skip_update'\)"),
        ({"nan_policy": None}, ValueError, "nan_policy must be one of"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BatchNormalization(**kwargs)
