"""The NumPy layer's adjustment: float64 reference, our Keras layer, inference without it, bad arguments."""

import numpy as np
import numpy_reference
import pytest
import sample_data
import tolerances
from bnfast import BatchNormalization

CASES = [((12, 5), -1), ((6, 3, 4), 1), ((6, 3, 2, 4), -1), ((6, 4), 0)]


def scale_and_bias(shape, axis):
    """A scale per sample and channel, a bias per sample."""
    rng = np.random.default_rng(3)
    per_sample = [n if i in (0, axis % len(shape)) else 1 for i, n in enumerate(shape)]
    return rng.uniform(0.5, 1.5, per_sample), rng.uniform(-0.5, 0.5, (shape[0], *[1] * (len(shape) - 1)))


def make_layer(shape, axis, dtype="float32", **kwargs):
    seen = []

    def adjustment(extents):
        seen.append(extents)
        return scale_and_bias(shape, axis)

    layer = BatchNormalization(axis=axis, adjustment=adjustment, **kwargs)
    layer.build(shape[axis], "float64" if dtype == "float64" else "float32")
    gamma, beta, *_ = sample_data.vectors(shape[axis], np.random.default_rng(1))
    if layer.scale:
        layer.gamma[:] = gamma
    if layer.center:
        layer.beta[:] = beta
    return layer, seen


def expected(layer, shape, axis, x, dy, mask, residual):
    """y, dx, dgamma, dbeta, dresidual in float64 or long double."""
    wide = numpy_reference.wide_dtype(x)
    along = [n if i == axis % len(shape) else 1 for i, n in enumerate(shape)]
    gamma = 1 if layer.gamma is None else layer.gamma.reshape(along).astype(wide)
    beta = 0 if layer.beta is None else layer.beta.reshape(along).astype(wide)
    scale, bias = scale_and_bias(shape, axis)
    plain = numpy_reference.train(x, axis=axis, mask=mask, epsilon=layer.epsilon)
    u = plain.y * scale + bias
    z = u * gamma + beta + (0 if residual is None else residual.astype(wide))
    dz = dy.astype(wide) * numpy_reference.activation_slope(z, layer.activation, layer.negative_slope)
    over = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    inner = numpy_reference.grad((dz * gamma * scale).astype(wide), x, plain.mean, plain.invstd, axis=axis, mask=mask)
    y = numpy_reference.activate(z, layer.activation, layer.negative_slope)
    return [y, inner.dx, (dz * u).sum(over), dz.sum(over), dz]


@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
@pytest.mark.parametrize("activation", [*sample_data.ACTIVATIONS, "silu", "elu"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "mask and residual"])
def test_against_formulas(shape, axis, activation, extras):
    rng = np.random.default_rng(2)
    x, dy, residual = (sample_data.batch(shape, axis, np.float64, rng) for _ in range(3))
    mask = rng.random(np.delete(shape, axis)) if extras else None
    layer, seen = make_layer(shape, axis, "float64", activation=activation)
    kwargs = {"mask": mask, "residual": residual} if extras else {"mask": None, "residual": None}
    y, dx = layer(x, training=True, **kwargs), layer.backward(dy)
    assert seen == [shape]
    *wanted, dresidual = expected(layer, shape, axis, x, dy, **kwargs)
    for a, b in zip((y, dx, layer.dgamma, layer.dbeta), wanted, strict=True):
        np.testing.assert_allclose(a, b.astype(float), rtol=1e-10, atol=1e-11)
    if extras:
        np.testing.assert_allclose(layer.dresidual, dresidual.astype(float), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("center", "scale"), [(True, True), (False, True), (True, False), (False, False)])
def test_dtypes(dtype, center, scale):
    shape, axis = (6, 3, 2, 4), -1
    rng = np.random.default_rng(2)
    x, dy = (rng.standard_normal(shape).astype(sample_data.dtype_of(dtype)) for _ in range(2))
    layer, _ = make_layer(shape, axis, center=center, scale=scale)
    y, dx = layer(x, training=True), layer.backward(dy)
    wanted = expected(layer, shape, axis, x, dy, None, None)
    tolerance = 8 * tolerances.storage_eps(x.dtype)
    for a, b in zip((y, dx), wanted[:2], strict=True):
        assert a.dtype == x.dtype
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=tolerance, atol=tolerance)
    for a, b, there in zip((layer.dgamma, layer.dbeta), wanted[2:4], (scale, center), strict=True):
        assert (a is not None) == there
        if there:
            assert a.dtype == np.float32
            np.testing.assert_allclose(a, b.astype(float), rtol=tolerance, atol=8 * tolerance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_loss_scales_of_half_types(dtype):
    """As accurate as without an adjustment: dy*gamma*scale is out of float16's range and too precise for bfloat16."""
    rng = np.random.default_rng(5)
    x = (16 * rng.standard_normal((60, 4))).astype(sample_data.dtype_of(dtype))
    dy = (30000 * rng.uniform(0.95, 1.05, x.shape)).astype(x.dtype)
    gamma = rng.uniform(2.5, 3.5, 4).astype(np.float32)
    ours, plain = BatchNormalization(adjustment=lambda shape: (gamma, 0), scale=False), BatchNormalization()
    plain.build(4)
    plain.gamma[:] = gamma
    for layer in (ours, plain):
        layer(x, training=True)
    expected = plain.backward(dy).astype(float)
    assert np.isfinite(expected).all()
    dx = ours.backward(dy).astype(float)
    np.testing.assert_allclose(dx, expected, tolerances.storage_eps(x.dtype), 1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "kwargs", [{}, {"renorm": True, "renorm_clipping": {"rmax": 1.2}}, {"use_batch_statistics": False}], ids=str
)
def test_equals_our_keras_layer(need, kwargs):
    tf = need("tensorflow")
    import bnfast.keras

    shape, axis = (6, 3, 2, 4), -1
    ours, _ = make_layer(shape, axis, "float64", **kwargs)
    config = {**kwargs, "dtype": "float64", "adjustment": lambda _: scale_and_bias(shape, axis)}
    theirs = bnfast.keras.BatchNormalization(**config)
    theirs.build(shape)
    theirs.gamma.assign(ours.gamma)
    theirs.beta.assign(ours.beta)
    rng = np.random.default_rng(2)
    for _ in range(2):
        x, dy = (sample_data.batch(shape, axis, np.float64, rng) for _ in range(2))
        with tf.GradientTape() as tape:
            sources = [tf.constant(x), theirs.gamma.value, theirs.beta.value]
            tape.watch(sources)
            y = theirs(sources[0], training=True)
        wanted = [y, *tape.gradient(y, sources, output_gradients=tf.constant(dy))]
        for a, b in zip((ours(x, training=True), ours.backward(dy), ours.dgamma, ours.dbeta), wanted, strict=True):
            np.testing.assert_allclose(
                a, b, rtol=1e-6, atol=1e-7
            )  # inference in TensorFlow's ops uses a float32 epsilon
        for name in ours.state_dict():
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-9)


def test_it_does_not_affect_statistics_and_inference():
    shape = (12, 5)
    ours, seen = make_layer(shape, -1)
    plain = BatchNormalization()
    plain.load_state_dict(ours.state_dict())
    x = sample_data.batch(shape, -1, np.float32, np.random.default_rng(2))
    for layer in (ours, plain):
        layer(x, training=True)
    for name, array in plain.state_dict().items():
        np.testing.assert_array_equal(getattr(ours, name), array)
    np.testing.assert_array_equal(ours(x), plain(x))
    np.testing.assert_array_equal(ours.backward(x), plain.backward(x))
    assert len(seen) == 1


def test_several_axes_equal_one_merged_axis():
    rng = np.random.default_rng(2)
    x, dy = (rng.standard_normal((6, 3, 4)) for _ in range(2))
    pair = rng.uniform(0.5, 1.5, (6, 3, 4)), rng.uniform(size=(3, 1))
    several = BatchNormalization(axis=(1, 2), adjustment=lambda shape: pair)
    merged = BatchNormalization(adjustment=lambda shape: [np.broadcast_to(p, x.shape).reshape(6, 12) for p in pair])
    y = several(x, training=True)
    np.testing.assert_allclose(y.reshape(6, 12), merged(x.reshape(6, 12), training=True), rtol=1e-12)
    dx = several.backward(dy)
    np.testing.assert_allclose(dx.reshape(6, 12), merged.backward(dy.reshape(6, 12)), rtol=1e-12, atol=1e-12)
    assert several.dgamma.shape == (3, 4)
    np.testing.assert_allclose(several.dgamma.ravel(), merged.dgamma, rtol=1e-12)


@pytest.mark.parametrize(
    ("result", "error", "text"),
    [
        (1, TypeError, r"adjustment must return \(scale, bias\). Received: 1"),
        ((1, 2, 3), TypeError, r"adjustment must return \(scale, bias\). Received: \(1, 2, 3\)"),
        (("a", 0), TypeError, r"adjustment must return \(scale, bias\), two arrays of numbers. Received: \('a', 0\)"),
        ((np.ones(4), 0), ValueError, r"arrays that broadcast to x of shape \(12, 5\). Received: \(4,\)"),
        ((1, np.ones((1, 12, 5))), ValueError, r"arrays that broadcast to x.*Received: \(1, 12, 5\)"),
    ],
    ids=str,
)
def test_a_wrong_result_changes_nothing(result, error, text):
    layer = BatchNormalization(adjustment=lambda shape: result)
    x = sample_data.batch((12, 5), -1, np.float32, np.random.default_rng(2))
    with pytest.raises(error, match=text):
        layer(x, training=True)
    assert not layer.built


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"adjustment must be None or a function of the shape. Received: 3"):
        BatchNormalization(adjustment=3)
    with pytest.raises(ValueError, match=r"adjustment must be None with virtual_batch_size. Received: vir"):
        BatchNormalization(adjustment=print, virtual_batch_size=4)
    layer, _ = make_layer((12, 5), -1)
    x = np.zeros((12, 5), np.float32)
    before = layer.state_dict()
    with pytest.raises(ValueError, match="residual must have the shape of x"):
        layer(x + 1, training=True, residual=x[:3])
    np.testing.assert_array_equal(layer.moving_mean, before["moving_mean"])
    layer(x, training=True)
    with pytest.raises(TypeError, match=r"dy must have the dtype of x, float32. Received: float64"):
        layer.backward(np.zeros((12, 5)))
    assert layer.get_config()["adjustment"] is layer.adjustment
