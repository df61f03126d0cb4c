"""Conversion between the NumPy layer and Keras's layers: training continues the same on both sides."""

import numpy as np
import pytest
import sample_data
from bnfast import BatchNormalization
from conversion import batches, close, trained


@pytest.fixture
def keras(need):
    return need("keras")


def keras_layer(keras, cls=None, **options):
    layer = (cls or keras.layers.BatchNormalization)(**options)
    layer.build((None, 4))
    rng = np.random.default_rng(6)
    weights = [rng.uniform(0.5, 2, w.shape).astype(w.dtype) for w in layer.get_weights()]
    layer.set_weights(weights)
    return layer


def continue_with_keras(layer, other, keras):
    for x in batches(seed=4):
        close(layer(x, training=True), keras.ops.convert_to_numpy(other(x, training=True)))
        close(layer.moving_mean, other.moving_mean)
        close(layer.moving_variance, other.moving_variance)
    x = batches(1, seed=5)[0]
    close(layer(x), keras.ops.convert_to_numpy(other(x, training=False)))


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "epsilon": 1e-5}, {"center": False}, {"scale": False}])
def test_training_continues_after_from_keras(keras, options):
    source = keras_layer(keras, **options)
    layer = BatchNormalization.from_keras(source)
    assert layer.correction == 0
    continue_with_keras(layer, source, keras)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "epsilon": 1e-5}, {"center": False}, {"scale": False}])
def test_training_continues_after_to_keras(keras, options):
    layer = trained(**options)
    target = keras_layer(keras, center=layer.center, scale=layer.scale)
    assert layer.to_keras(target) is target
    assert target.momentum == layer.momentum
    assert target.epsilon == layer.epsilon
    continue_with_keras(layer, target, keras)


def test_keras_round_trips(keras):
    source = keras_layer(keras, momentum=0.7, epsilon=1e-4)
    plain = BatchNormalization.from_keras(source).to_keras()
    assert plain["config"] == {"axis": -1, "momentum": 0.7, "epsilon": 1e-4, "center": True, "scale": True}
    for ours, theirs in zip(plain["weights"], source.get_weights(), strict=True):
        assert np.array_equal(ours, theirs)
    fresh = keras.layers.BatchNormalization(**plain["config"])
    fresh.build((None, 4))
    fresh.set_weights(plain["weights"])
    again = BatchNormalization.from_keras({"config": fresh.get_config(), "weights": fresh.get_weights()})
    continue_with_keras(again, fresh, keras)


def test_from_tf_keras_knows_the_fused_kernel(need):
    """Its fused layers (rank 4) average sample variances, the others population variances."""
    tf_keras = need("tf_keras")
    for shape, correction in (((2, 3, 3, 4), 1), ((6, 4), 0)):
        source = tf_keras.layers.BatchNormalization(momentum=0.5)
        source.build(shape)
        layer = BatchNormalization.from_keras(source)
        assert layer.correction == correction
        assert layer.axis in (-1, len(shape) - 1)
        x = sample_data.batch(shape, -1, np.float32, np.random.default_rng(7))
        source(x, training=True)
        layer(x, training=True)
        close(layer.moving_variance, source.moving_variance)


def test_keras_halves_become_float32(keras):
    source = keras_layer(keras, dtype="float16")
    layer = BatchNormalization.from_keras(source)
    assert layer.gamma.dtype == np.float32
    with pytest.raises(TypeError, match=r"target's gamma must have dtype float32.*Received: float16"):
        layer.to_keras(source)


def test_keras_errors(keras):
    unbuilt = keras.layers.BatchNormalization()
    for call in (BatchNormalization.from_keras, trained().to_keras):
        with pytest.raises(ValueError, match=r"(source|target) must be built"):
            call(unbuilt)
    with pytest.raises(TypeError, match=r"source must be a Keras BatchNormalization or a mapping. Received: Dense"):
        BatchNormalization.from_keras(keras.layers.Dense(3))
    with pytest.raises(ValueError, match=r"activation 'relu', like this layer"):
        trained(activation="relu").to_keras(keras_layer(keras))
    with pytest.raises(ValueError, match=r"target must have a gamma, like this layer"):
        trained().to_keras(keras_layer(keras, scale=False))
    with pytest.warns(UserWarning, match=r"this target averages population variances, but this layer has correction=1"):
        trained(correction=1).to_keras(keras_layer(keras))
    before = keras_layer(keras).get_weights()
    for kwargs, error, text in (
        ({"nan_policy": "skip_update"}, ValueError, r"nan_policy must be 'propagate' for a target.*: 'skip_update'"),
        ({"nan_policy": "raise"}, ValueError, r'nan_policy must be "propagate" or "skip_update" for Keras'),
        ({"momentum": None}, ValueError, r"target must have momentum=None, like this layer. Received: momentum=0.99"),
    ):
        target = keras_layer(keras)
        with pytest.raises(error, match=text):
            trained(**kwargs).to_keras(target)
        assert all(np.array_equal(*pair) for pair in zip(target.get_weights(), before, strict=True))
    ghosts = BatchNormalization(virtual_batch_size=2)
    ghosts.build(4)
    with pytest.raises(ValueError, match=r"virtual_batch_size must be None for a target.*Received: 2"):
        ghosts.to_keras(keras_layer(keras))
    if "renorm" in keras.layers.BatchNormalization().get_config():  # Keras 3.14 and later
        with pytest.raises(ValueError, match=r"target must have renorm=False, like this layer. Received: renorm=True"):
            trained().to_keras(keras_layer(keras, renorm=True))
    for kwargs, text in (
        ({"renorm": True}, "target must have renorm=True, like this layer. Received: renorm=False"),
        ({"update_statistics": False}, "update_statistics must be True for a target.*Received: False"),
        (
            {"adjustment": lambda shape: (1, 0)},
            "adjustment must be None for Keras, whose adjustment takes and returns tensors",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            trained(**kwargs).to_keras(keras_layer(keras))


def test_mappings_without_keras():
    """Plain dicts are enough; Keras is not needed."""
    plain = trained(activation="relu", scale=False, momentum=0.6).to_keras()
    assert plain["config"]["activation"] == "relu"
    layer = BatchNormalization.from_keras(plain)
    assert layer.activation == "relu"
    assert layer.momentum == 0.6
    assert np.array_equal(layer.beta, plain["weights"][0])
    for change, error, text in (
        ({"weights": plain["weights"][:2]}, ValueError, r"must hold \['beta', .*Received: 2 arrays"),
        ({"config": {"axis": -1}}, ValueError, r"Missing: \['momentum', 'epsilon', 'center', 'scale'\]"),
        ({"config": {**plain["config"], "renorm": True}}, ValueError, r"'renorm_stddev'\]. Received: 3 arrays"),
        ({"config": {**plain["config"], "axis": [1, 2]}}, ValueError, r"moving_mean must have the extents of axes"),
        ({"config": {**plain["config"], "num_classes": 3}}, ValueError, "must have no num_classes to become a"),
        ({"config": {**plain["config"], "activation": "cosh"}}, ValueError, "activation must be one of"),
    ):
        with pytest.raises(error, match=text):
            BatchNormalization.from_keras({**plain, **change})
    with pytest.raises(ValueError, match=r"must have the keys 'config' and 'weights'. Received: "):
        BatchNormalization.from_keras({"gamma": np.ones(3)})
    with pytest.raises(ValueError, match=r"negative_slope must be 0.2"):
        trained(activation="leaky_relu", negative_slope=0.1).to_keras()


OURS = [
    {"momentum": None, "scale": False},
    {"momentum": 0.5, "correction": 1, "nan_policy": "skip_update", "trainable": False},
    {"activation": "relu6", "epsilon": 1e-2, "virtual_batch_size": 7},
    {"virtual_batch_size": 1, "virtual_batch_grouping": "strided", "center": False},
]


@pytest.mark.parametrize("options", OURS, ids=str)
def test_bnfast_keras_and_back(need, keras, options):
    """A mapping and a target both keep the options of our Keras layer."""
    need("tensorflow")
    import bnfast.keras as ours

    layer = trained(**options)
    plain = layer.to_keras()
    fresh = ours.BatchNormalization(**plain["config"])
    fresh.build((None, 4))
    fresh.set_weights(plain["weights"])
    kwargs = {name: options[name] for name in ("momentum", "scale", "center", "activation") if name in options}
    target = keras_layer(keras, ours.BatchNormalization, **kwargs)
    assert layer.to_keras(target) is target
    target.trainable = layer.trainable
    mapping = {"config": fresh.get_config(), "weights": fresh.get_weights()}
    for source in (plain, fresh, target, mapping):
        again = BatchNormalization.from_keras(source)
        assert again.get_config() == layer.get_config() | {"virtual_batch_grouping": again.virtual_batch_grouping}
        if layer.virtual_batch_size is not None:
            assert again.virtual_batch_grouping == layer.virtual_batch_grouping
        assert again.batches == (5 if layer.momentum is None else 0)
        for name, array in layer.state_dict().items():
            assert np.array_equal(again.state_dict()[name], array)
    continue_with_keras(layer, target, keras)
    if layer.momentum is None:
        assert int(target.batches) == layer.batches
        with pytest.raises(ValueError, match=r"target must have a momentum, like this layer. Received: momentum=None"):
            trained(scale=False).to_keras(target)


SWITCHES = {"update_statistics": False, "use_batch_statistics": True, "trainable_affine": False}
RENORM = {"renorm": True, "renorm_clipping": {"rmin": 0.75, "rmax": 1.5, "dmax": 0.5}, "renorm_momentum": 0.5}


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        *[(make, RENORM) for make in ("bnfast", "keras", "tf_keras")],
        *[("bnfast", kwargs) for kwargs in (SWITCHES, {**RENORM, "momentum": None})],
    ],
    ids=str,
)
def test_renorm_and_switches_round_trip(need, keras, kwargs, make):
    need("tensorflow")
    import bnfast.keras as ours

    cls = {"bnfast": ours, "keras": keras.layers, "tf_keras": need("tf_keras").layers}[make].BatchNormalization
    source, fresh = (keras_layer(keras, cls, **kwargs) for _ in range(2))
    layer = BatchNormalization.from_keras(source)
    assert {name: getattr(layer, name) for name in kwargs} == kwargs
    layer(batches(1)[0], training=True)
    layer.renorm_clipping = {"rmax": 2.0} if layer.renorm else None
    layer.to_keras(fresh)
    assert not layer.renorm or (fresh.renorm_clipping, fresh.renorm_momentum) == ({"rmax": 2.0}, 0.5)
    continue_with_keras(layer, fresh, keras)
    if make == "bnfast":
        for given in (layer.to_keras(), {"config": fresh.get_config(), "weights": fresh.get_weights()}):
            back = BatchNormalization.from_keras(given)
            assert {name: getattr(back, name) for name in kwargs} == {name: getattr(layer, name) for name in kwargs}


def test_renorm_clipping_that_is_no_mapping(need, keras):
    need("tensorflow")
    import bnfast.keras as ours

    source = keras_layer(keras, ours.BatchNormalization, renorm=True)
    layer = BatchNormalization.from_keras(source)
    assert (layer.renorm, layer.renorm_clipping) == (True, None)
    given = {"config": source.get_config() | {"renorm_clipping": None}, "weights": source.get_weights()}
    assert BatchNormalization.from_keras(given).get_config() == layer.get_config()
    continue_with_keras(layer, source, keras)
    given["config"]["renorm_clipping"] = [1.0, 2.0]
    with pytest.raises(TypeError, match=r"^renorm_clipping must be .* Received: \[1.0, 2.0\]$"):
        BatchNormalization.from_keras(given)


def test_labels_round_trip(need, keras):
    need("tensorflow")
    import bnfast
    import bnfast.keras as ours

    source, fresh = (ours.ConditionalBatchNormalization(3) for _ in range(2))
    for each in (source, fresh):
        each.build([(8, 4), (8,)])
    rng = np.random.default_rng(6)
    source.set_weights([rng.uniform(0.5, 2, w.shape) for w in source.weights])
    layer = bnfast.ConditionalBatchNormalization.from_keras(source)
    x, labels = batches(1)[0], rng.integers(0, 3, len(batches(1)[0]))
    close(layer(x, labels, training=True), np.asarray(source([x, labels], training=True)))
    layer.to_keras(fresh)
    for actual, wanted in zip(fresh.get_weights(), source.get_weights(), strict=True):
        close(actual, wanted)
    assert bnfast.ConditionalBatchNormalization.from_keras(layer.to_keras()).num_classes == 3
    with pytest.raises(ValueError, match=r"source must have no num_classes to become a BatchNormalization.*: 3"):
        BatchNormalization.from_keras(source)
    with pytest.raises(ValueError, match=r"target must have num_classes=3, like this layer. Received: num_classes=N"):
        layer.to_keras(keras_layer(keras, ours.BatchNormalization))


def test_an_adjustment_is_not_converted(need, keras):
    need("tensorflow")
    import bnfast.keras as ours

    source = keras_layer(keras, ours.BatchNormalization, adjustment=lambda shape: None)
    with pytest.raises(ValueError, match=r"source must have adjustment=None: it takes tensors. Received: <function"):
        BatchNormalization.from_keras(source)
    with pytest.raises(ValueError, match=r"target must have adjustment=None, like this layer. Received: adj"):
        trained().to_keras(source)


def test_the_fused_flag_of_our_keras_layer_is_ignored(need, keras):
    need("tensorflow")
    import bnfast.keras as ours

    source = ours.BatchNormalization(fused=True)
    source.build((None, 4, 4, 3))
    for each in (source, {"config": source.get_config(), "weights": source.get_weights()}):
        assert BatchNormalization.from_keras(each).correction == 0


@pytest.mark.parametrize(("shape", "axis"), [((6, 3, 4), [1, 2]), ((6, 2, 3, 4), [-3, 3])], ids=str)
@pytest.mark.parametrize("package", ["bnfast.keras", "tf_keras"])
def test_several_axes_and_keras(need, keras, package, shape, axis):
    need("tensorflow")
    import bnfast.keras as ours

    make = ours.BatchNormalization if package == "bnfast.keras" else need("tf_keras").layers.BatchNormalization
    x = np.random.default_rng(8).standard_normal(shape).astype(np.float32)
    source = make(axis=axis, momentum=0.5)
    source(x, training=True)
    for each in (source, {"config": source.get_config(), "weights": source.get_weights()}):
        layer = BatchNormalization.from_keras(each)
        assert layer.channels == (shape[axis[0]], shape[axis[1]])
        close(layer(x), source(x, training=False))
    close(layer(x, training=True), source(x, training=True))
    close(layer.moving_variance.ravel(), np.asarray(source.moving_variance).ravel())
    with pytest.raises(ValueError, match="target must be given for several axes"):
        layer.to_keras()
    target = make(axis=axis)
    target.build(shape)
    close(layer.to_keras(target)(x, training=False), layer(x))
    assert target.momentum == 0.5
    other = make(axis=axis)
    other.build([extent + 1 for extent in shape])
    with pytest.raises(ValueError, match=r"target's gamma must have shape \(\d, 4\). Received: \(\d, 5\)"):
        layer.to_keras(other)


@pytest.mark.parametrize("axis", [-1, 1, [1, 2]], ids=str)
def test_ghosts_of_tf_keras(need, axis):
    """A built tf_keras layer counts its axes after a ghost axis, which from_keras undoes."""
    x = np.random.default_rng(9).standard_normal((12, 3, 4)).astype(np.float32)
    source = need("tf_keras").layers.BatchNormalization(axis=axis, virtual_batch_size=4)
    source(x, training=True)
    for each in (source, {"config": source.get_config(), "weights": source.get_weights()}):
        close(BatchNormalization.from_keras(each)(x), source(x))
    close(BatchNormalization.from_keras(source)(x, training=True), source(x, training=True))


def test_a_function_that_only_has_the_name_of_an_activation_is_refused(need):
    """keras.ops.gelu is the tanh form, keras.activations.gelu the exact one; a script's elu may be anything."""

    keras = need("keras")
    from bnfast.keras import BatchNormalization as Layer

    def elu(z):
        return keras.activations.elu(z, alpha=0.3)

    for activation in (keras.ops.gelu, elu):
        source = Layer(activation=activation)
        source.build((None, 3))
        with pytest.raises(ValueError, match="activation must be a function of keras"):
            BatchNormalization.from_keras(source)
    source = Layer(activation=keras.activations.gelu)
    source.build((None, 3))
    assert BatchNormalization.from_keras(source).activation == "gelu"


def test_gelu_tanh_has_no_name_in_keras():
    layer = BatchNormalization(activation="gelu_tanh")
    layer(np.zeros((4, 3)), training=True)
    with pytest.raises(ValueError, match="Received: 'gelu_tanh'"):
        layer.to_keras()


def test_activations_that_are_layers(need):
    keras = need("keras")
    from bnfast.keras import BatchNormalization as Layer

    L = keras.layers
    x = np.random.default_rng(3).normal(size=(12, 3)).astype(np.float32)
    for activation in (
        L.Activation("silu"),
        L.LeakyReLU(0.1),
        L.ReLU(6),
        L.ReLU(negative_slope=0.3),
        L.ELU(),
        L.ReLU(),
    ):
        source = Layer(activation=activation)
        source(x, training=True)
        # a float32 rounding apart: Keras's layer normalizes with TensorFlow's ops
        for each in (source, {"config": source.get_config(), "weights": source.get_weights()}):
            np.testing.assert_allclose(BatchNormalization.from_keras(each)(x), np.asarray(source(x)), 1e-5, 1e-6)
        BatchNormalization.from_keras(source).to_keras(source)
    for activation in (L.ReLU(max_value=3), L.ELU(0.5), L.Softmax(), type("Mine", (L.ReLU,), {})()):
        source = Layer(activation=activation)
        source.build((None, 3))
        with pytest.raises(ValueError, match="activation must be one that the NumPy layer has"):
            BatchNormalization.from_keras(source)
