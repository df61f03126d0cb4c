"""Freezing parts of the NumPy layer: the table in its docstring against our Keras layer, and trainable_affine."""

import numpy as np
import pytest
import sample_data
from bnfast import BatchNormalization

SHAPE = (12, 3, 4)
TABLE = [(None, True), (None, False), (False, True), (False, False), (True, True), (True, False)]
KINDS = [{}, {"renorm": True, "renorm_clipping": {"rmax": 1.2}}, {"virtual_batch_size": 4}, {"momentum": None}]
KINDS += [{"correction": 1, "nan_policy": "skip_update", "activation": "relu"}]


def make_layer(**kwargs):
    layer = BatchNormalization(dtype="float64", **kwargs)
    layer.build(4)
    for array, value in zip(
        (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance),
        sample_data.vectors(4, np.random.default_rng(1)),
        strict=True,
    ):
        array[:] = value
    return layer


def batches():
    rng = np.random.default_rng(2)
    return [sample_data.batch(SHAPE, -1, np.float64, rng) for _ in range(2)]


@pytest.mark.parametrize(("use_batch", "update"), TABLE)
@pytest.mark.parametrize("kwargs", KINDS, ids=str)
def test_equals_our_keras_layer(need, use_batch, update, kwargs):
    tf = need("tensorflow")
    import bnfast.keras

    ours = make_layer(use_batch_statistics=use_batch, update_statistics=update, **kwargs)
    given = ours.to_keras()
    theirs = bnfast.keras.BatchNormalization(**given["config"], dtype="float64")
    theirs.build(SHAPE)
    theirs.set_weights(given["weights"])
    x, dy = batches()
    for training, trainable in ((True, True), (False, True), (True, False), (True, True)):
        ours.trainable = theirs.trainable = trainable
        with tf.GradientTape() as tape:
            sources = [tf.constant(x), theirs.gamma.value, theirs.beta.value]
            tape.watch(sources)
            y = theirs(sources[0], training=training)
        wanted = [y, *tape.gradient(y, sources, output_gradients=tf.constant(dy))]
        before = ours.state_dict()
        actual = [ours(x, training=training), ours.backward(dy), ours.dgamma, ours.dbeta]
        for a, b in zip(actual, wanted, strict=True):
            np.testing.assert_allclose(
                a, b, rtol=1e-6, atol=1e-7
            )  # inference in TensorFlow's ops uses a float32 epsilon
        after = ours.state_dict()
        for name in after:
            np.testing.assert_allclose(after[name], getattr(theirs, name), rtol=1e-9, atol=1e-12)
        still = all(np.array_equal(before[name], after[name]) for name in after)
        assert still == (not (update and training and trainable))


@pytest.mark.parametrize("kwargs", KINDS, ids=str)
def test_unused_statistics_are_updated_the_same(kwargs):
    x, dy = batches()
    plain, ours = make_layer(**kwargs), make_layer(use_batch_statistics=False, **kwargs)
    inferred, expected = make_layer(**kwargs), make_layer(**kwargs)
    y = ours(x, training=True)
    plain(x, training=True)
    np.testing.assert_array_equal(y, inferred(x))
    np.testing.assert_array_equal(ours.backward(dy), [expected(x), expected.backward(dy)][1])
    for name, array in plain.state_dict().items():
        np.testing.assert_array_equal(getattr(ours, name), array)
    assert ours.batches == plain.batches == 1


def test_an_affine_part_that_is_not_trained():
    x, dy = batches()
    frozen, plain = make_layer(trainable_affine=False), make_layer()
    for layer in (frozen, plain):
        layer(x, training=True)
    np.testing.assert_array_equal(frozen.backward(dy), plain.backward(dy))
    assert (frozen.dgamma, frozen.dbeta) == (None, None)
    assert plain.dgamma is not None


def test_switches_may_change_between_calls():
    x, _ = batches()
    layer, plain = make_layer(), make_layer()
    layer.update_statistics = False
    np.testing.assert_array_equal(layer(x, training=True), plain(x, training=True))
    assert layer.batches == 0
    assert (layer.moving_mean != plain.moving_mean).all()
    layer.update_statistics = True
    layer(x, training=True)
    np.testing.assert_array_equal(layer.moving_mean, plain.moving_mean)


@pytest.mark.parametrize("kwargs", [{}, {"update_statistics": False}], ids=str)
def test_nan_policy_raise(kwargs):
    x, _ = batches()
    x[1, 1, 1] = np.nan
    layer = make_layer(nan_policy="raise", use_batch_statistics=False, **kwargs)
    before = layer.state_dict()
    if kwargs:
        layer(x, training=True)  # the statistics of this batch are not used
    else:
        with pytest.raises(FloatingPointError, match="non-finite"):
            layer(x, training=True)
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("name", ["update_statistics", "use_batch_statistics", "trainable_affine"])
def test_bad_arguments(name):
    with pytest.raises(TypeError, match=f"{name} must be .*True or False. Received: 1"):
        BatchNormalization(**{name: 1})
