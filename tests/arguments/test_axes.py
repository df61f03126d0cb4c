"""Several channel axes: same bits as one merged axis; formulas, tf.keras 2, masks, out, bad arguments."""

import math

import bnfast
import numpy as np
import numpy_reference
import pytest
import sample_data
from bnfast._arguments.tensor_axes import TensorAxes

CASES = [
    ((6, 3, 4), (1, 2)),
    ((3, 4, 6), (0, 1)),
    ((6, 3, 4), (0, 2)),
    ((4, 3, 2, 5), [1, 3]),
    ((4, 3, 2, 5), (-1, 1)),
    ((4, 3, 2, 5), (2, 1)),
    ((2, 3, 2, 2, 3), (1, 2, 4)),
    ((4, 3, 2, 5), (1, 2, 3)),
    ((3, 4), (0, 1)),
    ((0, 3, 4), (1, 2)),
    ((0, 3, 4), (0, 2)),
    ((2, 1, 3, 1), (0, 2)),
]
cases = pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)


def merged(array, axis):
    """The axes moved to the end and merged into one: the definition."""
    axes = sorted(a % array.ndim for a in axis)
    moved = np.moveaxis(array, axes, range(-len(axes), 0))
    return np.ascontiguousarray(moved).reshape(*moved.shape[: -len(axes)], math.prod(moved.shape[-len(axes) :]))


def adjacent(shape, axis):
    axes = sorted(a % len(shape) for a in axis)
    return axes[-1] - axes[0] == len(axes) - 1


def one_axis(array, axis):
    """(array, axis) as passed to the kernels: adjacent axes merged in place, others moved to the end and merged."""
    axes = sorted(a % array.ndim for a in axis)
    if not adjacent(array.shape, axis):
        return merged(array, axis), -1
    channels = math.prod(array.shape[axes[0] : axes[-1] + 1])
    return array.reshape(*array.shape[: axes[0]], channels, *array.shape[axes[-1] + 1 :]), axes[0]


def inputs(shape, axis, dtype=np.float32):
    rng = np.random.default_rng(3)
    extents = tuple(shape[a] for a in sorted(a % len(shape) for a in axis))
    tensors = [rng.standard_normal(shape).astype(dtype) for _ in range(3)]
    return tensors, [v.reshape(extents) for v in sample_data.vectors(int(np.prod(extents)), rng)]


def same(a, b):
    assert (a is None) == (b is None)
    if a is not None:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.reshape(-1), b.reshape(-1))


@cases
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_equal_bits_to_one_axis(shape, axis, dtype):
    (x, dy, residual), (gamma, beta, mean, variance) = inputs(shape, axis, sample_data.dtype_of(dtype))
    flat, place = one_axis(x, axis)
    plain = {"axis": place, "activation": "relu", "residual": one_axis(residual, axis)[0]}
    kwargs = {"axis": axis, "activation": "relu", "residual": residual}
    ours, theirs = ([v.copy() for v in (mean, variance)], [v.reshape(-1).copy() for v in (mean, variance)])
    train = bnfast.batch_norm_train(x, gamma, beta, *ours, **kwargs)
    wanted = bnfast.batch_norm_train(flat, gamma.ravel(), beta.ravel(), *theirs, **plain)
    assert train.y.shape == shape
    assert train.y.flags.c_contiguous
    assert train.mean.shape == train.variance.shape == train.invstd.shape == gamma.shape
    same(one_axis(train.y, axis)[0], wanted.y)
    for a, b in zip((*train[1:], *ours), (*wanted[1:], *theirs), strict=True):
        same(a, b)
    grad = bnfast.batch_norm_grad(dy, x, train.mean, train.invstd, gamma, beta, dmean=mean, dvariance=mean, **kwargs)
    vectors = (wanted.mean, wanted.invstd, gamma.ravel(), beta.ravel())
    more = {"dmean": mean.ravel(), "dvariance": mean.ravel()}
    back = bnfast.batch_norm_grad(one_axis(dy, axis)[0], flat, *vectors, **more, **plain)
    assert grad.dx.shape == grad.dresidual.shape == shape
    assert grad.dgamma.shape == grad.dbeta.shape == gamma.shape
    same(one_axis(grad.dx, axis)[0], back.dx)
    same(one_axis(grad.dresidual, axis)[0], back.dresidual)
    same(grad.dgamma, back.dgamma)
    same(grad.dbeta, back.dbeta)
    y = bnfast.batch_norm_infer(x, *ours, gamma, beta, **kwargs)
    assert y.shape == shape
    same(one_axis(y, axis)[0], bnfast.batch_norm_infer(flat, *theirs, gamma.ravel(), beta.ravel(), **plain))
    ours, theirs = bnfast.moments(x, axis=axis), bnfast.moments(flat, axis=place)
    assert ours.count == theirs.count
    assert ours.mean.shape == gamma.shape
    same(ours.mean, theirs.mean)
    same(ours.variance, theirs.variance)


@cases
@pytest.mark.parametrize("masked", [False, True])
def test_against_formulas(shape, axis, masked):
    (x, dy, _), (gamma, beta, *_) = inputs(shape, axis, np.float64)
    flat, flat_dy = merged(x, axis), merged(dy, axis)
    off = flat.shape[:-1]
    mask = np.random.default_rng(4).integers(0, 3, off).astype(np.float64) if masked else None
    train = bnfast.batch_norm_train(x, gamma, beta, axis=axis, mask=mask)
    wanted = numpy_reference.train(flat, gamma.ravel(), beta.ravel(), mask=mask)
    np.testing.assert_allclose(merged(train.y, axis), wanted.y.astype(float), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(train.variance.ravel(), wanted.variance.astype(float), rtol=1e-12, atol=1e-13)
    grad = bnfast.batch_norm_grad(dy, x, train.mean, train.invstd, gamma, beta, axis=axis, mask=mask)
    back = numpy_reference.grad(flat_dy, flat, wanted.mean, wanted.invstd, gamma.ravel(), beta.ravel(), mask=mask)
    np.testing.assert_allclose(merged(grad.dx, axis), back.dx.astype(float), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(grad.dgamma.ravel(), back.dgamma.astype(float), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(grad.dbeta.ravel(), back.dbeta.astype(float), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("shape", "axis"), [((6, 3, 4), [1, 2]), ((4, 3, 2, 5), [1, 3])], ids=str)
def test_equal_to_tf_keras(shape, axis, need):
    tf, layers = need("tensorflow"), need("tf_keras").layers
    (x, dy, _), (gamma, beta, mean, variance) = inputs(shape, axis, np.float64)
    theirs = layers.BatchNormalization(axis=list(axis), momentum=0.75, dtype="float64")
    theirs.build(shape)
    theirs.set_weights([v.reshape(w.shape) for v, w in zip((gamma, beta, mean, variance), theirs.weights, strict=True)])
    with tf.GradientTape() as tape:
        given = tf.constant(x)
        tape.watch(given)
        y = theirs(given, training=True)
    dx, dgamma, dbeta = tape.gradient(y, [given, *theirs.trainable_variables], output_gradients=tf.constant(dy))
    vectors = [v.astype(np.float64) for v in (gamma, beta, mean, variance)]
    train = bnfast.batch_norm_train(x, *vectors, axis=axis, momentum=0.75)
    grad = bnfast.batch_norm_grad(dy, x, train.mean, train.invstd, *vectors[:2], axis=axis)
    pairs = [(train.y, y), (grad.dx, dx), (grad.dgamma, dgamma), (grad.dbeta, dbeta)]
    pairs += list(zip(vectors, theirs.get_weights(), strict=True))
    for ours, wanted in pairs:
        np.testing.assert_allclose(ours, np.asarray(wanted).reshape(ours.shape), rtol=1e-9, atol=1e-11)


@cases
def test_masks_of_both_shapes(shape, axis):
    (x, *_), _ = inputs(shape, axis)
    axes = tuple(a % len(shape) for a in axis)
    kept = tuple(1 if i in axes else extent for i, extent in enumerate(shape))
    mask = np.random.default_rng(5).random(kept) < 0.7
    bare = mask.reshape([extent for i, extent in enumerate(shape) if i not in axes])
    wide, narrow = (bnfast.moments(x, axis=axis, mask=m) for m in (mask, bare))
    assert wide.count == narrow.count == (mask.sum() if x.size else 0)
    same(wide.mean, narrow.mean)
    same(wide.variance, narrow.variance)


@cases
def test_out(shape, axis):
    (x, dy, _), (gamma, beta, *_) = inputs(shape, axis)
    train = bnfast.batch_norm_train(x, gamma, beta, axis=axis)
    grad = bnfast.batch_norm_grad(dy, x, train.mean, train.invstd, gamma, axis=axis)
    for out in (np.empty_like(x), dy.copy()):
        given = out if out.size and np.array_equal(out, dy) else dy
        back = bnfast.batch_norm_grad(given, x, train.mean, train.invstd, gamma, axis=axis, out=out)
        assert back.dx is out
        same(out, grad.dx)
    fused = {"axis": axis, "activation": "relu", "y": train.y}
    wanted = bnfast.batch_norm_grad(dy, x, train.mean, train.invstd, gamma, **fused)
    apart = np.empty_like(x)
    back = bnfast.batch_norm_grad(dy, x, train.mean, train.invstd, gamma, out_dresidual=apart, **fused)
    assert back.dresidual is apart
    same(apart, wanted.dresidual)
    same(back.dx, wanted.dx)
    moving = [np.zeros(gamma.shape, np.float32), np.ones(gamma.shape, np.float32)]
    for out in (np.empty_like(x), x):
        wanted = bnfast.batch_norm_infer(x, *moving, gamma, beta, axis=axis)
        apart = np.empty_like(x)
        assert bnfast.batch_norm_infer(x, *moving, gamma, beta, axis=axis, out=apart) is apart
        same(apart, wanted)
        assert bnfast.batch_norm_train(x, gamma, beta, axis=axis, out=out).y is out
        same(out, train.y)


@cases
def test_x_that_is_not_contiguous_is_not_written(shape, axis):
    (x, *_), (gamma, beta, *_) = inputs(shape, axis)
    for odd in (np.asfortranarray(x), np.repeat(x, 2, -1)[..., ::2]):
        y = bnfast.batch_norm_train(odd, gamma, beta, axis=axis).y
        assert y.flags.c_contiguous
        same(y, bnfast.batch_norm_train(x, gamma, beta, axis=axis).y)
        np.testing.assert_array_equal(odd, x)
    axes = sorted(a % x.ndim for a in axis)
    order = [*(i for i in range(x.ndim) if i not in axes), *axes]
    free = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))  # merges without a copy
    same(bnfast.batch_norm_train(free, gamma, beta, axis=axis).y, y)
    np.testing.assert_array_equal(free, x)


def test_adjacent_axes_are_not_copied():
    x = np.random.default_rng(6).standard_normal((6, 3, 4)).astype(np.float32)
    dy = np.ones_like(x)
    train = bnfast.batch_norm_train(x, axis=(1, 2))
    grad = bnfast.batch_norm_grad(dy, x, train.mean, train.invstd, axis=(1, 2), residual=x)
    assert np.shares_memory(grad.dresidual, dy)


def test_channels_are_in_the_order_of_x():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    mean = bnfast.moments(x, axis=(2, 0)).mean
    np.testing.assert_array_equal(mean, x.mean(1))
    x[1, 0, 2] = np.inf
    moving = np.zeros((2, 4)), np.ones((2, 4))
    with pytest.raises(FloatingPointError, match=r"channels? 6\b"):
        bnfast.batch_norm_train(x, None, None, *moving, axis=(2, 0), nan_policy="raise", out=np.empty_like(x))
    assert not moving[0].any()
    bnfast.batch_norm_train(x, None, None, *moving, axis=(2, 0), nan_policy="skip_update")
    assert np.argwhere(moving[0] == 0).tolist() == [[1, 2]]


X = np.ones((6, 3, 4), np.float32)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"axis": (1, 3)}, ValueError, r"axis must be in \[-3, 3\) for x of shape \(6, 3, 4\). Received: 3"),
        ({"axis": (1, -2)}, ValueError, r"axis must name each axis once. Received: \(1, -2\)"),
        ({"axis": (1, True)}, TypeError, "axis must be an integer. Received: True"),
        (
            {"gamma": np.ones(12)},
            ValueError,
            r"gamma must have shape \(3, 4\) to match axes \(1, 2\) of x. Rec.*\(12,\)",
        ),
        ({"moving_mean": np.ones((4, 3)).T}, ValueError, "moving_mean must be C-contiguous"),
        ({"mask": np.ones((6, 3))}, ValueError, r"mask must have shape \(6,\), or broadcast to \(6, 1, 1\)"),
        ({"residual": np.ones((6, 12), np.float32)}, ValueError, r"residual must have the shape of x, \(6, 3, 4\)"),
        ({"out": np.ones((6, 12), np.float32)}, ValueError, r"out must have the shape of x, \(6, 3, 4\)"),
        ({"out": X[:, ::-1]}, ValueError, "out must be C-contiguous"),
        ({"residual": X, "out": X}, ValueError, "out must not overlap residual"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs, error, text):
    x, moving = X.copy(), {"moving_mean": np.zeros((3, 4)), "moving_variance": np.ones((3, 4))}
    before = X.copy()
    with pytest.raises(error, match=text):
        bnfast.batch_norm_train(x, **({"axis": (1, 2)} | moving | kwargs))
    assert not moving["moving_mean"].any()
    np.testing.assert_array_equal(X, before)


def make_layer(axis, vectors, **kwargs):
    layer = bnfast.BatchNormalization(axis=axis, momentum=0.75, **kwargs)
    layer.load_state_dict(dict(zip(("gamma", "beta", "moving_mean", "moving_variance"), vectors, strict=True)))
    return layer


GHOSTS = [{"virtual_batch_size": 2, "virtual_batch_grouping": grouping} for grouping in ("contiguous", "strided")]
LAYERS = [(*case, {"activation": "relu"}) for case in CASES]
LAYERS += [(shape, axis, ghosts) for shape, axis in CASES if shape[0] in (4, 6) and 0 not in axis for ghosts in GHOSTS]


@pytest.mark.parametrize(("shape", "axis", "kwargs"), LAYERS, ids=str)
def test_the_layer_has_the_bits_of_one_axis(shape, axis, kwargs):
    (x, dy, residual), vectors = inputs(shape, axis)
    flat, place = one_axis(x, axis)
    mask = np.random.default_rng(7).random([1 if i == place % flat.ndim else e for i, e in enumerate(flat.shape)]) < 0.7
    off = [extent for i, extent in enumerate(shape) if i not in {a % len(shape) for a in axis}]
    ours, theirs = make_layer(axis, vectors, **kwargs), make_layer(place, [v.ravel() for v in vectors], **kwargs)
    assert ours.channels == vectors[0].shape
    for training in (True, False):
        y = ours(x, training=training, mask=mask.reshape(off), residual=residual)
        same(one_axis(y, axis)[0], theirs(flat, training=training, mask=mask, residual=one_axis(residual, axis)[0]))
        same(one_axis(ours.backward(dy), axis)[0], theirs.backward(one_axis(dy, axis)[0]))
        for name in ("dgamma", "dbeta", "moving_mean", "moving_variance"):
            assert getattr(ours, name).shape == vectors[0].shape
            same(getattr(ours, name), getattr(theirs, name))
    again = bnfast.BatchNormalization(**ours.get_config())
    again.load_state_dict(ours.state_dict())
    same(again(x, residual=residual), ours(x, residual=residual))
    fresh = bnfast.BatchNormalization(axis=axis)
    fresh(x, training=True)
    assert fresh.gamma.shape == fresh.moving_variance.shape == ours.channels


def test_bad_arguments_of_the_layer():
    layer = bnfast.BatchNormalization(axis=[1, -1])
    assert layer.get_config()["axis"] == layer.axis == (1, -1)
    with pytest.raises(ValueError, match=r"channels must be 2 integers, one for each of the axes \(1, -1\).*: 12"):
        layer.build(12)
    with pytest.raises(ValueError, match=r"moving_mean must have the extents of axes \(1, -1\).*Received: \(12,\)"):
        layer.load_state_dict({name: np.ones(12) for name in ("gamma", "beta", "moving_mean", "moving_variance")})
    with pytest.raises(ValueError, match=r"axis must name each axis once. Received: \(1, -1\) for x of shape \(6, 3\)"):
        layer(X[:, :, 0])
    assert not layer.built
    layer(X, training=True)
    with pytest.raises(
        ValueError,
        match=r"x must have \(3, 4\) channels on axis \(1, -1\), which this layer was built with.*\(6, 4, 3\)",
    ):
        layer(X.reshape(6, 4, 3))
    with pytest.raises(
        ValueError, match=r"channels must be \(3, 4\), which this layer was built with.*Received: \(4, 3\)"
    ):
        layer.build((4, 3))
    with pytest.raises(ValueError, match=r"gamma must have shape \(3, 4\), one value per channel. Received: \(12,\)"):
        layer.load_state_dict({**layer.state_dict(), "gamma": np.ones(12, np.float32)})
    with pytest.raises(ValueError, match="axis must not be 0, which is the batch axis, with virtual_batch_size"):
        bnfast.BatchNormalization(axis=(0, 2), virtual_batch_size=2)(X, training=True)
    with pytest.raises(TypeError, match=r"axis must be an integer. Received: 1.5"):
        bnfast.BatchNormalization(axis=(1, 1.5))
    with pytest.raises(ValueError, match=r"channels must be an integer. Received: "):
        bnfast.BatchNormalization().build((3, 4))
    with pytest.raises(ValueError, match=r"channels must be at least 0. Received: -1"):
        bnfast.BatchNormalization().build(-1)


@pytest.mark.parametrize(
    ("axes", "mask", "attached", "wanted"),
    [
        ([3], (2, 3, 4), False, (3,)),
        ([1], (2, 4, 5), False, (1,)),
        ([1], (2, 3, 4), True, (3,)),
        ([1], (2, 4, 5), True, (1,)),  # fits one reading alone
        ([1], (2, 3, None), False, (3,)),
        ([1, 3], (2, 4), False, (1, 3)),
        ([1, 3], (2, 3, 4), True, (3,)),
        ([1, 3], (2, 4), True, "axes [1, 3]"),
        ([1, 3], (2,), False, "axes [1, 3]"),
        ([1], (2, 5, 4), False, "axis 1"),
    ],
)
def test_where_a_mask_gets_an_axis(axes, mask, attached, wanted):
    """Of a tensor of shape (2, 3, 4, 5) in a framework."""
    places = TensorAxes.of(axes, (2, 3, 4, 5))
    if isinstance(wanted, tuple):
        assert places.mask_axes(mask, (2, 3, 4, 5), attached) == wanted
        return
    with pytest.raises(ValueError) as caught:
        places.mask_axes(mask, (2, 3, 4, 5), attached)
    assert str(caught.value) == (
        f"mask must have the shape of inputs without {wanted}, or extents of 1 in it. "
        f"Received: mask.shape={mask}, inputs.shape=(2, 3, 4, 5)"
    )
