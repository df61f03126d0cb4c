"""adjustment: against tf.keras 2's layer, in training only, and argument errors."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import tensorflow as tf
from bnfast.keras import BatchNormalization, BatchNormalizationAdd
from taped import gradients

pytestmark = pytest.mark.usefixtures("each_bridge")
CASES = [((6, 4), -1), ((4, 3, 2, 5), 1), ((4, 3, 2, 5), -1), ((4, 3, 5), [1, 2]), ((4, 3, 2, 5), [1, 3])]


def by_sample(shape: Any) -> Any:
    """Scale and offset per sample, the same in every call."""
    rank = shape.shape[0]
    steps = tf.reshape(tf.cast(tf.range(shape[0]), tf.float64), [-1] + [1] * (rank - 1))
    return 1 + 0.1 * steps, 0.3 - 0.2 * steps


def by_channel(shape: Any) -> Any:
    """A scale per index of the last axis, and offset 0."""
    return tf.linspace(tf.constant(0.5, tf.float64), 1.5, shape[-1]), tf.zeros([1], tf.float64)


@pytest.mark.parametrize("kwargs", [{}, {"renorm": True, "renorm_clipping": {"rmax": 1.2, "rmin": 0.9}}], ids=str)
@pytest.mark.parametrize("adjustment", [by_sample, by_channel])
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_equal_to_tf_keras(
    shape: Any,
    axis: Any,
    adjustment: Any,
    kwargs: dict[str, Any],
    rng: np.random.Generator,
    need: Callable[[str], Any],
) -> None:
    common = {"momentum": 0.75, "dtype": "float64", "adjustment": adjustment, **kwargs}
    tolerance = 1e-11
    if kwargs:  # tf.keras's renorm supports only float32
        wide, tolerance = adjustment, 2e-5
        adjustment = lambda shape: [tf.cast(tensor, tf.float32) for tensor in wide(shape)]  # noqa: E731
        common |= {"renorm_momentum": 0.75, "dtype": "float32", "adjustment": adjustment}
    theirs = need("tf_keras").layers.BatchNormalization(axis=axis, **common)
    ours = BatchNormalization(axis=axis, **common)
    for layer in (ours, theirs):
        layer.build(shape)
    ours.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in ours.weights])
    theirs.set_weights(ours.get_weights())
    variables = [ours.gamma.value, ours.beta.value]
    for training in (True, tf.constant(True), False):
        x, dy = (tf.constant(rng.normal(1, 2, shape), common["dtype"]) for _ in range(2))
        if tf.is_tensor(training):  # with the tape inside the tf.function, as in fit
            run = tf.function(lambda x, dy, t: gradients(lambda x: ours(x, training=t), x, dy, variables))
            actual = run(x, dy, training)
        else:
            actual = gradients(lambda x, t=training: ours(x, training=t), x, dy, variables)
        wanted = gradients(lambda x, t=bool(training): theirs(x, training=t), x, dy, [theirs.gamma, theirs.beta])
        for a, b in zip(actual, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
        for a, b in zip(ours.weights, theirs.weights, strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance)


def test_activation_and_residual_follow_the_adjustment(rng: np.random.Generator) -> None:
    x, residual = (tf.constant(rng.normal(1, 2, (6, 4))) for _ in range(2))
    ours = BatchNormalizationAdd(adjustment=by_sample, activation="relu", dtype="float64", scale=False)
    y = ours([x, residual], training=True)
    scale, bias = by_sample(tf.shape(x))
    xhat = (x - tf.reduce_mean(x, 0)) / tf.sqrt(tf.math.reduce_variance(x, 0) + 1e-3)
    np.testing.assert_allclose(y, tf.nn.relu(xhat * scale + bias + residual), rtol=1e-12, atol=1e-12)


def test_identity_adjustment_equals_the_plain_layer(rng: np.random.Generator) -> None:
    x = tf.constant(rng.normal(1, 2, (8, 3, 4)), "float32")
    ours, plain = BatchNormalization(adjustment=lambda shape: (1.0, 0.0)), BatchNormalization()
    np.testing.assert_array_equal(ours(x, training=True), plain(x, training=True))
    assert all(np.array_equal(a, b) for a, b in zip(ours.get_weights(), plain.get_weights(), strict=True))


def test_configs_omit_the_adjustment_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "bnfast"):
        config = BatchNormalization(adjustment=by_sample, name="norm").get_config()
    assert "adjustment" not in config
    assert "the adjustment of layer norm is left out of its config" in caplog.text


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"adjustment must be None or a function of the shape. Received: 3"):
        BatchNormalization(adjustment=3)
    with pytest.raises(ValueError, match="adjustment must be None with virtual_batch_size"):
        BatchNormalization(adjustment=by_sample, virtual_batch_size=2)
    for wrong, error, message in (
        (lambda shape: 1.0, TypeError, r"adjustment must return \(scale, bias\)"),
        (
            lambda shape: (tf.ones(3), tf.ones(1)),
            ValueError,
            r"broadcast to inputs of shape \(6, 4\). Received: \(3,\)",
        ),
    ):
        layer = BatchNormalization(adjustment=wrong)
        layer.build((6, 4))
        before = layer.get_weights()
        with pytest.raises(error, match=message):
            layer(tf.random.normal((6, 4)), training=True)
        assert all(np.array_equal(a, b) for a, b in zip(layer.get_weights(), before, strict=True))
