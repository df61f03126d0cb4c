"""virtual_batch_size: against tf.keras 2 (strided ghosts), against one call per ghost, and a single ghost."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import tensorflow as tf
from bnfast.keras import BatchNormalization, BatchNormalizationAdd
from taped import gradients, made

pytestmark = pytest.mark.usefixtures("each_bridge")
CASES = [((12, 5), -1), ((12, 3, 4), 1), ((12, 3, 4), 2), ((12, 3, 2, 5), 1), ((12, 3, 2, 5), -1), ((12, 3, 2, 5), 2)]


def close(actual: Any, wanted: Any, tolerance: float = 1e-12) -> None:
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    np.testing.assert_allclose(actual, wanted.reshape(actual.shape), rtol=tolerance, atol=tolerance)


def traced(call: Callable[[Any], Any], rank: int) -> Any:
    """The call in a graph with an unknown batch size."""
    return lambda x: tf.function(call, input_signature=[tf.TensorSpec([None, *x.shape[1:]], x.dtype)])(x)


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("size", [3, 12, 1])
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_strided_equals_tf_keras(
    shape: Any, axis: int, size: int, unknown: bool, rng: np.random.Generator, need: Callable[[str], Any]
) -> None:
    kwargs: dict[str, Any] = {
        "axis": axis,
        "virtual_batch_size": size,
        "momentum": 0.75,
        "dtype": "float64",
    }  # momentum 0.75 is exact in float32, to which tf.keras rounds it
    theirs = need("tf_keras").layers.BatchNormalization(**kwargs)
    theirs.build(shape)
    ours = made(shape, virtual_batch_grouping="strided", **kwargs)
    theirs.set_weights([w.reshape(v.shape) for w, v in zip(ours.get_weights(), theirs.weights, strict=True)])
    for _ in range(2):
        x, dy = tf.constant(rng.normal(1, 2, shape)), rng.normal(size=shape)
        call = traced(lambda x: ours(x, training=True), len(shape)) if unknown else lambda x: ours(x, training=True)
        actual = gradients(call, x, dy, [ours.gamma.value, ours.beta.value])
        wanted = gradients(lambda x: theirs(x, training=True), x, dy, [theirs.gamma, theirs.beta])
        for a, b in zip(actual, wanted, strict=True):
            close(a, b)
        for a, b in zip(ours.weights, theirs.weights, strict=True):
            close(a, b)
        close(ours(x), theirs(x, training=False))


@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_each_ghost_is_normalized_separately(
    shape: Any, axis: int, masked: bool, grouping: str, rng: np.random.Generator
) -> None:
    """Including a fused activation and a residual. One ghost is fully masked and must not affect the statistics."""
    kwargs: dict[str, Any] = {"axis": axis, "activation": "relu", "momentum": 0.0, "dtype": "float64"}
    fused = BatchNormalizationAdd(virtual_batch_size=4, virtual_batch_grouping=grouping, **kwargs)
    fused.build([shape, shape])
    alone = made(shape, **kwargs)
    fused.set_weights(alone.get_weights())
    x, residual = (tf.constant(rng.normal(1, 2, shape)) for _ in range(2))
    ghosts = np.arange(12).reshape((3, 4) if grouping == "contiguous" else (4, 3))
    ghosts = ghosts if grouping == "contiguous" else ghosts.T
    mask = rng.random(np.delete(shape, axis)) < 0.7
    mask[ghosts[1]] = False
    y = fused([x, residual], training=True, mask=[tf.constant(mask), None] if masked else None)
    means, variances = [], []
    for ghost in ghosts:
        one = BatchNormalization(axis=axis, momentum=0.0, dtype="float64")
        one.build(shape)
        one.set_weights(alone.get_weights())
        given = tf.constant(mask[ghost]) if masked else None
        wanted = tf.nn.relu(one(tf.gather(x, ghost), training=True, mask=given) + tf.gather(residual, ghost))
        close(tf.gather(y, ghost), wanted)
        if not masked or mask[ghost].any():
            means.append(one.moving_mean.numpy())
            variances.append(one.moving_variance.numpy())
    close(fused.moving_mean, np.mean(means, 0))
    close(fused.moving_variance, np.mean(variances, 0))


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_float16"])
def test_one_ghost_equals_the_plain_layer(dtype: str, grouping: str, unknown: bool, rng: np.random.Generator) -> None:
    for shape, axis in CASES:
        kwargs = {"axis": axis, "dtype": dtype, "activation": "relu", "correction": 1}
        plain = made(shape, **kwargs)
        ours = made(shape, virtual_batch_size=12, virtual_batch_grouping=grouping, **kwargs)
        x, dy = tf.constant(rng.normal(1, 2, shape), ours.compute_dtype), rng.normal(size=shape)
        run = [lambda x, layer=layer: layer(x, training=True) for layer in (ours, plain)]
        run = [traced(call, len(shape)) for call in run] if unknown else run
        results = [
            gradients(call, x, dy, [layer.gamma.value, layer.beta.value]) + layer.get_weights()
            for call, layer in zip(run, (ours, plain), strict=True)
        ]
        for actual, wanted in zip(*results, strict=True):
            np.testing.assert_array_equal(np.asarray(actual), np.asarray(wanted))


def test_cumulative_average_and_skip_update(rng: np.random.Generator) -> None:
    ours = BatchNormalization(virtual_batch_size=2, momentum=None, nan_policy="skip_update", dtype="float64")
    x = rng.normal(1, 2, (2, 6, 3))
    x[1, 3, 1] = np.inf
    for batch in x:
        ours(tf.constant(batch), training=True)
    of_ghosts = [batch.reshape(3, 2, 3).var(1).mean(0) for batch in np.nan_to_num(x, posinf=0)]
    wanted = np.mean(of_ghosts, 0)
    wanted[1] = of_ghosts[0][1]
    close(ours.moving_variance, wanted)
    assert int(ours.batches) == 2


def test_batch_not_divisible_by_virtual_batch_size() -> None:
    ours = made((None, 3), virtual_batch_size=4)
    before = ours.get_weights()
    with pytest.raises(ValueError, match=r"virtual_batch_size must divide the batch. Received: 4, and inputs of shape"):
        ours(tf.ones((6, 3)), training=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"virtual_batch_size must divide the batch. Received: 4"):
        traced(lambda x: ours(x, training=True), 2)(tf.ones((6, 3)))
    ours(tf.ones((0, 3)), training=True)
    assert traced(lambda x: ours(x, training=True), 2)(tf.ones((0, 3))).shape == (0, 3)
    assert all(np.array_equal(a, b) for a, b in zip(ours.get_weights(), before, strict=True))
    assert ours(tf.ones((6, 3))).shape == (6, 3), "inference has no ghosts"


def test_configs_and_bad_arguments() -> None:
    assert not {"virtual_batch_size", "virtual_batch_grouping"} & set(BatchNormalization().get_config())
    kwargs = {"virtual_batch_size": 4, "virtual_batch_grouping": "strided"}
    config = json.loads(json.dumps(BatchNormalization(**kwargs).get_config()))
    assert kwargs.items() <= config.items()
    assert BatchNormalization.from_config(config).get_config() == config
    for wrong, error, message in (
        ({"virtual_batch_size": 0}, ValueError, "virtual_batch_size must be at least 1. Received: 0"),
        ({"virtual_batch_size": 2.0}, TypeError, "virtual_batch_size must be an integer. Received: 2.0"),
        ({"virtual_batch_size": 2, "renorm": True}, ValueError, "virtual_batch_size must be None where renorm=True"),
        ({"virtual_batch_grouping": "odd"}, ValueError, "virtual_batch_grouping must be one of"),
    ):
        with pytest.raises(error, match=message):
            BatchNormalization(**wrong)
    with pytest.raises(ValueError, match=r"axis must not be 0, the batch's, with virtual_batch_size. Received: axis=0"):
        BatchNormalization(axis=0, virtual_batch_size=2).build((4, 3))
