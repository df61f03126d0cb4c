"""Renorm in the NumPy layer: Keras's over several steps, same bits as plain batch norm, bad arguments."""

import copy

import numpy as np
import pytest
import sample_data
from bnfast import BatchNormalization

CASES = [((20, 5), -1), ((6, 3, 4), 1), ((6, 3, 2, 4), -1)]
CLIPPING = [None, {"rmin": 0.5, "rmax": 1.5, "dmax": 0.3}, {"rmax": 1.1}, {"dmax": 0.05}, {"rmin": 1.2}]
ONE = {"rmin": 1, "rmax": 1, "dmax": 0}
STATE = ("moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")


def make_layer(channels, dtype="float64", **kwargs):
    """A layer whose gamma and beta are not the defaults."""
    layer = BatchNormalization(dtype=dtype, **kwargs)
    layer.build(channels)
    gamma, beta, *_ = sample_data.vectors(channels, np.random.default_rng(1), dtype)
    if layer.scale:
        layer.gamma[:] = gamma
    if layer.center:
        layer.beta[:] = beta
    return layer


def unchanged(layer, error, text, *args, **kwargs):
    before = layer.state_dict()
    with pytest.raises(error, match=text):
        layer(*args, training=True, **kwargs)
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def keras_step(tf, layer, x, dy, **kwargs):
    with tf.GradientTape() as tape:
        given = tf.constant(x)
        tape.watch(given)
        y = layer(given, training=True, **kwargs)
    sources = [given, *(v.value for v in (layer.gamma, layer.beta) if v is not None)]
    return [y, *tape.gradient(y, sources, output_gradients=tf.constant(dy))]


def check_three_steps(ours, theirs, tf, masks, tolerance=1e-9):
    """Three steps, forward and backward, on both sides."""
    shape, axis = masks[0], masks[1]
    rng = np.random.default_rng(2)
    for step in range(3):
        x, dy = (sample_data.batch(shape, axis, np.float64, rng) for _ in range(2))
        kwargs = {"mask": rng.random(np.delete(shape, axis)) < 0.6} if len(masks) > 2 else {}
        wanted = keras_step(tf, theirs, x, dy, **{name: tf.constant(v) for name, v in kwargs.items()})
        actual = [ours(x, training=True, **kwargs), ours.backward(dy)]
        actual += [d for d in (ours.dgamma, ours.dbeta) if d is not None]
        for a, b in zip(actual, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=str(step))
        for name in STATE:
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(ours(x), theirs(x, training=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clipping", CLIPPING, ids=str)
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_equals_keras(need, clipping, shape, axis):
    tf, keras = need("tensorflow"), need("keras")
    kwargs = {"axis": axis, "renorm": True, "renorm_clipping": clipping, "momentum": 0.75, "renorm_momentum": 0.5}
    theirs = keras.layers.BatchNormalization(**kwargs, dtype="float64")
    theirs.build(shape)
    ours = make_layer(shape[axis], **kwargs)
    theirs.gamma.assign(ours.gamma)
    theirs.beta.assign(ours.beta)
    check_three_steps(ours, theirs, tf, (shape, axis), 1e-6)  # Keras keeps sqrt(epsilon) in float32


@pytest.mark.parametrize(("center", "scale"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("kwargs", [{}, {"momentum": None}], ids=str)
def test_equals_our_keras_layer_with_masks(need, center, scale, kwargs):
    tf = need("tensorflow")
    import bnfast.keras

    kwargs = {**kwargs, "axis": 1, "renorm": True, "renorm_clipping": {"rmax": 1.2}, "center": center, "scale": scale}
    theirs = bnfast.keras.BatchNormalization(**kwargs, dtype="float64")
    theirs.build((6, 3, 4))
    ours = make_layer(3, **kwargs)
    for name in [name for name, present in (("gamma", scale), ("beta", center)) if present]:
        getattr(theirs, name).assign(getattr(ours, name))
    check_three_steps(ours, theirs, tf, ((6, 3, 4), 1, "masked"))


def test_clipping_may_change_between_steps():
    x = sample_data.batch((20, 5), 1, np.float32, np.random.default_rng(3))
    ours, fixed = (make_layer(5, "float32", renorm=True, renorm_clipping=ONE) for _ in range(2))
    for layer in (ours, fixed):
        layer(x, training=True)
    ours.renorm_clipping = {"rmax": 3, "dmax": 5}
    wide = make_layer(5, "float32", renorm=True, renorm_clipping={"rmax": 3, "dmax": 5})
    wide.load_state_dict(ours.state_dict())
    y = ours(x, training=True)
    assert np.array_equal(y, wide(x, training=True))
    assert not np.array_equal(y, fixed(x, training=True))
    ours.renorm_clipping["rmax"] = -1
    unchanged(ours, ValueError, r"renorm_clipping\['rmax'\] must be finite and at least 0. Received: -1", x)


@pytest.mark.parametrize(("shape", "axis"), [*CASES, ((3, 5, 2, 4), (1, 3))], ids=str)
@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_r_1_and_d_0_have_the_bits_of_the_plain_layer(shape, axis, dtype, masked):
    rng = np.random.default_rng(4)
    along = axis[-1] if isinstance(axis, tuple) else axis
    x, dy, residual = (sample_data.batch(shape, along, sample_data.dtype_of(dtype), rng) for _ in range(3))
    mask = rng.random([n for i, n in enumerate(shape) if i not in np.ravel(axis) % len(shape)]) if masked else None
    channels = tuple(shape[i] for i in axis) if isinstance(axis, tuple) else shape[axis]
    kwargs = {"axis": axis, "activation": "relu6", "dtype": "float64" if dtype == "float64" else "float32"}
    plain, ours = BatchNormalization(**kwargs), BatchNormalization(**kwargs, renorm=True, renorm_clipping=ONE)
    for layer in (plain, ours):
        layer.build(channels)
        layer.gamma[...] = np.linspace(-1, 2, layer.gamma.size).reshape(layer.gamma.shape)
        layer.beta[...] = layer.gamma / 3
    for name in ("y", "dx"):
        results = [
            layer(x, training=True, mask=mask, residual=residual) if name == "y" else layer.backward(dy)
            for layer in (ours, plain)
        ]
        np.testing.assert_array_equal(*results)
    for name in ("dgamma", "dbeta", "dresidual", "moving_mean"):
        a, b = getattr(ours, name), getattr(plain, name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_an_empty_batch_updates_nothing():
    layer = make_layer(5, renorm=True, momentum=None)
    x = sample_data.batch((20, 5), 1, np.float64, np.random.default_rng(5))
    layer(x, training=True)
    before = layer.state_dict()
    layer(x[:0], training=True)
    layer(x, training=True, mask=np.zeros(20))
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    assert layer.batches == 1


def test_nan_policies():
    x = sample_data.batch((20, 5), 1, np.float32, np.random.default_rng(6))
    x[7, 2] = np.inf
    for policy, still in (("propagate", []), ("skip_update", [2])):
        layer = make_layer(5, "float32", renorm=True, nan_policy=policy)
        before = layer.state_dict()
        layer(x, training=True)
        for name in STATE:
            assert np.flatnonzero(getattr(layer, name) == before[name]).tolist() == still
    layer = make_layer(5, "float32", renorm=True, nan_policy="raise")
    unchanged(layer, FloatingPointError, "non-finite", x)


def test_state():
    layer = make_layer(5, renorm=True)
    layer(sample_data.batch((20, 5), 1, np.float64, np.random.default_rng(7)), training=True)
    state = layer.state_dict()
    assert list(state) == ["gamma", "beta", *STATE]
    fresh = BatchNormalization(renorm=True)
    fresh.load_state_dict(state)
    for name, array in copy.deepcopy(fresh).state_dict().items():
        np.testing.assert_array_equal(array, state[name])
    with pytest.raises(
        ValueError, match=r"Missing: \[\], unknown: \['moving_stddev', 'renorm_mean', 'renorm_stddev'\]"
    ):
        BatchNormalization().load_state_dict(state)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"renorm": 1}, TypeError, "renorm must be True or False. Received: 1"),
        ({"renorm_clipping": 3}, TypeError, "renorm_clipping must be None or a dict of rmin, rmax, dmax. Received: 3"),
        ({"renorm_clipping": {"max": 3}}, ValueError, r"renorm_clipping must have no keys but.*Received: \['max'\]"),
        ({"renorm_clipping": {"dmax": "3"}}, TypeError, r"renorm_clipping\['dmax'\] must be a real number"),
        ({"renorm_clipping": {"rmin": 2, "rmax": 1}}, ValueError, "rmin <= rmax. Received: {'rmin': 2"),
        ({"renorm_momentum": 1.5}, ValueError, r"renorm_momentum must be in \[0, 1\]. Received: 1.5"),
        ({"virtual_batch_size": 4}, ValueError, "virtual_batch_size must be None with renorm=True. Received: 4"),
        ({"correction": 1}, ValueError, "correction must be 0 with renorm=True. Received: 1"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs, error, text):
    with pytest.raises(error, match=text):
        BatchNormalization(**({"renorm": True} | kwargs))


def test_a_failed_first_call_does_not_build():
    layer = BatchNormalization(renorm=True)
    with pytest.raises(ValueError, match="mask"):
        layer(np.ones((4, 3), np.float32), training=True, mask=np.ones(3))
    assert not layer.built
    assert layer.renorm_mean is None
