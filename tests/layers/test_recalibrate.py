"""recalibrate of the NumPy layer, against float64 NumPy and against what training averages."""

from __future__ import annotations

import bnfast
import numpy as np
import pytest

RNG = np.random.default_rng(2)
PARTS = [RNG.normal(10, 3, (n, 4, 5)).astype("float32") for n in (6, 2, 12)]
WHOLE = np.concatenate(PARTS).astype("float64").reshape(-1, 5)


@pytest.mark.parametrize("given", ["arrays", "iterator", "moments", "masked"])
def test_population(given):
    layer = bnfast.BatchNormalization()
    batches = {
        "arrays": PARTS,
        "iterator": iter(PARTS),
        "moments": [bnfast.moments(part) for part in PARTS],
        "masked": [(np.concatenate([p, p + 99]), np.repeat([1, 0], len(p))[:, None] * np.ones((1, 4))) for p in PARTS],
    }[given]
    found = layer.recalibrate(batches)
    np.testing.assert_allclose(layer.moving_mean, WHOLE.mean(0), rtol=1e-6)
    np.testing.assert_allclose(layer.moving_variance, WHOLE.var(0), rtol=1e-6)
    np.testing.assert_allclose(found.variance, WHOLE.var(0), rtol=1e-6)
    assert found.count == 80
    assert layer.moving_mean.dtype == np.float32


def test_average_is_what_training_averages():
    layer, other = (bnfast.BatchNormalization(momentum=None, correction=1) for _ in range(2))
    for part in PARTS:
        other(part, training=True)
    layer.recalibrate(PARTS, estimator="average")
    np.testing.assert_allclose(layer.moving_mean, other.moving_mean, rtol=1e-6)
    np.testing.assert_allclose(layer.moving_variance, other.moving_variance, rtol=1e-6)
    assert layer.batches == other.batches == 3


@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
def test_ghosts(grouping):
    layer, other = (
        bnfast.BatchNormalization(momentum=0.0, virtual_batch_size=3, virtual_batch_grouping=grouping) for _ in range(2)
    )
    other(PARTS[2], training=True)
    layer.recalibrate([PARTS[2]], estimator="average")
    np.testing.assert_allclose(layer.moving_variance, other.moving_variance, rtol=1e-6)


def test_ghosts_are_the_batches_own_alone():
    layer = bnfast.BatchNormalization(virtual_batch_size=3)
    layer.recalibrate([bnfast.moments(part) for part in PARTS], estimator="average")
    np.testing.assert_allclose(layer.moving_mean, np.mean([part.mean((0, 1)) for part in PARTS], 0), rtol=1e-6)
    before = layer.state_dict()
    with pytest.raises(ValueError, match=r"^virtual_batch_size=3 must divide the batch. Received: 2 samples$"):
        layer.recalibrate(PARTS[:2], estimator="average")
    masked = [(PARTS[0], np.ones((6, 4)))]
    with pytest.raises(ValueError, match=r"^batches must have no mask with virtual_batch_size and the estimator avera"):
        layer.recalibrate(masked, estimator="average")
    for name, array in before.items():
        np.testing.assert_array_equal(getattr(layer, name), array)
    layer.recalibrate(masked)
    np.testing.assert_allclose(layer.moving_mean, PARTS[0].mean((0, 1)), rtol=1e-6)


@pytest.mark.parametrize("estimator", ["population", "average"])
def test_renorm(estimator):
    layer, other = (bnfast.BatchNormalization(renorm=True, momentum=0.0, renorm_momentum=0.0) for _ in range(2))
    other(PARTS[0], training=True)
    layer.recalibrate(PARTS[:1], estimator=estimator)
    for name, array in other.state_dict().items():
        np.testing.assert_allclose(layer.state_dict()[name], array, rtol=1e-5, err_msg=name)


def test_a_conditional_layer_and_axes():
    layer = bnfast.ConditionalBatchNormalization(3, axis=1)
    x = RNG.normal(size=(6, 2, 4)).astype("float32")
    layer.recalibrate([x])
    assert layer.gamma.shape == (3, 2)
    np.testing.assert_allclose(layer.moving_mean, x.mean((0, 2)), rtol=1e-5, atol=1e-6)
    several = bnfast.BatchNormalization(axis=(1, 2))
    several.recalibrate([x])
    np.testing.assert_allclose(several.moving_variance, x.var(0), rtol=1e-5)


def test_float64_and_the_last_call_are_kept_apart():
    layer = bnfast.BatchNormalization()
    layer.recalibrate([WHOLE])
    assert layer.moving_mean.dtype == np.float64
    np.testing.assert_allclose(layer.moving_variance, WHOLE.var(0), rtol=1e-12)
    layer(WHOLE, training=True)
    layer.recalibrate([WHOLE])
    with pytest.raises(RuntimeError, match="backward needs a call"):
        layer.backward(WHOLE)


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        (PARTS[0], TypeError, "one batch is"),
        (3, TypeError, "batches must"),
        ([], ValueError, "no values"),
        ([PARTS[0][:0]], ValueError, "no values"),
        ([PARTS[0], PARTS[0][..., :3]], ValueError, "batch 1 must have"),
        ([(PARTS[0], None, None)], ValueError, "batch 0 as a tuple"),
        ([np.full((3, 5), np.nan)], FloatingPointError, "batch 0"),
        ([np.array([[-3e38] * 5, [3e38] * 5])], FloatingPointError, "float32"),
        (["x"], TypeError, "x must"),
    ],
)
def test_bad_batches_change_nothing(batches, error, words):
    layer = bnfast.BatchNormalization(dtype="float32")
    layer.build(5)
    before = layer.state_dict()
    with pytest.raises(error, match=words):
        layer.recalibrate(batches)
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    with pytest.raises(ValueError, match="estimator"):
        layer.recalibrate(PARTS, estimator="median")
