"""ConditionalBatchNormalization: float64 reference, one class equals the plain layer, our Keras layer, bad calls."""

import copy

import numpy as np
import numpy_reference
import pytest
import sample_data
import tolerances
from bnfast import BatchNormalization, ConditionalBatchNormalization

CASES = [((6, 4), -1), ((6, 3, 2, 4), -1), ((6, 4, 3, 2), 1), ((6, 3, 4), 2), ((6, 3, 4), (1, 2))]
cases = pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
LABELS = np.array([2, 0, 2, 1, 0, 2])
CLASSES = 4  # the last one is not in the batch


def extents(shape, axis):
    return tuple(shape[i] for i in axis) if isinstance(axis, tuple) else shape[axis]


def make_layer(shape, axis, classes=CLASSES, dtype="float64", **kwargs):
    layer = ConditionalBatchNormalization(classes, axis=axis, momentum=0.75, **kwargs)
    layer.build(extents(shape, axis), dtype)
    rng = np.random.default_rng(3)
    for array in layer.state_dict():
        getattr(layer, array)[...] = rng.uniform(0.5, 1.5, getattr(layer, array).shape)
    return layer


def inputs(shape, axis, dtype=np.float64):
    rng = np.random.default_rng(4)
    along = axis[-1] if isinstance(axis, tuple) else axis
    return [sample_data.batch(shape, along, dtype, rng) for _ in range(3)]


def rows(array, axis):
    """The array as (N, S, C), with several axes merged."""
    axes = [a % array.ndim for a in np.ravel(axis)]
    return np.moveaxis(array, axes, range(-len(axes), 0)).reshape(
        len(array), -1, np.prod([array.shape[a] for a in axes])
    )


def by_class(values):
    return np.stack([values[k == LABELS].sum((0, 1)) for k in range(CLASSES)])


@cases
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "mask and residual"])
def test_against_formulas(shape, axis, activation, extras):
    layer = make_layer(shape, axis, activation=activation)
    x, dy, residual = inputs(shape, axis)
    mask = np.random.default_rng(5).random([n for i, n in enumerate(shape) if i not in np.ravel(axis) % len(shape)])
    kwargs = {"mask": mask, "residual": residual} if extras else {}
    before = layer.state_dict()
    y, dx = layer(x, LABELS, training=True, **kwargs), layer.backward(dy)

    flat, dy3 = rows(x, axis), rows(dy, axis)
    weights = mask.reshape(flat.shape[:2]) if extras else None
    plain = numpy_reference.train(flat, mask=weights)
    gamma, beta = (before[name].reshape(CLASSES, -1)[LABELS][:, None] for name in ("gamma", "beta"))
    z = plain.y * gamma + beta + (rows(residual, axis) if extras else 0)
    dz = dy3 * numpy_reference.activation_slope(z, activation)
    inner = numpy_reference.grad((dz * gamma).astype(np.longdouble), flat, plain.mean, plain.invstd, mask=weights)
    wanted = [(rows(y, axis), numpy_reference.activate(z, activation)), (rows(dx, axis), inner.dx)]
    wanted += [(layer.dgamma, by_class(dz * plain.y)), (layer.dbeta, by_class(dz))]
    wanted += [(layer.moving_mean, 0.75 * before["moving_mean"].ravel() + 0.25 * plain.mean)]
    wanted += [(rows(layer.dresidual, axis), dz)] if extras else []
    for actual, expected in wanted:
        expected = expected.astype(float).reshape(actual.shape)
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-10)
    assert layer.gamma.shape == layer.dgamma.shape == (CLASSES, *np.atleast_1d(extents(shape, axis)))
    assert not layer.dgamma[3].any()


@cases
def test_inference(shape, axis):
    layer = make_layer(shape, axis)
    x, dy, _ = inputs(shape, axis)
    y, dx = layer(x, LABELS[:, None]), layer.backward(dy)
    plain = BatchNormalization(axis=axis)
    for n, label in enumerate(LABELS):
        state = layer.state_dict()
        plain.load_state_dict({**state, "gamma": state["gamma"][label], "beta": state["beta"][label]})
        np.testing.assert_allclose(y[n : n + 1], plain(x[n : n + 1]), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(dx[n : n + 1], plain.backward(dy[n : n + 1]), rtol=1e-12, atol=1e-12)


@cases
@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize("kwargs", [{}, {"virtual_batch_size": 3}, {"activation": "relu", "renorm": True}], ids=str)
def test_one_class_has_the_bits_of_the_plain_layer(shape, axis, dtype, kwargs):
    x, dy, residual = inputs(shape, axis, sample_data.dtype_of(dtype))
    parameters = "float64" if dtype == "float64" else "float32"
    ours = make_layer(shape, axis, 1, parameters, **kwargs)
    plain = BatchNormalization(axis=axis, momentum=0.75, **kwargs)
    state = ours.state_dict()
    plain.load_state_dict({**state, "gamma": state["gamma"][0], "beta": state["beta"][0]})
    labels = np.zeros(6, np.uint8)
    for training in (True, False):
        given = {"training": training, "residual": residual}
        np.testing.assert_array_equal(ours(x, labels, **given), plain(x, **given))
        np.testing.assert_array_equal(ours.backward(dy), plain.backward(dy))
        for name in ("dgamma", "dbeta"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(plain, name)[None])
    np.testing.assert_array_equal(ours.moving_variance, plain.moving_variance)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"scale": False},
        {"center": False},
        {"virtual_batch_size": 3},
        {"renorm": True},
        {"update_statistics": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equals_our_keras_layer(need, kwargs, dtype):
    tf = need("tensorflow")
    import bnfast.keras

    shape = (6, 3, 2, 4)
    ours = make_layer(shape, -1, dtype=dtype, **kwargs)
    given = ours.to_keras()
    theirs = bnfast.keras.ConditionalBatchNormalization(**given["config"], dtype=dtype)
    theirs.build([shape, (6,)])
    theirs.set_weights(given["weights"])
    x, dy, _ = inputs(shape, -1, np.dtype(dtype))
    with tf.GradientTape() as tape:
        sources = [tf.constant(x), *(v.value for v in (theirs.gamma, theirs.beta) if v is not None)]
        tape.watch(sources)
        y = theirs([sources[0], LABELS], training=True)
    wanted = [y, *tape.gradient(y, sources, output_gradients=tf.constant(dy))]
    actual = [ours(x, LABELS, training=True), ours.backward(dy)]
    actual += [d for d in (ours.dgamma, ours.dbeta) if d is not None]
    tolerance = 1e-9 if dtype == "float64" else 1e-5
    for a, b in zip(actual, wanted, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=2 * tolerance)
    for name in ours.state_dict():
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=tolerance)


def test_adjustment_comes_before_gamma_and_beta():
    shape = (6, 3, 4)
    x, dy, _ = inputs(shape, -1)
    layer = make_layer(shape, -1, adjustment=lambda extents: (2.0, np.arange(6.0)[:, None, None]))
    y, dx = layer(x, LABELS, training=True), layer.backward(dy)
    alone = BatchNormalization(center=False, scale=False)
    u = alone(x, training=True) * 2 + np.arange(6.0)[:, None, None]
    gamma, beta = layer.gamma[LABELS][:, None], layer.beta[LABELS][:, None]
    np.testing.assert_allclose(y, u * gamma + beta, rtol=1e-12)
    np.testing.assert_allclose(dx, alone.backward(dy * gamma * 2), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(layer.dgamma, by_class(dy * u), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"use_batch_statistics": False}, {"virtual_batch_size": 3}, {"renorm": True}], ids=str
)
def test_loss_scales_of_half_types(kwargs, dtype):
    """gamma*dy is out of float16's range; rounded to bfloat16, dx, a difference of such products, would be lost."""
    shape = (6, 5, 7, 4)
    rng = np.random.default_rng(5)
    x = (16 * rng.standard_normal(shape)).astype(sample_data.dtype_of(dtype))
    dy = (30000 * rng.uniform(0.95, 1.05, shape)).astype(x.dtype)
    gamma = rng.uniform(2.5, 3.5, 4)
    ours, plain = ConditionalBatchNormalization(CLASSES, **kwargs), BatchNormalization(**kwargs)
    for layer in (ours, plain):
        layer.build(4)
        layer.gamma[...] = gamma
        layer.moving_variance[...] = 256
        labels = [LABELS] if layer is ours else []
        layer(x, *labels, training=True)
    expected = plain.backward(dy).astype(float)
    dx = ours.backward(dy)
    assert dx.dtype == x.dtype
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(
        dx.astype(float), expected, tolerances.storage_eps(x.dtype), 1e-5 * np.abs(expected).max()
    )


def test_state_and_config():
    layer = make_layer((6, 3, 4), -1, renorm=True)
    fresh = ConditionalBatchNormalization(**layer.get_config())
    fresh.load_state_dict(layer.state_dict())
    for name, array in copy.deepcopy(fresh).state_dict().items():
        np.testing.assert_array_equal(array, getattr(layer, name))
    assert fresh.gamma.shape == (4, 4)
    assert eval(repr(layer)).num_classes == 4
    with pytest.raises(ValueError, match=r"gamma must have shape \(3, 4\), .*Received: \(4, 4\)"):
        ConditionalBatchNormalization(3, renorm=True).load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match=r"num_classes must be None, as PyTorch's BatchNorm has no other. Received: 4"):
        make_layer((6, 3, 4), -1).to_torch()


@pytest.mark.parametrize(
    ("labels", "error", "text"),
    [
        (None, TypeError, r"labels must be an array of integers of shape \(N,\). Received: None"),
        (LABELS.astype(float), TypeError, "labels must have an integer dtype. Received: float64"),
        (LABELS[:3], ValueError, r"labels must have shape \(N,\) or \(N, 1\) with N = 6. Received: \(3,\)"),
        (LABELS - 1, ValueError, r"labels must be in \[0, 4\). Received: -1"),
        (LABELS + 2, ValueError, r"labels must be in \[0, 4\). Received: 4"),
        (list(LABELS), TypeError, "labels must be a NumPy array or .*Received: list"),
    ],
    ids=str,
)
def test_wrong_labels_change_nothing(labels, error, text):
    x = np.ones((6, 4), np.float32)
    layer = ConditionalBatchNormalization(4)
    with pytest.raises(error, match=text):
        layer(x, labels, training=True)
    assert not layer.built
    layer = make_layer((6, 4), -1)
    before = layer.state_dict()
    with pytest.raises(error, match=text):
        layer(x, labels, training=True)
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"num_classes must be at least 1. Received: 0"):
        ConditionalBatchNormalization(0)
    with pytest.raises(TypeError, match=r"num_classes must be an integer. Received: 2.0"):
        ConditionalBatchNormalization(2.0)
    with pytest.raises(
        ValueError, match=r"axis must not be 0, which is the sample axis. Received: axis=-2 for x of shape \(6, 4\)"
    ):
        ConditionalBatchNormalization(2, axis=-2)(np.ones((6, 4), np.float32), LABELS)


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_non_finite_values_agree_with_the_kernels(activation, slope):
    """With infinite z, and infinite dy where the slope is 0, two classes, one of them used, equal the plain layer."""
    x = np.array([[-1, 2], [3, -4], [5, 1], [-2, -3]], np.float32)
    residual = np.zeros_like(x)
    residual[0, 0] = -np.inf
    kwargs = {"activation": activation, "negative_slope": slope}
    plain, labelled = BatchNormalization(**kwargs), ConditionalBatchNormalization(2, **kwargs)
    y = plain(x, training=True, residual=residual)
    np.testing.assert_allclose(labelled(x, np.zeros(4, int), training=True, residual=residual), y, rtol=1e-6, atol=1e-6)
    dy = np.ones_like(x)
    if activation != "leaky_relu" or not slope:
        dy[y == 0] = np.inf
    np.testing.assert_allclose(labelled.backward(dy), plain.backward(dy), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(labelled.dbeta[0], plain.dbeta, rtol=1e-6)
