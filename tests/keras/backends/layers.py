"""The layers of bnfast.keras on the backend that KERAS_BACKEND names, beside Keras's own and the NumPy layer."""

import functools
import logging
import re

import bnfast
import bnfast.keras
import keras
import numpy as np
import pytest
from keras import ops

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(2026)
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


on_jax = pytest.mark.skipif(BACKEND != "jax", reason="only JAX traces them")


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


def values(variables):
    return [variable.value for variable in variables]


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


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow's op refuses it, in its own words")
def test_a_scalar_tensor_is_checked_in_every_call():
    layer = bnfast.keras.BatchNormalization()
    layer.momentum, x = ops.convert_to_tensor(2.0), np.ones((4, 3), "float32")
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\]. Received: 2.0"):
        layer(x, training=True)
    layer.momentum, layer.epsilon = 0.5, ops.convert_to_tensor(-1.0)
    with pytest.raises(ValueError, match=r"epsilon must be finite and >= 0\. Received: -1\.0"):
        layer(x)


@on_jax
@pytest.mark.parametrize("name", ["momentum", "epsilon"])
def test_a_scalar_that_jax_traces(name, caplog):
    import jax

    x = RNG.normal(1, 2, (6, 3)).astype("float32")
    layer, wanted = built(bnfast.keras.BatchNormalization, (6, 3)), bnfast.keras.BatchNormalization(**{name: 0.25})
    wanted.build((6, 3))
    wanted.set_weights(layer.get_weights())
    weights = values(layer.trainable_variables), values(layer.non_trainable_variables)

    @jax.jit
    def run(value):
        setattr(layer, name, value)
        with pytest.raises(ValueError, match=f"{name} must have a value where it is written to a config. Received: "):
            layer.get_config()
        return layer.stateless_call(*weights, x, training=True)

    y, moving = run(0.25)
    np.testing.assert_allclose(y, array(wanted(x, training=True)), **TOLERANCE)
    for own, other in zip(moving, wanted.non_trainable_variables, strict=True):
        np.testing.assert_allclose(own, array(other), **TOLERANCE)
    on_keras = "bnfast.keras leaves batch norm to Keras's own ops on JAX, because epsilon is a value that JAX traces"
    assert caplog.messages.count(on_keras) == (name == "epsilon")


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


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_integers_and_booleans_become_float32(dtype):
    x = (RNG.normal(size=(6, 3)) * 2 + 4).astype(dtype)
    y = bnfast.keras.BatchNormalization()(x, training=True)
    assert keras.backend.standardize_dtype(y.dtype) == "float32"
    np.testing.assert_allclose(array(y), bnfast.batch_norm_train(x.astype("float32")).y, **TOLERANCE)


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"inputs must have a float, integer or boolean dtype\. Received: complex64"):
        bnfast.keras.BatchNormalization()(np.ones((4, 3), "complex64"), training=True)


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


def test_a_ghost_without_weight_does_not_count():
    mine, wanted = (bnfast.keras.BatchNormalization(momentum=0.5, virtual_batch_size=size) for size in (4, None))
    x, mask = RNG.normal(1, 2, (8, 5, 3)).astype("float32"), RNG.random((8, 5)) < 0.6
    mask[4:] = False
    mine(x, training=True, mask=mask)
    wanted(x[:4], training=True, mask=mask[:4])
    for own, other in zip(mine.get_weights(), wanted.get_weights(), strict=True):
        np.testing.assert_allclose(own, other, **TOLERANCE)


has_renorm = pytest.mark.skipif(
    not hasattr(keras.layers.BatchNormalization(), "renorm"), reason="Keras before 3.14 has no renorm"
)


@has_renorm
@pytest.mark.parametrize(
    "affine", [{}, {"scale": False}, {"center": False}, {"scale": False, "center": False}], ids=str
)
def test_renorm_is_that_of_keras(affine):
    clipping = {"rmin": 0.5, "rmax": 1.5, "dmax": 0.3}
    mine, theirs = pair((6, 4, 3), renorm=True, renorm_clipping=clipping, renorm_momentum=0.6, **affine)
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


FEATURES = [{}, {"correction": 1}, pytest.param({"renorm": True, "renorm_momentum": 0.5}, marks=has_renorm)]


@pytest.mark.parametrize("kwargs", FEATURES, ids=str)
def test_a_mask_that_varies_by_channel(kwargs):
    """Masking's mask has the shape x.shape[:-1], so it differs between the channels of axis 1: beside a layer each."""
    kwargs = {"momentum": 0.5, "nan_policy": "skip_update", **kwargs}
    x = RNG.normal(1, 2, (8, 4, 3)).astype("float32")
    x[RNG.random((8, 4)) < 0.4] = x[:, 3] = 0
    x[0, 0] = 1, np.nan, 2
    layer = built(bnfast.keras.BatchNormalization, x.shape, axis=[1, 2], **kwargs)
    before = layer.get_weights()
    y = array(layer(keras.layers.Masking()(x), training=True))
    for i in range(4):
        one = bnfast.keras.BatchNormalization(**kwargs)
        one.build((8, 3))
        one.set_weights([weight[0, i] for weight in before])
        np.testing.assert_allclose(
            y[:, i], array(one(x[:, i], training=True, mask=(x[:, i] != 0).any(-1))), **TOLERANCE
        )
        for own, other in zip(layer.get_weights(), one.get_weights(), strict=True):
            np.testing.assert_allclose(own[0, i], other, **TOLERANCE)


class Masked(keras.Model):
    def __init__(self, norm):
        super().__init__()
        self.masking, self.norm = keras.layers.Masking(), norm

    def call(self, x, training=None):
        return self.norm(self.masking(x), training=training)


def functional(norm):
    inputs = keras.Input((4, 4))
    x = keras.layers.Masking()(inputs)
    return keras.Model(inputs, norm([x, x] if isinstance(norm, bnfast.keras.BatchNormalizationAdd) else x))


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (functional, bnfast.keras.BatchNormalization),
        (functional, bnfast.keras.BatchNormalizationAdd),
        (Masked, bnfast.keras.BatchNormalization),
    ],
)
def test_a_mask_in_a_model_has_the_shape_of_the_inputs_without_the_last_axis(make, kind, eagerly):
    """Of axis 1 of a square, either reading fits."""
    x = RNG.normal(1, 2, (6, 4, 4)).astype("float32")
    x[1, 2] = x[4, 0] = x[3, 2] = 0
    layer = kind(axis=1, momentum=0.0)
    model = make(layer)
    model.compile("sgd", "mse", run_eagerly=eagerly)
    model.train_on_batch(x, x)
    present = (x != 0).any(-1)
    np.testing.assert_allclose(array(layer.moving_mean), [x[present[:, i], i].mean() for i in range(4)], **TOLERANCE)
    own = RNG.random((6, 4)) < 0.6  # has the shape without axis 1
    layer([x, x] if isinstance(layer, bnfast.keras.BatchNormalizationAdd) else x, training=True, mask=own)
    np.testing.assert_allclose(array(layer.moving_mean), (x * own[:, None]).sum((0, 2)) / own.sum(), **TOLERANCE)


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


def test_adjustment_of_several_axes():
    shape = (6, 4, 3)
    scale, bias = RNG.normal(1, 0.1, (6, 1, 1)).astype("float32"), RNG.normal(0, 0.1, (4, 3)).astype("float32")
    layer = built(bnfast.keras.BatchNormalization, shape, axis=[0, 2], adjustment=lambda given: (scale, bias))
    gamma, beta, *_ = layer.get_weights()
    x = RNG.normal(1, 2, shape).astype("float32")
    xhat = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(array(layer(x, training=True)), (xhat * scale + bias) * gamma + beta, **TOLERANCE)


@pytest.mark.parametrize(
    ("returned", "error", "text"),
    [
        (1, TypeError, r"adjustment must return \(scale, bias\). Received: 1"),
        ((1, 2, 3), TypeError, r"adjustment must return \(scale, bias\). Received: \(1, 2, 3\)"),
        ((np.ones(5, "float32"), 1.0), ValueError, r"broadcast to inputs of shape \(6, 4, 3\). Received: \(5,\)"),
        ((1.0, np.ones((1, 1, 1, 1), "float32")), ValueError, r"of shape \(6, 4, 3\). Received: \(1, 1, 1, 1\)"),
    ],
)
def test_what_is_no_adjustment(returned, error, text):
    with pytest.raises(error, match=text):
        bnfast.keras.BatchNormalization(adjustment=lambda shape: returned)(np.ones((6, 4, 3), "float32"), training=True)


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
    with pytest.raises(TypeError, match=r"labels must have an integer dtype\. Received: float32"):
        layer([x, np.ones(6, "float32")])
    for shape in ((6, 2), (5,)):
        with pytest.raises(
            ValueError, match=rf"shape \(N,\) or \(N, 1\) with N = 6. Received: {re.escape(str(shape))}"
        ):
            layer([x, np.ones(shape, "int32")])
    with pytest.raises(ValueError, match=r"inputs must be \[x, labels\], \[x\] or x. Received: 3 tensors"):
        layer.compute_output_shape([(6, 4, 3), (6,), (6,)])


@pytest.mark.parametrize("kwargs", [{"scale": False}, {"center": False}], ids=str)
def test_conditional_without_gamma_or_beta(kwargs):
    x, labels = RNG.normal(size=(6, 4, 3)).astype("float32"), np.array([0, 2, 1, 1, 0, 2])
    layer = built(bnfast.keras.ConditionalBatchNormalization, [(6, 4, 3), (6,)], num_classes=3, **kwargs)
    rows = layer.get_weights()[0][labels][:, None]
    xhat = bnfast.batch_norm_train(x).y
    expected = xhat + rows if "scale" in kwargs else xhat * rows
    np.testing.assert_allclose(array(layer([x, labels], training=True)), expected, **TOLERANCE)


def test_conditional_with_given_parameters():
    x, gamma, beta = (RNG.normal(size=shape).astype("float32") for shape in ((6, 4, 3), 3, (6, 3)))
    layer = bnfast.keras.ConditionalBatchNormalization(num_classes=3)
    y = layer(x, training=True, gamma=ops.convert_to_tensor(gamma), beta=ops.convert_to_tensor(beta))
    np.testing.assert_allclose(array(y), bnfast.batch_norm_train(x).y * gamma + beta[:, None], **TOLERANCE)


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


def test_weight_norm_without_a_bias_and_with_a_loss():
    dense = keras.layers.Dense(4, use_bias=False, activity_regularizer=keras.regularizers.L2(0.5))
    layer, x = bnfast.keras.WeightNormalization(dense), RNG.normal(2, 3, (32, 5)).astype("float32")
    y = array(layer(x, training=True))
    np.testing.assert_allclose(y.std(0), 1, atol=1e-3)
    assert [float(array(loss)) for loss in layer.losses] == pytest.approx([0.5 * (y**2).sum() / 32], rel=1e-4)


@on_jax
@pytest.mark.parametrize("initialized", [False, True])
def test_weight_norm_with_a_mode_that_jax_traces(initialized):
    import jax

    layer = built(bnfast.keras.WeightNormalization, (32, 5), layer=keras.layers.Dense(4))
    layer.initialized.assign(initialized)
    weights, x = (values(layer.trainable_variables), values(layer.non_trainable_variables)), RNG.normal(2, 3, (32, 5))
    run = lambda mode: layer.stateless_call(*weights, x.astype("float32"), training=mode)  # noqa: E731
    traced = jax.jit(run)
    for training in (False, True):
        for own, other in zip(jax.tree.leaves(traced(training)), jax.tree.leaves(run(training)), strict=True):
            np.testing.assert_allclose(own, other, **TOLERANCE)


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


@pytest.mark.parametrize(
    "kwargs", [{"virtual_batch_size": 2}, pytest.param({"renorm": True}, marks=has_renorm)], ids=str
)
def test_skip_update_of_features(kwargs):
    """The channel of a NaN keeps its state; the others have that of a layer without the NaN."""
    mine, wanted = (
        built(bnfast.keras.BatchNormalization, (4, 2), nan_policy=policy, **kwargs)
        for policy in ("skip_update", "propagate")
    )
    before, x = mine.get_weights()[2:], RNG.normal(size=(4, 2)).astype("float32")
    wanted(x, training=True)
    x[1, 0] = np.nan
    mine(x, training=True)
    for own, old, other in zip(mine.get_weights()[2:], before, wanted.get_weights()[2:], strict=True):
        assert own[0] == old[0]
        np.testing.assert_allclose(own[1], other[1], **TOLERANCE)


@pytest.mark.parametrize("axis", [[1, 3], [1, 2], [2, 3]], ids=str)
def test_several_axes(axis):
    layer = built(bnfast.keras.BatchNormalization, (6, 4, 5, 3), axis=axis)
    x = RNG.normal(1, 2, (6, 4, 5, 3)).astype("float32")
    gamma, beta, *_ = layer.get_weights()
    others = tuple(i for i in range(4) if i not in axis)
    mean, variance = x.mean(others, keepdims=True), x.var(others, keepdims=True)
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


def test_moving_statistics_normalize_and_are_updated():
    layer = built(bnfast.keras.BatchNormalization, (6, 3), use_batch_statistics=False, momentum=0.5, activation="relu")
    layer.set_weights([np.array(vector, "float32") for vector in ([1, 2, 3], [0, 1, 0], [1, 0, 2], [1, 4, 9])])
    gamma, beta, mean, variance = layer.get_weights()
    x = RNG.normal(1, 2, (6, 3)).astype("float32")
    expected = bnfast.batch_norm_infer(x, mean, variance, gamma, beta, activation="relu")
    np.testing.assert_allclose(array(layer(x, training=True)), expected, **TOLERANCE)
    np.testing.assert_allclose(array(layer.moving_mean), (mean + x.mean(0)) / 2, **TOLERANCE)
    np.testing.assert_allclose(array(layer.moving_variance), (variance + x.var(0)) / 2, **TOLERANCE)


TRACED = [
    {},
    {"momentum": None},
    {"virtual_batch_size": 3},
    {"update_statistics": False},
    {"use_batch_statistics": False},
    {"use_batch_statistics": True},
    {"adjustment": lambda shape: (2.0, 1.0)},
    {"dtype": "mixed_bfloat16", "activation": "relu"},
    pytest.param({"renorm": True}, marks=has_renorm),
]


@on_jax
@pytest.mark.parametrize("kwargs", TRACED, ids=lambda kwargs: "-".join(kwargs))
def test_training_that_jax_traces(kwargs):
    """y, its gradient and the statistics are those of the mode as a constant."""
    import jax

    layer = built(bnfast.keras.BatchNormalization, (6, 3), **kwargs)
    others, x = values(layer.non_trainable_variables), RNG.normal(1, 2, (6, 3)).astype("float32")

    def loss(trainable, x, training):
        y, new = layer.stateless_call(trainable, others, x, training=training, mask=np.arange(6) < 5)
        return ops.sum(ops.cast(y, "float32") ** 3), new

    gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
    traced = jax.jit(gradient)
    for training in (False, True):
        given = values(layer.trainable_variables), x, training
        for own, other in zip(jax.tree.leaves(traced(*given)), jax.tree.leaves(gradient(*given)), strict=True):
            assert own.dtype == other.dtype
            np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-3)


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
