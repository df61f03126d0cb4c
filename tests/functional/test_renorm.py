"""renorm_correction: Keras's renorm layer through the docstring's recipe, same bits as batch norm, bounds, errors."""

import bnfast
import numpy as np
import pytest
import sample_data
from bnfast import renorm_correction

CLIPPING = [{}, {"rmin": 0.5, "rmax": 1.5, "dmax": 0.3}, {"rmax": 1.1}, {"dmax": 0.05}, {"rmin": 1.2}]


def step(x, dy, gamma, beta, moving_mean, moving_stddev, epsilon=1e-3, **bounds):
    """The recipe of the docstring of renorm_correction."""
    _, mean, variance = bnfast.moments(x)
    r, d = renorm_correction(mean, variance, moving_mean, moving_stddev, epsilon=epsilon, **bounds)
    scale, shift = gamma * r, beta + gamma * d
    y, mean, variance, invstd = bnfast.batch_norm_train(x, scale, shift, epsilon=epsilon)
    dx, dscale, dshift, _ = bnfast.batch_norm_grad(dy, x, mean, invstd, scale, shift)
    return y, dx, r * dscale + d * dshift, dshift


def inputs():
    rng = np.random.default_rng(1)
    x, dy = (sample_data.batch((20, 5), 1, np.float64, rng) for _ in range(2))
    return x, dy, *sample_data.vectors(5, rng, "float64")


@pytest.mark.parametrize("bounds", CLIPPING, ids=str)
def test_recipe_equals_keras(bounds, need):
    tf, keras = need("tensorflow"), need("keras")
    x, dy, gamma, beta, mean, stddev = inputs()
    layer = keras.layers.BatchNormalization(renorm=True, renorm_clipping=bounds or None, dtype="float64")
    layer.build(x.shape)
    for name, value in {"gamma": gamma, "beta": beta, "renorm_mean": mean, "renorm_stddev": stddev}.items():
        getattr(layer, name).assign(value)
    with tf.GradientTape() as tape:
        given = tf.constant(x)
        tape.watch(given)
        y = layer(given, training=True)
    wanted = [y, *tape.gradient(y, [given, layer.gamma.value, layer.beta.value], output_gradients=tf.constant(dy))]
    for ours, theirs in zip(step(x, dy, gamma, beta, mean, stddev, **bounds), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_r_1_and_d_0_are_plain_batch_norm():
    x, dy, gamma, beta, mean, stddev = inputs()
    y, dx, dgamma, dbeta = step(x, dy, gamma, beta, mean, stddev, rmin=1, rmax=1, dmax=0)
    plain = bnfast.batch_norm_train(x, gamma, beta)
    back = bnfast.batch_norm_grad(dy, x, plain.mean, plain.invstd, gamma, beta)
    for ours, wanted in zip((y, dx, dgamma, dbeta), (plain.y, back.dx, back.dgamma, back.dbeta), strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_values():
    mean, variance = np.array([1.0, 2, np.nan, 1]), np.array([3.0, 8, 1, 0], np.float32)
    moving_mean, moving_stddev = np.array([0.0, 4, 0, 5]), np.array([1.0, 2, 1, 0])
    r, d = renorm_correction(mean, variance, moving_mean, moving_stddev, epsilon=1.0, rmax=1.75, dmax=3)
    np.testing.assert_array_equal(r, [1.75, 1.5, np.sqrt(2), 1])
    np.testing.assert_array_equal(d, [1, -1, np.nan, -3])
    r, d = renorm_correction(mean[3:], variance[3:], moving_mean[3:], moving_stddev[3:], epsilon=0.0)
    assert (r.tolist(), d.tolist()) == ([1], [0])
    assert renorm_correction(*[np.ones((3, 4), np.float32)] * 4)[0].shape == (3, 4)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"variance": np.ones(4)}, ValueError, r"variance must have the shape of mean, \(5,\). Received: \(4,\)"),
        ({"variance": -np.ones(5)}, ValueError, r"variance must be at least 0. Received: -1.0"),
        ({"moving_stddev": -np.ones(5)}, ValueError, r"moving_stddev must be at least 0. Received: -1.0"),
        (
            {"moving_mean": np.ones(5, int)},
            TypeError,
            "moving_mean must have dtype float32 or float64.*Received: int64",
        ),
        ({"mean": [0.0] * 5}, TypeError, "mean must be a NumPy array.*Received: list"),
        ({"rmax": -1}, ValueError, "rmax must be finite and at least 0. Received: -1"),
        ({"dmax": "3"}, TypeError, "dmax must be a real number. Received: '3'"),
        ({"rmin": 2, "rmax": 1}, ValueError, "rmin must be at most rmax. Received: rmin=2.0, rmax=1.0"),
        ({"epsilon": None}, TypeError, "epsilon must be a real number. Received: None"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs, error, text):
    good = {name: np.ones(5) for name in ("mean", "variance", "moving_mean", "moving_stddev")}
    with pytest.raises(error, match=text):
        renorm_correction(**(good | kwargs))
