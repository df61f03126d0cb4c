"""Ghost batches in the NumPy layer: each equals a separate batch; one ghost equals none; tf.keras 2; bad arguments."""

import copy

import numpy as np
import numpy_reference
import pytest
import sample_data
from bnfast import BatchNormalization

CASES = [((12, 5), -1), ((12, 3, 4), 1), ((12, 3, 2, 4), -1), ((12, 3, 2, 4), 2)]
cases = pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
groupings = pytest.mark.parametrize("grouping", ["contiguous", "strided"])


def make_layer(shape, axis, **kwargs):
    layer = BatchNormalization(axis=axis, **kwargs)
    layer.build(shape[axis], kwargs.get("dtype"))
    for array, value in zip(
        (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance),
        sample_data.vectors(shape[axis], np.random.default_rng(1)),
        strict=True,
    ):
        array[...] = value
    return layer


def batches(shape, axis, dtype="float32"):
    rng = np.random.default_rng(2)
    return [sample_data.batch(shape, axis, sample_data.dtype_of(dtype), rng) for _ in range(3)]


def samples(size, grouping, batch=12):
    """The sample indices of each ghost."""
    indices = np.arange(batch)
    return indices.reshape(-1, size) if grouping == "contiguous" else indices.reshape(size, -1).T


def same(a, b):
    assert (a is None) == (b is None)
    if a is not None:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@cases
@groupings
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_ghost_has_the_bits_of_a_separate_batch(shape, axis, grouping, masked, size):
    """One ghost is fully masked and does not count in the moving statistics."""
    x, dy, residual = batches(shape, axis)
    kwargs = {"activation": "relu", "correction": 1}
    ours = make_layer(shape, axis, virtual_batch_size=size, virtual_batch_grouping=grouping, momentum=0.75, **kwargs)
    before = ours.state_dict()
    mask = np.random.default_rng(3).random(np.delete(shape, axis)) < 0.7
    mask[samples(size, grouping)[1]] = False
    mask = mask if masked else None
    y, dx = ours(x, training=True, mask=mask, residual=residual), ours.backward(dy)
    means, variances, dgamma, dbeta = [], [], 0, 0
    for ghost in samples(size, grouping):
        alone, given = make_layer(shape, axis, momentum=0.0, **kwargs), None if mask is None else mask[ghost]
        same(y[ghost], alone(x[ghost], training=True, mask=given, residual=residual[ghost]))
        same(dx[ghost], alone.backward(dy[ghost]))
        same(ours.dresidual[ghost], alone.dresidual)
        dgamma, dbeta = dgamma + alone.dgamma.astype(float), dbeta + alone.dbeta.astype(float)
        if mask is None or given.any():
            means.append(alone.moving_mean)
            variances.append(alone.moving_variance)
    same(ours.dgamma, dgamma.astype(np.float32))
    same(ours.dbeta, dbeta.astype(np.float32))
    for name, each in (("moving_mean", means), ("moving_variance", variances)):
        wanted = 0.75 * before[name] + 0.25 * np.mean(each, 0, float)
        np.testing.assert_allclose(getattr(ours, name), wanted, rtol=3e-7, atol=1e-7)


@cases
@groupings
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_one_ghost_has_the_bits_of_no_ghosts(shape, axis, grouping, masked, dtype):
    x, dy, residual = batches(shape, axis, dtype)
    kwargs = {"activation": "relu6", "correction": 1}
    mask = np.random.default_rng(3).random(np.delete(shape, axis)) if masked else None
    plain = make_layer(shape, axis, **kwargs)
    ours = make_layer(shape, axis, virtual_batch_size=12, virtual_batch_grouping=grouping, **kwargs)
    for _ in range(2):
        same(*(layer(x, training=True, mask=mask, residual=residual) for layer in (ours, plain)))
        same(ours.backward(dy), plain.backward(dy))
    for name in ("dgamma", "dbeta", "dresidual", "moving_mean", "moving_variance"):
        same(getattr(ours, name), getattr(plain, name))
    same(ours(x), plain(x))


@cases
@pytest.mark.parametrize("size", [3, 4])
def test_strided_equals_tf_keras(shape, axis, size, need):
    tf, layers = need("tensorflow"), need("tf_keras").layers
    kwargs = {"axis": axis, "virtual_batch_size": size, "momentum": 0.75, "dtype": "float64"}
    ours, theirs = make_layer(shape, virtual_batch_grouping="strided", **kwargs), layers.BatchNormalization(**kwargs)
    theirs.build(shape)
    state = [ours.gamma, ours.beta, ours.moving_mean, ours.moving_variance]
    theirs.set_weights([v.reshape(w.shape) for v, w in zip(state, theirs.weights, strict=True)])
    x, dy, _ = batches(shape, axis, "float64")
    with tf.GradientTape() as tape:
        given = tf.constant(x)
        tape.watch(given)
        y = theirs(given, training=True)
    dx, dgamma, dbeta = tape.gradient(y, [given, theirs.gamma, theirs.beta], output_gradients=tf.constant(dy))
    pairs = [(ours(x, training=True), y), (ours.backward(dy), dx), (ours.dgamma, dgamma), (ours.dbeta, dbeta)]
    pairs += list(zip(state, theirs.get_weights(), strict=True))
    for actual, wanted in pairs:
        np.testing.assert_allclose(actual, np.asarray(wanted).reshape(actual.shape), rtol=1e-9, atol=1e-10)


@groupings
def test_against_formulas(grouping):
    x, dy, _ = batches((12, 5), -1, "float64")
    ours = make_layer((12, 5), -1, virtual_batch_size=4, virtual_batch_grouping=grouping, momentum=0.5, dtype="float64")
    before = ours.state_dict()
    y, dx = ours(x, training=True), ours.backward(dy)
    parts = [numpy_reference.train(x[g], ours.gamma, ours.beta) for g in samples(4, grouping)]
    for ghost, part in zip(samples(4, grouping), parts, strict=True):
        back = numpy_reference.grad(dy[ghost], x[ghost], part.mean, part.invstd, ours.gamma, ours.beta)
        np.testing.assert_allclose(y[ghost], part.y.astype(float), rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(dx[ghost], back.dx.astype(float), rtol=1e-9, atol=1e-10)
    variance = sum(part.variance for part in parts) / 3
    wanted = 0.5 * before["moving_variance"] + 0.5 * variance
    np.testing.assert_allclose(ours.moving_variance, wanted.astype(float), rtol=1e-12)


@groupings
def test_cumulative_average_counts_batches_not_ghosts(grouping):
    x, *_ = batches((12, 5), -1, "float64")
    ours = make_layer(
        (12, 5), -1, virtual_batch_size=3, virtual_batch_grouping=grouping, momentum=None, dtype="float64"
    )
    for batch in (x, 3 * x):
        ours(batch, training=True)
    ours(x, training=True, mask=np.zeros(12))
    ours(x[:0], training=True)
    assert ours.batches == 2
    np.testing.assert_allclose(ours.moving_mean, 2 * x.mean(0), rtol=1e-12)


def test_nan_policies():
    x, *_ = batches((12, 5), -1)
    x[7, 2] = np.inf
    for policy, moved in (("propagate", 5), ("skip_update", 4)):
        ours = make_layer((12, 5), -1, virtual_batch_size=4, nan_policy=policy)
        before = ours.state_dict()
        ours(x, training=True)
        assert (ours.moving_mean != before["moving_mean"]).sum() == moved
    ours = make_layer((12, 5), -1, virtual_batch_size=4, nan_policy="raise")
    unchanged(ours, FloatingPointError, "non-finite", x)


def unchanged(layer, error, text, x, **kwargs):
    before = copy.deepcopy(layer)
    with pytest.raises(error, match=text):
        layer(x, training=True, **kwargs)
    assert layer.built == before.built
    if layer.built:
        for name, array in before.state_dict().items():
            same(getattr(layer, name), array)


@pytest.mark.parametrize("built", [False, True])
@groupings
def test_bad_calls(grouping, built):
    x, *_ = batches((12, 5), -1)

    def layer(**kwargs):
        kwargs = {"virtual_batch_size": 4, "virtual_batch_grouping": grouping, **kwargs}
        return make_layer((12, 5), kwargs.pop("axis", -1), **kwargs) if built else BatchNormalization(**kwargs)

    text = r"virtual_batch_size must divide the batch. Received: 5, and x of shape \(12, 5\)"
    unchanged(layer(virtual_batch_size=5), ValueError, text, x)
    unchanged(layer(virtual_batch_size=24), ValueError, "virtual_batch_size must divide the batch", x)
    unchanged(layer(axis=0), ValueError, r"axis must not be 0, which is the batch axis, with virtual_batch_size", x)
    unchanged(
        layer(), ValueError, r"residual must have the shape of x, \(12, 5\). Received: \(4, 5\)", x, residual=x[:4]
    )
    unchanged(layer(), ValueError, r"mask must have shape \(12,\)", x, mask=np.ones(4))
    ours = layer()
    ours(x, training=True)
    with pytest.raises(ValueError, match=r"dy must have the shape of x, \(12, 5\). Received: \(4, 5\)"):
        ours.backward(x[:4])
    assert ours.dgamma is None
    assert layer(virtual_batch_size=5)(x).shape == x.shape  # inference does not use ghosts
    assert layer(virtual_batch_size=5, trainable=False)(x, training=True).shape == x.shape


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"virtual_batch_size": 0}, ValueError, "virtual_batch_size must be at least 1, or None. Received: 0"),
        ({"virtual_batch_size": 2.0}, TypeError, "virtual_batch_size must be an integer. Received: 2.0"),
        ({"virtual_batch_grouping": "odd"}, ValueError, r"virtual_batch_grouping must be one of .*Received: 'odd'"),
        ({"virtual_batch_grouping": 1}, TypeError, "virtual_batch_grouping must be one of .*Received: 1"),
    ],
    ids=str,
)
def test_bad_constructor_arguments(kwargs, error, text):
    with pytest.raises(error, match=text):
        BatchNormalization(**kwargs)


@cases
@groupings
def test_x_that_is_not_contiguous_and_no_activation(shape, axis, grouping):
    x, dy, residual = batches(shape, axis)
    ours, plain = (make_layer(shape, axis, virtual_batch_size=3, virtual_batch_grouping=grouping) for _ in range(2))
    same(ours(np.asfortranarray(x), training=True, residual=residual), plain(x, training=True, residual=residual))
    same(ours.backward(np.asfortranarray(dy)), plain.backward(dy))
    same(plain.dresidual, dy)
    assert BatchNormalization(**ours.get_config()).get_config() == ours.get_config()


@groupings
def test_to_keras_and_back(grouping, need):
    need("tensorflow")
    import bnfast.keras

    x, *_ = batches((12, 5), -1)
    ours = make_layer((12, 5), -1, virtual_batch_size=4, virtual_batch_grouping=grouping, momentum=0.75)
    given = ours.to_keras()
    theirs = bnfast.keras.BatchNormalization(**given["config"])
    theirs.build(x.shape)
    theirs.set_weights(given["weights"])
    back = BatchNormalization.from_keras(theirs)
    assert (back.virtual_batch_size, back.virtual_batch_grouping) == (4, grouping)
    np.testing.assert_allclose(ours(x, training=True), theirs(x, training=True), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.moving_variance, theirs.moving_variance, rtol=1e-6)


def test_from_tf_keras(need):
    theirs = need("tf_keras").layers.BatchNormalization(virtual_batch_size=4)
    theirs.build((12, 5))
    for source in (
        theirs,
        {"config": theirs.get_config() | {"virtual_batch_size": 4}, "weights": theirs.get_weights()},
    ):
        ours = BatchNormalization.from_keras(source)
        assert (ours.virtual_batch_size, ours.virtual_batch_grouping) == (4, "strided")
