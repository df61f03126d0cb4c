"""The state of a NumPy layer, from load_state_dict, Keras and PyTorch: what can be loaded can be computed with and be
saved again; everything else is an error that names it, and nothing is loaded by half."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from bnfast import BatchNormalization, ConditionalBatchNormalization

MOST = 2**63 - 1
X = np.array([[1.0, 2.0, 4.0], [3.0, -2.0, 0.0]], np.float32)


def row(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def built(**options) -> BatchNormalization:
    layer = BatchNormalization(**options)
    layer.build(3)
    return layer


def unchanged(layer: BatchNormalization, before: dict) -> bool:
    after = layer.state_dict()
    return before.keys() == after.keys() and all(np.array_equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("batches", [0, 1, 2**53 + 1, MOST - 1, MOST, np.uint64(MOST), np.array(7), np.int8(7)])
def test_any_count_that_is_loaded_is_saved_again(batches):
    layer = built(momentum=None)
    layer.load_state_dict(layer.state_dict() | {"batches": batches})
    assert layer.state_dict()["batches"] == int(batches)
    layer(X, training=True)
    saved = layer.state_dict()
    assert saved["batches"] == min(int(batches) + 1, MOST)
    assert saved["batches"].dtype == np.int64
    assert np.isfinite(saved["moving_mean"]).all()
    copy = built(momentum=None)
    copy.load_state_dict(saved)
    assert unchanged(copy, saved)
    layer.correction = 1
    assert BatchNormalization.from_torch(layer.to_torch()).batches == saved["batches"]


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (10**30, ValueError, "batches must be less than 2**63. Received: 1000000000000000000000000000000"),
        (2**63, ValueError, "batches must be less than 2**63. Received: 9223372036854775808"),
        (np.uint64(2**64 - 1), ValueError, "batches must be less than 2**63. Received: 18446744073709551615"),
        (-1, ValueError, "batches must be at least 0. Received: -1"),
        (np.array([3]), TypeError, "batches must be an integer. Received: array([3]) (ndarray)"),
        (np.array(3.5), TypeError, "batches must be an integer. Received: array(3.5) (ndarray)"),
        (np.array(None), TypeError, "batches must be an integer. Received: array(None, dtype=object) (ndarray)"),
        ("3", TypeError, "batches must be an integer. Received: '3' (str)"),
    ],
)
def test_a_count_out_of_range_is_named_from_every_source(batches, error, message):
    layer = built(momentum=None)
    layer(X, training=True)
    before = layer.state_dict()
    config = {"axis": -1, "momentum": None, "epsilon": 1e-3, "center": True, "scale": True}
    vectors = [before[name] for name in ("gamma", "beta", "moving_mean", "moving_variance")]
    tensors = dict(zip(("weight", "bias", "running_mean", "running_var"), vectors, strict=True))
    for load in (
        lambda: layer.load_state_dict({name: value + 1 for name, value in before.items()} | {"batches": batches}),
        lambda: BatchNormalization.from_keras({"config": config, "weights": [*vectors, batches]}),
        lambda: BatchNormalization.from_torch(
            {"state_dict": tensors | {"num_batches_tracked": batches}, "eps": 1e-5, "momentum": None}
        ),
    ):
        with pytest.raises(error) as raised:
            load()
        assert str(raised.value) == message
    assert unchanged(layer, before)


def test_a_count_that_was_assigned_is_checked_before_anything_changes():
    layer = built(momentum=None)
    layer.batches = 10**30
    moving = layer.moving_mean.copy()
    for use in (layer.state_dict, lambda: layer(X, training=True), layer.to_torch, layer.to_keras):
        with pytest.raises(ValueError, match="batches must be less than"):
            use()
    assert (layer.moving_mean == moving).all()


def test_counts_of_torch_modules_and_keras_layers(need):
    torch = need("torch")
    module = torch.nn.BatchNorm1d(3, momentum=None)
    module.num_batches_tracked.fill_(MOST)
    layer = BatchNormalization.from_torch(module)
    assert layer.batches == MOST
    layer(X, training=True)
    target = torch.nn.BatchNorm1d(3, momentum=None)
    layer.to_torch(target)
    assert int(target.num_batches_tracked) == MOST
    module.num_batches_tracked = torch.tensor(2.5)
    with pytest.raises(TypeError, match="batches must be an integer"):
        BatchNormalization.from_torch(module)
    target.num_batches_tracked = None
    target.running_mean.fill_(5)
    with pytest.raises(ValueError, match="target must have num_batches_tracked"):
        layer.to_torch(target)
    assert (target.running_mean == 5).all(), "nothing is written by half"


@pytest.mark.parametrize("name", ["moving_variance", "moving_stddev", "renorm_stddev"])
def test_what_is_never_negative_is_not_loaded_if_it_is(name):
    layer = built(renorm=True)
    before = layer.state_dict()
    with pytest.raises(ValueError, match=rf"{name} must be at least 0\. Received: -1\.0"):
        layer.load_state_dict({key: value + 1 for key, value in before.items()} | {name: row(4, -1, 4)})
    assert unchanged(layer, before)
    layer.load_state_dict(before | {name: row(0.0, np.nan, np.inf)})  # what "propagate" stores
    copy = built(renorm=True)
    copy.load_state_dict(layer.state_dict())
    np.testing.assert_array_equal(getattr(copy, name), row(0.0, np.nan, np.inf))


def test_a_state_may_hold_the_layer_s_own_arrays():
    layer = built()
    layer.gamma[:] = 5
    layer.load_state_dict(layer.state_dict() | {"gamma": layer.beta, "beta": layer.gamma})
    np.testing.assert_array_equal(layer.gamma, row(0, 0, 0))
    np.testing.assert_array_equal(layer.beta, row(5, 5, 5))


def test_a_read_only_array_is_named_before_anything_is_loaded():
    layer = built()
    layer.moving_variance.flags.writeable = False
    before = layer.state_dict()
    with pytest.raises(ValueError, match="the layer's moving_variance must be writeable"):
        layer.load_state_dict({name: value + 7 for name, value in before.items()})
    assert unchanged(layer, before)


@pytest.mark.parametrize("name", ["gamma", "moving_variance"])
def test_an_unbuilt_layer_stays_unbuilt_where_memory_ends(monkeypatch, name):
    layer, state = BatchNormalization(), built().state_dict()
    make = np.array

    def array(value, *args):
        if value is state[name]:
            raise MemoryError
        return make(value, *args)

    monkeypatch.setattr("bnfast.layers.state.np.array", array)
    with pytest.raises(MemoryError):
        layer.load_state_dict(state)
    assert not layer.built
    assert layer.gamma is layer.moving_mean is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchNormalization(epsilon=10**400), "epsilon must be finite and at least 0. Received: 1000"),
        (lambda: BatchNormalization(negative_slope=10**400), "negative_slope must be finite and at least 0"),
        (lambda: BatchNormalization(momentum=10**400), "momentum must be in [0, 1]"),
        (lambda: BatchNormalization(renorm_clipping={"rmax": 10**400}), "renorm_clipping['rmax'] must be finite"),
        (lambda: BatchNormalization(virtual_batch_size=2**63), "virtual_batch_size must be less than 2**63"),
        (lambda: ConditionalBatchNormalization(2**63), "num_classes must be less than 2**63"),
        (lambda: BatchNormalization().build(10**30), "channels must be as many as an array can have"),
        (lambda: BatchNormalization().build(2**62), "channels must be as many as an array can have"),
        (lambda: ConditionalBatchNormalization(2**62).build(2), "channels must be as many as an array can have"),
    ],
)
def test_options_above_every_range_are_named(make, message):
    with pytest.raises(ValueError) as raised:
        make()
    assert str(raised.value).startswith(message)


@pytest.mark.skipif(np.finfo(np.longdouble).max <= np.finfo(np.float64).max, reason="longdouble is float64 here")
def test_a_longdouble_above_float64_is_not_infinity():
    with pytest.raises(ValueError, match="epsilon must be finite"):
        BatchNormalization(epsilon=np.longdouble("1e4000"))


def test_a_config_is_plain_and_makes_the_same_layer():
    options = {
        "axis": np.int64(1),
        "momentum": np.float32(0.5),
        "epsilon": np.float64(1e-5),
        "renorm": np.True_,
        "renorm_clipping": {"rmax": np.float32(3), "dmax": None, "rmin": np.int8(1)},
        "trainable": np.False_,
        "dtype": np.dtype("float64"),
    }
    config = BatchNormalization(**options).get_config()
    again = json.loads(json.dumps(config))
    assert BatchNormalization(**again).get_config() == config
    assert config["renorm_clipping"] == {"rmax": 3.0, "dmax": None, "rmin": 1.0}


CONFIG = {"axis": -1, "momentum": 0.9, "epsilon": 1e-3, "center": True, "scale": True}
WEIGHTS = [row(1, 1, 1), row(0, 0, 0), row(0, 0, 0), row(1, 1, 1)]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"epsilon": "abc"}, TypeError, "epsilon must be a real number. Received: 'abc' (str)"),
        ({"epsilon": None}, TypeError, "epsilon must be a real number. Received: None (NoneType)"),
        ({"epsilon": 10**400}, ValueError, "epsilon must be finite and at least 0. Received: inf"),
        ({"momentum": "0.9"}, TypeError, "momentum must be a real number. Received: '0.9' (str)"),
        ({"momentum": math.nan}, ValueError, "momentum must be in [0, 1]. Received: nan"),
        ({"axis": 2.7}, TypeError, "axis must be an integer. Received: 2.7 (float)"),
        ({"axis": "1"}, TypeError, "axis must be an integer. Received: '1' (str)"),
        ({"axis": None}, TypeError, "axis must be an integer. Received: None (NoneType)"),
        ({"axis": []}, ValueError, "axis must name at least one axis. Received: []"),
        ({"trainable": "no"}, TypeError, "trainable must be True or False. Received: 'no' (str)"),
        ({"virtual_batch_size": 10**30}, ValueError, "virtual_batch_size must be less than 2**63"),
    ],
)
def test_a_config_of_keras_is_checked(changes, error, message):
    with pytest.raises(error) as raised:
        BatchNormalization.from_keras({"config": CONFIG | changes, "weights": WEIGHTS})
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("clipping", [5, {"rmax": "x"}, {"rmax": math.inf}, {"most": 1}])
def test_renorm_bounds_of_keras_are_checked(clipping):
    config = CONFIG | {"renorm": True, "renorm_clipping": clipping}
    with pytest.raises((TypeError, ValueError), match="renorm_clipping"):
        BatchNormalization.from_keras({"config": config, "weights": [*WEIGHTS, *[row(1, 1, 1)] * 3]})


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ({"config": 5, "weights": WEIGHTS}, TypeError, "source['config'] must be a mapping. Received: int"),
        ({"config": CONFIG, "weights": 5}, TypeError, "source['weights'] must be a list of arrays. Received: int"),
        ({"config": CONFIG, "weights": [*WEIGHTS[:2], None, WEIGHTS[3]]}, ValueError, "source must have moving_mean"),
        (
            {"config": CONFIG, "weights": [*WEIGHTS[:3], row(-1, 1, 1)]},
            ValueError,
            "moving_variance must be at least 0",
        ),
    ],
)
def test_a_source_that_is_not_keras_s_is_named(source, error, message):
    with pytest.raises(error) as raised:
        BatchNormalization.from_keras(source)
    assert str(raised.value).startswith(message)


def test_a_source_that_is_not_torch_s_is_named():
    with pytest.raises(TypeError, match=r"source\['state_dict'\] must be a mapping\. Received: int"):
        BatchNormalization.from_torch({"state_dict": 5, "eps": 1e-5, "momentum": 0.1})


def test_variables_and_tensors_of_rank_0_are_numbers(need):
    tf = need("tensorflow")
    config = CONFIG | {"momentum": tf.Variable(0.5), "epsilon": tf.constant(0.25)}
    config |= {"renorm": True, "renorm_clipping": {"rmax": tf.Variable(3.0)}, "renorm_momentum": np.float32(0.5)}
    layer = BatchNormalization.from_keras({"config": config, "weights": [*WEIGHTS, *[row(1, 1, 1)] * 3]})
    assert (layer.momentum, layer.epsilon, layer.renorm_clipping) == (0.5, 0.25, {"rmax": 3.0})


def test_numbers_above_float64_in_a_keras_layer(need):
    need("tensorflow")
    import bnfast.keras

    with pytest.raises(ValueError, match="epsilon must be finite"):
        bnfast.keras.BatchNormalization(epsilon=10**400)
    with pytest.raises(ValueError, match=r"virtual_batch_size must be less than 2\*\*31"):
        bnfast.keras.BatchNormalization(virtual_batch_size=2**31)


@pytest.mark.parametrize("clipping", [5, "abc", math.nan])
def test_a_keras_config_that_is_accepted_can_be_written_again(need, clipping):
    """Keras reads the bounds of a layer without renorm nowhere but in get_config, which failed."""
    need("tensorflow")
    import bnfast.keras

    config = bnfast.keras.BatchNormalization().get_config()
    with pytest.raises(TypeError, match="renorm_clipping must be a dict"):
        bnfast.keras.BatchNormalization.from_config(config | {"renorm_clipping": clipping})
    for fine in (None, {}, {"rmax": 2.0}):
        layer = bnfast.keras.BatchNormalization.from_config(config | {"renorm_clipping": fine})
        bnfast.keras.BatchNormalization.from_config(layer.get_config())
