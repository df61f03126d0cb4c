"""The NumPy layer: build, call, backward, freezing, state, pickle and deepcopy."""

import copy
import pickle

import bnfast
import numpy as np
import pytest
import sample_data
from bnfast import BatchNormalization
from hostile import Liar


def make_layer(**options):
    """A layer with five channels after one training call, its batch, and a gradient."""
    rng = np.random.default_rng(1)
    x, dy = (sample_data.batch((20, 5), 1, np.float32, rng) for _ in range(2))
    layer = BatchNormalization(**options)
    layer.build(5)
    gamma, beta, *_ = sample_data.vectors(5, rng)
    if layer.scale:
        layer.gamma[:] = gamma
    if layer.center:
        layer.beta[:] = beta
    layer(x, training=True)
    return layer, x, dy


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


def test_build_is_lazy():
    layer = BatchNormalization()
    assert not layer.built
    assert layer.channels is None
    layer(np.zeros((4, 7), np.float32))
    assert layer.built
    assert layer.channels == 7
    for name, value in (("gamma", 1), ("beta", 0), ("moving_mean", 0), ("moving_variance", 1)):
        array = getattr(layer, name)
        assert array.dtype == np.float32
        assert array.shape == (7,)
        assert (array == value).all()


@pytest.mark.parametrize(
    ("dtype", "x", "wanted"),
    [(None, "f4", "f4"), (None, "f8", "f8"), (None, "f2", "f4"), ("float64", "f4", "f8"), (np.float32, "f8", "f4")],
)
def test_dtype_of_the_parameters(dtype, x, wanted):
    layer = BatchNormalization(dtype=dtype)
    layer(np.zeros((4, 3), x))
    assert {a.dtype for a in layer.state_dict().values()} == {np.dtype(wanted)}


def test_build_again_starts_over():
    layer, *_ = make_layer()
    layer.build(5)
    assert (layer.gamma == 1).all()
    assert (layer.moving_mean == 0).all()
    with pytest.raises(ValueError, match=r"channels must be 5, which this layer was built with. Received: 6"):
        layer.build(6)
    with pytest.raises(ValueError, match=r"channels must be at least 0. Received: -1"):
        BatchNormalization().build(-1)
    with pytest.raises(TypeError, match=r"channels must be an integer. Received: 2.0"):
        BatchNormalization().build(2.0)


@pytest.mark.parametrize("activation", sample_data.ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_functional_api(activation, with_residual, masked):
    rng = np.random.default_rng(2)
    layer, *_ = make_layer(activation=activation, momentum=0.8, epsilon=1e-5, negative_slope=0.1, correction=1)
    x, dy, residual = (sample_data.batch((20, 5), 1, np.float32, rng) for _ in range(3))
    residual = residual if with_residual else None
    mask = rng.random(20) < 0.5 if masked else None
    old = layer.state_dict()
    fused = {"activation": activation, "negative_slope": 0.1, "residual": residual}
    y = layer(x, training=True, mask=mask, residual=residual)
    expected = bnfast.batch_norm_train(
        x,
        old["gamma"],
        old["beta"],
        old["moving_mean"],
        old["moving_variance"],
        momentum=0.8,
        epsilon=1e-5,
        mask=mask,
        correction=1,
        **fused,
    )
    assert np.array_equal(y, expected.y)
    assert np.array_equal(layer.moving_mean, old["moving_mean"])
    assert np.array_equal(layer.moving_variance, old["moving_variance"])
    dx = layer.backward(dy)
    grad = bnfast.batch_norm_grad(dy, x, expected.mean, expected.invstd, old["gamma"], old["beta"], mask=mask, **fused)
    assert np.array_equal(dx, grad.dx)
    assert np.array_equal(layer.dgamma, grad.dgamma)
    assert np.array_equal(layer.dbeta, grad.dbeta)
    assert (layer.dresidual is None) == (residual is None)
    inferred = layer(x, residual=residual)
    wanted = bnfast.batch_norm_infer(
        x, layer.moving_mean, layer.moving_variance, layer.gamma, layer.beta, epsilon=1e-5, **fused
    )
    assert np.array_equal(inferred, wanted)


@pytest.mark.parametrize("frozen", [False, True])
def test_backward_after_inference_is_the_frozen_gradient(frozen):
    layer, x, dy = make_layer()
    before = layer.state_dict()
    layer.trainable = not frozen
    y = layer(x, training=frozen)
    invstd = 1 / np.sqrt(layer.moving_variance.astype(np.float64) + 1e-3)
    mean = layer.moving_mean.astype(np.float64)
    expected = bnfast.batch_norm_grad(dy, x, mean, invstd, layer.gamma, layer.beta, training=False)
    layer.moving_mean += 1  # backward uses the statistics of the call, not the current ones
    dx = layer.backward(dy)
    layer.moving_mean[:] = before["moving_mean"]
    assert np.array_equal(dx, expected.dx)
    assert np.array_equal(layer.dgamma, expected.dgamma)
    assert all(np.array_equal(before[k], v) for k, v in layer.state_dict().items())
    layer.trainable = True
    assert not np.array_equal(layer(x, training=True), y)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_without_gamma_or_beta(center, scale):
    layer, _, dy = make_layer(center=center, scale=scale)
    assert (layer.gamma is not None) == scale
    assert (layer.beta is not None) == center
    layer.backward(dy)
    assert (layer.dgamma is not None) == scale
    assert (layer.dbeta is not None) == center
    present = {"gamma": scale, "beta": center, "moving_mean": True, "moving_variance": True}
    assert list(layer.state_dict()) == [name for name, there in present.items() if there]
    other = BatchNormalization(center=center, scale=scale)
    other.load_state_dict(layer.state_dict())
    assert same_state(layer, other)


def test_backward_needs_a_call():
    layer = BatchNormalization()
    for prepare in (lambda: None, lambda: layer.build(3), lambda: layer.load_state_dict(layer.state_dict())):
        prepare()
        with pytest.raises(RuntimeError, match=r"backward needs a call of this layer before it"):
            layer.backward(np.zeros((2, 3), np.float32))


def test_backward_may_be_called_twice():
    layer, _, dy = make_layer()
    first = layer.backward(dy)
    assert np.array_equal(layer.backward(dy), first)


def test_nan_policy_raise_leaves_the_layer_alone():
    layer, x, _ = make_layer(nan_policy="raise")
    before = layer.state_dict()
    x[3, 2] = np.nan
    with pytest.raises(FloatingPointError):
        layer(x, training=True)
    assert all(np.array_equal(before[k], v) for k, v in layer.state_dict().items())


def test_a_failed_first_call_does_not_build():
    layer = BatchNormalization(nan_policy="raise")
    with pytest.raises(FloatingPointError):
        layer(np.full((4, 3), np.nan, np.float32), training=True)
    with pytest.raises(ValueError, match=r"mask must"):
        layer(np.zeros((4, 3), np.float32), training=True, mask=np.ones(3))
    with pytest.raises(TypeError, match=r"training must be True or False. Received: 1"):
        layer(np.zeros((4, 3), np.float32), training=1)
    assert not layer.built
    with pytest.raises(RuntimeError, match=r"no state before it is built"):
        layer.state_dict()
    layer(np.zeros((4, 5), np.float32))
    assert layer.channels == 5


def test_a_failed_call_keeps_the_last_one_for_backward():
    layer, x, dy = make_layer()
    dx = layer.backward(dy)
    with pytest.raises(ValueError, match=r"x must have 5 channels on axis -1.*Received: shape \(20, 4\)"):
        layer(x[:, :4], training=True)
    with pytest.raises(ValueError, match=r"mask must"):
        layer(x, mask=np.ones(3))
    assert np.array_equal(layer.backward(dy), dx)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_stand_alone(copied):
    layer, x, dy = make_layer(axis=1, activation="relu", momentum=0.7)
    layer.backward(dy)
    other = copied(layer)
    assert same_state(layer, other)
    assert repr(other) == repr(layer)
    assert other.dgamma is None
    with pytest.raises(RuntimeError, match=r"backward needs a call"):
        other.backward(dy)
    assert np.array_equal(other(x, training=True), layer(x, training=True))
    assert same_state(layer, other)
    other.gamma += 1
    assert not same_state(layer, other)


def test_pickled_before_build():
    other = pickle.loads(pickle.dumps(BatchNormalization(axis=1, dtype="float64")))
    assert not other.built
    assert other.dtype == np.float64


def test_config_round_trip():
    options = {"axis": 1, "momentum": 0.5, "epsilon": 0.0, "center": False, "scale": False, "activation": "leaky_relu"}
    options |= {"negative_slope": 0.0, "nan_policy": "raise", "correction": 1, "dtype": "float64", "trainable": False}
    options |= {"virtual_batch_size": 4, "virtual_batch_grouping": "strided"}
    options |= {"renorm": False, "renorm_clipping": {"rmax": 3.0}, "renorm_momentum": 0.5, "trainable_affine": False}
    options |= {"update_statistics": False, "use_batch_statistics": True}
    layer = BatchNormalization(**options)
    assert layer.get_config() == options
    assert BatchNormalization(**layer.get_config()).get_config() == options
    assert eval(repr(layer)).get_config() == options


def test_state_is_copied_in_and_out():
    layer, *_ = make_layer()
    state = layer.state_dict()
    state["gamma"][:] = 99
    assert not (layer.gamma == 99).any()
    kept = layer.gamma
    layer.load_state_dict(state)
    assert layer.gamma is kept
    assert (layer.gamma == 99).all()
    state["gamma"][:] = 1
    assert (layer.gamma == 99).all()


def test_unbuilt_layer_takes_shape_and_dtype_from_the_state():
    state = {name: np.arange(3.0) for name in ("gamma", "beta", "moving_mean", "moving_variance")}
    layer = BatchNormalization()
    layer.load_state_dict(state)
    assert layer.channels == 3
    assert layer.gamma.dtype == np.float64
    with pytest.raises(TypeError, match=r"gamma must have dtype float32, like the layer's. Received: float64"):
        BatchNormalization(dtype="float32").load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"beta": None}, ValueError, r"Missing: \['beta'\], unknown: \[\]"),
        ({"running_mean": np.zeros(5)}, ValueError, r"Missing: \[\], unknown: \['running_mean'\]"),
        ({"gamma": np.zeros(4, "f4")}, ValueError, r"gamma must have shape \(5,\).*Received: \(4,\)"),
        ({"moving_variance": np.zeros((5, 1), "f4")}, ValueError, r"moving_variance must have.*Received: \(5, 1\)"),
        ({"moving_mean": np.zeros(5)}, TypeError, r"moving_mean must have dtype float32.*Received: float64"),
        ({"moving_mean": [0.0] * 5}, TypeError, r"moving_mean must be a NumPy array.*Received: list"),
    ],
)
def test_bad_state_changes_nothing(change, error, text):
    layer, *_ = make_layer()
    before = layer.state_dict()
    state = {name: np.full(5, 7, np.float32) for name in before} | change
    state = {name: a for name, a in state.items() if a is not None}
    with pytest.raises(error, match=text):
        layer.load_state_dict(state)
    assert all(np.array_equal(before[k], v) for k, v in layer.state_dict().items())
    with pytest.raises(TypeError, match=r"state must be a mapping of names to arrays. Received: list"):
        layer.load_state_dict([])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"axis": 1.0}, TypeError, "axis must be an integer. Received: 1.0"),
        ({"axis": ()}, ValueError, "axis must name at least one axis. Received: ()"),
        ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\]. Received: 1.5"),
        ({"momentum": "0.9"}, TypeError, "momentum must be a real number. Received: '0.9'"),
        ({"epsilon": -1}, ValueError, "epsilon must be finite and at least 0. Received: -1"),
        ({"center": 1}, TypeError, "center must be True or False. Received: 1"),
        ({"scale": "yes"}, TypeError, "scale must be True or False. Received: 'yes'"),
        ({"activation": "cosh"}, ValueError, "activation must be one of.*Received: 'cosh'"),
        ({"negative_slope": -0.1}, ValueError, "negative_slope must be finite and at least 0. Received: -0.1"),
        ({"nan_policy": "ignore"}, ValueError, "nan_policy must be one of.*Received: 'ignore'"),
        ({"correction": 2}, ValueError, r"correction must be 0 .* or 1 .*Received: 2"),
        ({"dtype": "float16"}, TypeError, "dtype must be float32, float64 or None. Received: 'float16'"),
        ({"dtype": "nonsense"}, TypeError, "dtype must be float32, float64 or None. Received: 'nonsense'"),
        ({"trainable": 0}, TypeError, "trainable must be True or False. Received: 0"),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        BatchNormalization(**options)


def test_learns():
    """Ten steps of gradient descent through the layer move y towards a target."""
    rng = np.random.default_rng(3)
    x = sample_data.batch((64, 5), 1, np.float32, rng)
    target = BatchNormalization()
    target.build(5)
    target.gamma[:], target.beta[:], *_ = sample_data.vectors(5, rng)
    wanted = target(x, training=True)
    layer = BatchNormalization()
    losses = []
    for _ in range(10):
        error = layer(x, training=True) - wanted
        losses.append(float((error**2).mean()))
        layer.backward(error / len(x))
        layer.gamma -= 0.5 * layer.dgamma
        layer.beta -= 0.5 * layer.dbeta
    assert losses[-1] < 1e-4 * losses[0]


def test_cumulative_average():
    """momentum=None with sample variances equals PyTorch's momentum=None, also after saving and loading the state."""
    rng = np.random.default_rng(3)
    batches = [rng.normal(3, 2, (rows, 4)) for rows in (8, 5, 2)]
    layer = BatchNormalization(momentum=None, correction=1, dtype="float64")
    for x in batches[:2]:
        layer(x, training=True)
    layer(np.zeros((0, 4)), training=True)
    layer(batches[0], training=True, mask=np.zeros(8))
    layer(batches[0])
    again = BatchNormalization(**layer.get_config())
    again.load_state_dict(layer.state_dict())
    for each in (layer, again, copy.deepcopy(layer)):
        each(batches[2], training=True)
        assert each.batches == 3
        np.testing.assert_allclose(each.moving_mean, np.mean([x.mean(0) for x in batches], 0), rtol=1e-13)
        np.testing.assert_allclose(each.moving_variance, np.mean([x.var(0, ddof=1) for x in batches], 0), rtol=1e-13)
    layer.build(4)
    assert layer.batches == 0


def test_a_cumulative_average_and_its_count_belong_together():
    layer = BatchNormalization(momentum=None)
    layer(np.ones((2, 3), np.float32), training=True)
    state = layer.state_dict()
    for wrong, error, message in (
        ({k: v for k, v in state.items() if k != "batches"}, ValueError, r"Missing: \['batches'\]"),
        (state | {"batches": np.int64(-1)}, ValueError, "batches must be at least 0. Received: -1"),
        (state | {"batches": 1.5}, TypeError, "batches must be an integer. Received: 1.5"),
    ):
        with pytest.raises(error, match=message):
            layer.load_state_dict(wrong)
    assert layer.batches == 1
    with pytest.raises(ValueError, match=r"unknown: \['batches'\]"):
        BatchNormalization().load_state_dict(state)


@pytest.mark.parametrize("device", [RuntimeError("gone"), ("cuda", 0), None], ids=repr)
def test_a_tensor_that_says_no_device_is_an_error_with_the_name(device):
    with pytest.raises(TypeError, match=r"^x.__dlpack_device__\(\) must return two integers. Received: "):
        BatchNormalization()(Liar(device))
