"""The layers of bnfast.keras on the backend that KERAS_BACKEND names, beside Keras's own and the NumPy layer."""

import functools
import logging

import bnfast
import bnfast.keras
import keras
import numpy as np
import pytest
from keras import ops

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(2026)
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@functools.cache
def on_kernels() -> bool:
    """Whether bnfast's kernels compute on this backend."""
    if BACKEND == "tensorflow":
        return True
    from bnfast.keras.layers.portable.kernels import framework

    return framework().absent() is None


def array(tensor):
    return ops.convert_to_numpy(tensor)


def gradients(function, *arrays):
    """d(sum(function(*arrays) * weights))/d(arrays), with fixed weights, in the backend's own way."""

    def loss(*tensors):
        y = ops.cast(function(*tensors), "float32")
        weights = ops.reshape(ops.sin(ops.arange(int(np.prod(y.shape)), dtype="float32")), tuple(y.shape))
        return ops.sum(y * weights)

    if BACKEND == "torch":
        import torch

        leaves = [torch.tensor(a, requires_grad=True) for a in arrays]
        return [array(g) for g in torch.autograd.grad(loss(*leaves), leaves)]
    if BACKEND == "jax":
        import jax

        with keras.StatelessScope():  # what the layers assign has no value outside of the trace
            return [array(g) for g in jax.grad(loss, argnums=tuple(range(len(arrays))))(*arrays)]
    import tensorflow as tf

    leaves = [tf.constant(a) for a in arrays]
    with tf.GradientTape() as tape:
        tape.watch(leaves)
        total = loss(*leaves)
    return [array(g) for g in tape.gradient(total, leaves)]


def built(kind, shape, **kwargs):
    layer = kind(**kwargs)
    layer.build(shape)
    for variable in layer.trainable_variables:
        variable.assign(RNG.normal(1, 0.2, variable.shape))
    return layer


def pair(shape, *, ours=None, **kwargs):
    """Our layer and Keras's with equal weights."""
    mine = built(bnfast.keras.BatchNormalization, shape, **kwargs, **(ours or {}))
    theirs = keras.layers.BatchNormalization(**kwargs)
    theirs.build(shape)
    theirs.set_weights(mine.get_weights())
    return mine, theirs


SHAPES = [((6, 5), -1), ((4, 3, 5), 1), ((4, 3, 5), -1), ((4, 5, 6, 7), -1), ((4, 5, 6, 7), 1), ((2, 3, 4, 3, 5), -1)]


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_trains_as_keras_does(shape, axis):
    mine, theirs = pair(shape, axis=axis, momentum=0.7)
    x = RNG.normal(2, 3, shape).astype("float32")
    for _ in range(3):
        np.testing.assert_allclose(array(mine(x, training=True)), array(theirs(x, training=True)), **TOLERANCE)
    np.testing.assert_allclose(array(mine(x)), array(theirs(x)), **TOLERANCE)
    assert [v.name for v in mine.weights] == [v.name for v in theirs.weights]
    for own, other in zip(mine.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(own, other, **TOLERANCE)


def test_momentum_and_epsilon_may_be_scalar_tensors():
    scalars = {"momentum": ops.convert_to_tensor(0.7), "epsilon": ops.convert_to_tensor(0.25)}
    mine, theirs = pair((6, 5), momentum=0.7, epsilon=0.25, ours={})
    given = bnfast.keras.BatchNormalization(**scalars)
    given.build((6, 5))
    given.set_weights(mine.get_weights())
    x = RNG.normal(2, 3, (6, 5)).astype("float32")
    np.testing.assert_allclose(array(given(x, training=True)), array(theirs(x, training=True)), **TOLERANCE)
    np.testing.assert_allclose(array(given(x)), array(theirs(x)), **TOLERANCE)
    config = given.get_config()
    assert (config["momentum"], config["epsilon"]) == pytest.approx((0.7, 0.25))


@pytest.mark.parametrize("name", ["momentum", "epsilon"])
def test_scalars_that_are_none_are_refused(name):
    """A wrong type, shape or value, as a number and as a tensor."""
    wanted = rf"{name} must be"
    for value in ("0.5", b"1", [0.5], object(), ops.convert_to_tensor([True])[0]):
        with pytest.raises((TypeError, ValueError), match=wanted):
            bnfast.keras.BatchNormalization(**{name: value})
    for value in (-0.5, float("nan"), float("inf"), 10**400, np.array([0.5]), np.array(-1.0)):
        with pytest.raises(ValueError, match=wanted):
            bnfast.keras.BatchNormalization(**{name: value})
    for value in ([0.5], -0.5, float("nan")):
        with pytest.raises(ValueError, match=wanted):
            bnfast.keras.BatchNormalization(**{name: ops.convert_to_tensor(value)})(np.ones((4, 3)), training=True)


def test_momentum_of_a_variable_follows_it():
    variable = keras.Variable(0.5, trainable=False)
    if BACKEND == "jax":
        with pytest.raises(TypeError, match="momentum must be a number or a scalar array on jax"):
            bnfast.keras.BatchNormalization(momentum=variable)
        return
    layer = bnfast.keras.BatchNormalization(momentum=variable)
    x = np.full((4, 3), 8, "float32")
    layer(x, training=True)
    np.testing.assert_allclose(array(layer.moving_mean), 4.0)
    variable.assign(1.0)
    layer(x, training=True)
    np.testing.assert_allclose(array(layer.moving_mean), 4.0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_gradient_is_that_of_keras(shape, axis, training):
    mine, theirs = pair(shape, axis=axis)
    x = RNG.normal(1, 2, shape).astype("float32")
    own, other = (gradients(lambda t, layer=layer: layer(t, training=training), x)[0] for layer in (mine, theirs))
    np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_same_bits_as_numpy(shape, axis, dtype):
    """y, moving_mean and moving_variance, to the bit, wherever the kernels compute."""
    if not on_kernels():
        pytest.skip("bnfast has no kernels for this backend here")
    layer = built(
        bnfast.keras.BatchNormalization, shape, axis=axis, dtype=f"mixed_{dtype}" if dtype != "float32" else dtype
    )
    gamma, beta, *moving = layer.get_weights()
    x = array(ops.cast(RNG.normal(3, 2, shape), dtype))
    y = array(layer(x, training=True))
    expected = bnfast.batch_norm_train(x, gamma, beta, *moving, axis=axis)
    np.testing.assert_array_equal(y.view(np.uint8), expected.y.view(np.uint8))
    for mine, own in zip(layer.get_weights()[2:], moving, strict=True):
        np.testing.assert_array_equal(mine, own)


@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
def test_virtual_batch_size(grouping):
    shape, size = (8, 5, 3), 4
    layer = built(
        bnfast.keras.BatchNormalization, shape, virtual_batch_size=size, virtual_batch_grouping=grouping, momentum=0.5
    )
    gamma, beta, mean, variance = layer.get_weights()
    x = RNG.normal(1, 2, shape).astype("float32")
    ghosts = x.reshape(2, size, 5, 3) if grouping == "contiguous" else x.reshape(size, 2, 5, 3).swapaxes(0, 1)
    results = [bnfast.batch_norm_train(np.ascontiguousarray(ghost), gamma, beta) for ghost in ghosts]
    y = np.stack([r.y for r in results])
    y = y.reshape(shape) if grouping == "contiguous" else y.swapaxes(0, 1).reshape(shape)
    np.testing.assert_allclose(array(layer(x, training=True)), y, **TOLERANCE)
    _, _, new_mean, new_variance = layer.get_weights()
    np.testing.assert_allclose(new_mean, mean / 2 + np.mean([r.mean for r in results], 0) / 2, **TOLERANCE)
    np.testing.assert_allclose(new_variance, variance / 2 + np.mean([r.variance for r in results], 0) / 2, **TOLERANCE)
    with pytest.raises(ValueError, match="virtual_batch_size must divide the batch"):
        layer(x[:7], training=True)


@pytest.mark.skipif(not hasattr(keras.layers.BatchNormalization(), "renorm"), reason="Keras before 3.14 has no renorm")
def test_renorm_is_that_of_keras():
    clipping = {"rmin": 0.5, "rmax": 1.5, "dmax": 0.3}
    mine, theirs = pair((6, 4, 3), renorm=True, renorm_clipping=clipping, renorm_momentum=0.6)
    for _ in range(4):
        x = RNG.normal(1, 2, (6, 4, 3)).astype("float32")
        own, other = (gradients(lambda t, layer=layer: layer(t, training=True), x)[0] for layer in (mine, theirs))
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(array(mine(x, training=True)), array(theirs(x, training=True)), **TOLERANCE)
    for own, other in zip(mine.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(own, other, **TOLERANCE)


@pytest.mark.parametrize("axis", [1, 2])
def test_mask(axis):
    """Masked entries don't count, whatever they hold: forward, gradient and moving statistics."""
    shape = (5, 4, 3)
    layer = built(bnfast.keras.BatchNormalization, shape, axis=axis, momentum=0.5)
    gamma, beta, *moving = layer.get_weights()
    x = RNG.normal(1, 2, shape).astype("float32")
    mask = RNG.random([n for i, n in enumerate(shape) if i != axis]) < 0.6
    wide = np.expand_dims(mask, axis)
    expected = bnfast.batch_norm_train(x, gamma, beta, *moving, axis=axis, momentum=0.5, mask=wide)
    np.testing.assert_allclose(array(layer(x, training=True, mask=mask)), expected.y, **TOLERANCE)
    for mine, own in zip(layer.get_weights()[2:], moving, strict=True):
        np.testing.assert_allclose(mine, own, **TOLERANCE)
    dy = np.sin(np.arange(x.size, dtype="float32")).reshape(shape)
    dx = bnfast.batch_norm_grad(dy, x, expected.mean, expected.invstd, gamma, beta, axis=axis, mask=wide).dx
    own = gradients(lambda t: layer(t, training=True, mask=mask), x)[0]
    np.testing.assert_allclose(own, dx, rtol=1e-4, atol=1e-4)


def test_a_batch_without_weight_changes_nothing():
    layer = built(bnfast.keras.BatchNormalization, (4, 3, 2))
    before = layer.get_weights()
    x = RNG.normal(size=(4, 3, 2)).astype("float32")
    layer(x, training=True, mask=np.zeros((4, 3), bool))
    assert layer(np.zeros((0, 3, 2), "float32"), training=True).shape == (0, 3, 2)
    for own, other in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(own, other)


def test_adjustment():
    shape = (6, 4, 3)
    scale, bias = RNG.normal(1, 0.1, (6, 1, 1)).astype("float32"), RNG.normal(0, 0.1, (6, 1, 3)).astype("float32")
    seen = []

    def adjustment(given):
        seen.append(tuple(int(n) for n in given))
        return scale, bias

    layer = built(bnfast.keras.BatchNormalization, shape, adjustment=adjustment)
    gamma, beta, *_ = layer.get_weights()
    x = RNG.normal(1, 2, shape).astype("float32")
    xhat = bnfast.batch_norm_train(x).y
    np.testing.assert_allclose(array(layer(x, training=True)), (xhat * scale + bias) * gamma + beta, **TOLERANCE)
    assert seen == [shape]


ACTIVATIONS = [
    "relu",
    "relu6",
    "leaky_relu",
    "silu",
    "gelu",
    "elu",
    "selu",
    "softplus",
    "tanh",
    "sigmoid",
    "exponential",
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_activation(activation, training):
    shape = (4, 3, 5)
    mine, theirs = pair(shape, ours={"activation": activation})
    function = keras.activations.get(activation)
    x = RNG.normal(1, 2, shape).astype("float32")
    np.testing.assert_allclose(
        array(mine(x, training=training)), array(function(theirs(x, training=training))), **TOLERANCE
    )
    own = gradients(lambda t: mine(t, training=training), x)[0]
    other = gradients(lambda t: function(theirs(t, training=training)), x)[0]
    np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-4)


def test_add():
    shape = (4, 5, 6, 3)
    add = built(bnfast.keras.BatchNormalizationAdd, [shape, shape], activation="relu")
    plain = keras.layers.BatchNormalization()
    plain.build(shape)
    plain.set_weights(add.get_weights())
    x, r = RNG.normal(size=(2, *shape)).astype("float32")
    own = gradients(lambda t, s: add([t, s], training=True), x, r)
    other = gradients(lambda t, s: ops.relu(plain(t, training=True) + s), x, r)
    for mine, theirs in zip(own, other, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_conditional():
    x, labels = RNG.normal(size=(6, 4, 3)).astype("float32"), np.array([0, 2, 1, 1, 0, 2])
    layer = built(bnfast.keras.ConditionalBatchNormalization, [(6, 4, 3), (6,)], num_classes=3)
    gamma, beta, *_ = layer.get_weights()
    expected = bnfast.batch_norm_train(x).y * gamma[labels][:, None] + beta[labels][:, None]
    np.testing.assert_allclose(array(layer([x, labels], training=True)), expected, **TOLERANCE)
    with pytest.raises(ValueError, match="labels must be in"):
        layer([x, np.array([0, 1, 2, 3, 0, 1])], training=True)


@pytest.mark.parametrize("training", [True, False])
def test_group_and_layer_norm(training):
    shape = (4, 5, 6, 8)
    x = RNG.normal(1, 2, shape).astype("float32")
    for ours, theirs, kwargs in (
        (bnfast.keras.GroupNormalization, keras.layers.GroupNormalization, {"groups": 4}),
        (bnfast.keras.GroupNormalization, keras.layers.GroupNormalization, {"groups": 5, "axis": 1}),
        (bnfast.keras.LayerNormalization, keras.layers.LayerNormalization, {}),
        (bnfast.keras.LayerNormalization, keras.layers.LayerNormalization, {"axis": [1, 3]}),
    ):
        mine, other = built(ours, shape, **kwargs), theirs(**kwargs)
        other.build(shape)
        other.set_weights(mine.get_weights())
        np.testing.assert_allclose(array(mine(x, training=training)), array(other(x)), **TOLERANCE)
        own, reference = gradients(lambda t, m=mine: m(t, training=training), x)[0], gradients(other, x)[0]
        np.testing.assert_allclose(own, reference, rtol=2e-4, atol=2e-4)


def test_weight_norm():
    layer = bnfast.keras.WeightNormalization(keras.layers.Dense(4, activation="relu"))
    x = RNG.normal(2, 3, (32, 5)).astype("float32")
    layer(x, training=True)
    linear = x @ array(layer.remove().kernel) + array(layer.remove().bias)
    np.testing.assert_allclose(linear.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(linear.std(0), 1, atol=1e-3)
    np.testing.assert_allclose(array(layer(x)), np.maximum(linear, 0), rtol=1e-4, atol=1e-4)


def test_plain_average():
    layer = built(bnfast.keras.BatchNormalization, (6, 3), momentum=None)
    batches = RNG.normal(1, 2, (3, 6, 3)).astype("float32")
    for batch in batches:
        layer(batch, training=True)
    np.testing.assert_allclose(array(layer.moving_mean), batches.mean(1).mean(0), **TOLERANCE)
    np.testing.assert_allclose(array(layer.moving_variance), batches.var(1).mean(0), **TOLERANCE)
    assert int(array(layer.batches)) == 3


def test_skip_update():
    layer = built(bnfast.keras.BatchNormalization, (4, 2), nan_policy="skip_update", momentum=0.5, correction=1)
    x = RNG.normal(size=(4, 2)).astype("float32")
    x[1, 0] = np.nan
    y = array(layer(x, training=True))
    assert np.isnan(y[:, 0]).all()
    assert np.isfinite(y[:, 1]).all()
    np.testing.assert_allclose(array(layer.moving_variance), [1, 0.5 + x[:, 1].var(ddof=1) / 2], **TOLERANCE)


def test_several_axes():
    layer = built(bnfast.keras.BatchNormalization, (6, 4, 5, 3), axis=[1, 3])
    x = RNG.normal(1, 2, (6, 4, 5, 3)).astype("float32")
    gamma, beta, *_ = layer.get_weights()
    mean, variance = x.mean((0, 2), keepdims=True), x.var((0, 2), keepdims=True)
    expected = (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    np.testing.assert_allclose(array(layer(x, training=True)), expected, **TOLERANCE)


def test_freezing():
    layer = built(bnfast.keras.BatchNormalization, (6, 3))
    x = RNG.normal(1, 2, (6, 3)).astype("float32")
    layer.trainable = False
    before = layer.get_weights()
    np.testing.assert_array_equal(array(layer(x, training=True)), array(layer(x)))
    layer.trainable, layer.update_statistics = True, False
    layer(x, training=True)
    for own, other in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(own, other)


def test_training_as_a_tensor():
    layer = built(bnfast.keras.BatchNormalization, (6, 3))
    x = RNG.normal(1, 2, (6, 3)).astype("float32")
    before = layer.get_weights()
    np.testing.assert_array_equal(
        array(layer(x, training=ops.convert_to_tensor(False))), array(layer(x, training=False))
    )
    for own, other in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(own, other)
    y = array(layer(x, training=ops.convert_to_tensor(True)))
    np.testing.assert_allclose(y.mean(0), array(layer.beta), atol=1e-5)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow has tf.distribute")
def test_what_only_tensorflow_has_says_so(caplog):
    with pytest.raises((NotImplementedError, ValueError), match=r"synchronized=True.*the TensorFlow backend"):
        built(bnfast.keras.BatchNormalization, (6, 3), synchronized=True)(np.ones((6, 3), "float32"), training=True)
    for name in ("diagnose", "recalibrate", "Watch"):
        with pytest.raises(RuntimeError, match=f"{name} needs the TensorFlow backend.*Received: {BACKEND}"):
            getattr(bnfast.keras, name)(None)
    with pytest.raises(ValueError, match="bridge must be one of"):
        bnfast.keras.BatchNormalization(bridge="torch")
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]
