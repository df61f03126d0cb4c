"""State between the NumPy layer, Keras and PyTorch; what counts is that training goes on the same on both sides."""

import agreement as ag
import numpy as np
import pytest
from bnfast import BatchNormalization


def batches(n=5, rows=7, channels=4, dtype=np.float32, seed=1):
    rng = np.random.default_rng(seed)
    return [ag.batch((rows, channels), 1, dtype, rng, offset=2) for _ in range(n)]


def trained(**options):
    layer = BatchNormalization(**options)
    for x in batches():
        layer(x, training=True)
    rng = np.random.default_rng(2)
    gamma, beta, *_ = ag.vectors(4, rng)
    if layer.scale:
        layer.gamma[:] = gamma
    if layer.center:
        layer.beta[:] = beta
    return layer


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-6)


@pytest.fixture
def torch(need):
    return need("torch")


def torch_module(torch, cls="BatchNorm1d", **options):
    """A module with odd parameters, whose running statistics have moved."""
    module = getattr(torch.nn, cls)(4, **options)
    with torch.no_grad():
        if module.affine:
            module.weight.copy_(torch.tensor([1.5, -0.5, 2.0, 0.25]))
            module.bias.copy_(torch.tensor([0.5, 0.0, -1.0, 3.0]))
        for x in batches(seed=3):
            module(torch.from_numpy(x))
    return module


def go_on_together(layer, module, torch):
    for x in batches(seed=4):
        close(layer(x, training=True), module.train()(torch.from_numpy(x)).detach())
        close(layer.moving_mean, module.running_mean)
        close(layer.moving_variance, module.running_var)
    x = batches(1, seed=5)[0]
    close(layer(x), module.eval()(torch.from_numpy(x)).detach())


@pytest.mark.parametrize("momentum", [0.1, 0.25, 0.99, 0.0, 1.0])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_training_goes_on_after_from_torch(torch, momentum, eps):
    module = torch_module(torch, momentum=momentum, eps=eps)
    layer = BatchNormalization.from_torch(module)
    assert layer.correction == 1
    assert layer.epsilon == eps
    assert layer.momentum == pytest.approx(1 - momentum, abs=1e-15)
    assert layer.axis == 1
    go_on_together(layer, module, torch)


def test_population_variance_would_drift_apart_from_torch(torch):
    """The reason for correction=1: with 7 rows, running_var grows by up to 7/6."""
    module = torch_module(torch, momentum=0.5)
    layer = BatchNormalization.from_torch(module)
    layer.correction = 0
    for x in batches(seed=4):
        layer(x, training=True)
        module(torch.from_numpy(x))
    ratio = module.running_var.numpy() / layer.moving_variance
    assert (ratio > 1.1).all()


def test_training_goes_on_after_to_torch(torch):
    layer = trained(momentum=0.9, epsilon=1e-4, correction=1)
    module = layer.to_torch(torch.nn.BatchNorm1d(4))
    assert module.eps == 1e-4
    assert module.momentum == 0.1
    go_on_together(layer, module, torch)


def test_torch_round_trips(torch):
    module = torch_module(torch)
    plain = BatchNormalization.from_torch(module).to_torch()
    assert plain["eps"] == 1e-5
    assert plain["momentum"] == 0.1
    assert list(plain["state_dict"]) == ["weight", "bias", "running_mean", "running_var"]
    for name, array in plain["state_dict"].items():
        assert np.array_equal(array, module.state_dict()[name].numpy())
    fresh = torch.nn.BatchNorm1d(4, eps=plain["eps"], momentum=plain["momentum"])
    fresh.load_state_dict({name: torch.from_numpy(a) for name, a in plain["state_dict"].items()})
    again = BatchNormalization.from_torch(plain)
    assert again.momentum == 0.9
    go_on_together(again, fresh, torch)


def test_bare_torch_state_dict_needs_eps_and_momentum(torch):
    state = torch_module(torch).state_dict()
    for settings in ({}, {"eps": 1e-5}, {"momentum": 0.1}):
        with pytest.raises(ValueError, match=r"eps and momentum must be passed with a state dict. Received: eps="):
            BatchNormalization.from_torch(state, **settings)
    layer = BatchNormalization.from_torch(state, eps=1e-5, momentum=0.1, axis=-1)
    assert layer.axis == -1
    assert np.array_equal(layer.gamma, state["weight"].numpy())


def test_cumulative_momentum_is_an_error(torch):
    module = torch_module(torch, momentum=None)
    with pytest.raises(ValueError, match=r"momentum must be a number: pass momentum=. Received: None \(PyTorch"):
        BatchNormalization.from_torch(module)
    assert BatchNormalization.from_torch(module, momentum=0.2).momentum == 0.8


def test_torch_without_affine_or_statistics(torch):
    layer = BatchNormalization.from_torch(torch_module(torch, affine=False))
    assert layer.gamma is None
    assert layer.beta is None
    assert layer.to_torch(torch.nn.BatchNorm1d(4, affine=False)).eps == 1e-5
    with pytest.raises(ValueError, match=r"target must have a gamma|target must have no gamma"):
        layer.to_torch(torch.nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"running_mean and running_var \(track_running_stats=True\)"):
        BatchNormalization.from_torch(torch.nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(TypeError, match=r"source must be a torch BatchNorm module or a mapping. Received: Linear"):
        BatchNormalization.from_torch(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("kind", "wanted"), [("float16", "f4"), ("bfloat16", "f4"), ("float64", "f8")])
def test_torch_dtypes(torch, kind, wanted):
    module = torch_module(torch).to(getattr(torch, kind))
    layer = BatchNormalization.from_torch(module)
    assert layer.gamma.dtype == layer.moving_variance.dtype == np.dtype(wanted)
    assert np.array_equal(layer.moving_mean, module.running_mean.double().numpy())


def test_to_torch_errors_leave_the_target_alone(torch):
    layer, module = trained(correction=1), torch_module(torch)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"activation must be None.*Received: 'relu'"):
        trained(correction=1, activation="relu").to_torch(module)
    with pytest.raises(ValueError, match=r"target's gamma must have shape \(4,\). Received: \(5,\)"):
        layer.to_torch(torch.nn.BatchNorm1d(5))
    with pytest.raises(TypeError, match=r"target's gamma must have dtype float32.*Received: float64"):
        layer.to_torch(torch.nn.BatchNorm1d(4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"no state before it is built"):
        BatchNormalization().to_torch()
    with pytest.warns(UserWarning, match=r"PyTorch averages sample variances, this layer has correction=0"):
        trained().to_torch()
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    assert module.momentum == 0.1


@pytest.fixture
def keras(need):
    return need("keras")


def keras_layer(keras, cls=None, **options):
    layer = (cls or keras.layers.BatchNormalization)(**options)
    layer.build((None, 4))
    rng = np.random.default_rng(6)
    weights = [rng.uniform(0.5, 2, 4).astype(np.float32) for _ in layer.get_weights()]
    layer.set_weights(weights)
    return layer


def go_on_with_keras(layer, other, keras):
    for x in batches(seed=4):
        close(layer(x, training=True), keras.ops.convert_to_numpy(other(x, training=True)))
        close(layer.moving_mean, other.moving_mean)
        close(layer.moving_variance, other.moving_variance)
    x = batches(1, seed=5)[0]
    close(layer(x), keras.ops.convert_to_numpy(other(x, training=False)))


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "epsilon": 1e-5}, {"center": False}, {"scale": False}])
def test_training_goes_on_after_from_keras(keras, options):
    source = keras_layer(keras, **options)
    layer = BatchNormalization.from_keras(source)
    assert layer.correction == 0
    go_on_with_keras(layer, source, keras)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "epsilon": 1e-5}, {"center": False}, {"scale": False}])
def test_training_goes_on_after_to_keras(keras, options):
    layer = trained(**options)
    target = keras_layer(keras, center=layer.center, scale=layer.scale)
    assert layer.to_keras(target) is target
    assert target.momentum == layer.momentum
    assert target.epsilon == layer.epsilon
    go_on_with_keras(layer, target, keras)


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
    go_on_with_keras(again, fresh, keras)


def test_from_tf_keras_knows_the_fused_kernel(need):
    """Its fused layers (rank 4) average sample variances, the others population variances."""
    tf_keras = need("tf_keras")
    for shape, correction in (((2, 3, 3, 4), 1), ((6, 4), 0)):
        source = tf_keras.layers.BatchNormalization(momentum=0.5)
        source.build(shape)
        layer = BatchNormalization.from_keras(source)
        assert layer.correction == correction
        assert layer.axis in (-1, len(shape) - 1)
        x = ag.batch(shape, -1, np.float32, np.random.default_rng(7))
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
    with pytest.warns(UserWarning, match=r"Keras averages population variances, this layer has correction=1"):
        trained(correction=1).to_keras()


def test_mappings_without_keras():
    """Plain dicts do: no Keras is needed."""
    plain = trained(activation="relu", scale=False, momentum=0.6).to_keras()
    assert plain["config"]["activation"] == "relu"
    layer = BatchNormalization.from_keras(plain)
    assert layer.activation == "relu"
    assert layer.momentum == 0.6
    assert np.array_equal(layer.beta, plain["weights"][0])
    for change, error, text in (
        ({"weights": plain["weights"][:2]}, ValueError, r"must hold \['beta', .*Received: 2 arrays"),
        ({"config": {"axis": -1}}, ValueError, r"Missing: \['momentum', 'epsilon', 'center', 'scale'\]"),
        ({"config": {**plain["config"], "renorm": True}}, NotImplementedError, "renorm=False"),
        ({"config": {**plain["config"], "axis": [1, 2]}}, NotImplementedError, "axis must be one axis"),
        ({"config": {**plain["config"], "activation": "tanh"}}, ValueError, "activation must be one of"),
    ):
        with pytest.raises(error, match=text):
            BatchNormalization.from_keras({**plain, **change})
    with pytest.raises(ValueError, match=r"must have the keys 'config' and 'weights'. Received: "):
        BatchNormalization.from_keras({"gamma": np.ones(3)})
    with pytest.raises(ValueError, match=r"negative_slope must be 0.2"):
        trained(activation="leaky_relu", negative_slope=0.1).to_keras()
