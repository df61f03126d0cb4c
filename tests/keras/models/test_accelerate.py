"""accelerate: fused activations and Adds, cases that are not fused, and training afterwards."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
from bnfast.keras import BatchNormalization, BatchNormalizationAdd, patch, report
from keras import layers as L
from keras_models import KERAS, data, quiet, randomize, residual_net, same_predictions, states


def sequential(*middle: Any) -> Any:
    return randomize(keras.Sequential([keras.Input((6, 6, 3)), L.Conv2D(4, 3), *middle, L.Flatten(), L.Dense(2)]))


@pytest.mark.parametrize(
    ("activation", "state"),
    [
        (lambda: L.ReLU(), "bnfast + relu"),
        (lambda: L.ReLU(6.0), "bnfast + relu6"),
        (lambda: L.ReLU(negative_slope=0.1), "bnfast + leaky_relu"),
        (lambda: L.LeakyReLU(0.3), "bnfast + leaky_relu"),
        (lambda: L.Activation("relu"), "bnfast + relu"),
        (lambda: L.Activation("relu6"), "bnfast + relu6"),
        (lambda: L.Activation("leaky_relu"), "bnfast + leaky_relu"),
        (lambda: L.Activation("swish"), "bnfast"),
        (lambda: L.ReLU(max_value=3.0), "bnfast"),
        (lambda: L.ReLU(dtype="float64"), "bnfast"),
        (lambda: L.ReLU(activity_regularizer="l2"), "bnfast"),
        (lambda: L.PReLU(), "bnfast"),
        (lambda: L.Dropout(0.5), "bnfast"),
    ],
)
@pytest.mark.parametrize("functional", [False, True], ids=["sequential", "functional"])
def test_which_activations_are_fused(activation: Any, state: str, functional: bool) -> None:
    layer = activation()
    model = sequential(KERAS(name="bn"), layer)
    if functional:
        model = keras.Model(model.inputs[0], model.outputs[0])
    fast = quiet(model)
    fused = state != "bnfast"
    assert states(fast) == {layer.name if fused else "bn": state}
    assert report(fast).removed == ({"bn": layer.name} if fused else {})
    assert [n.name for n in fast.layers] == [n.name for n in model.layers if not (fused and n.name == "bn")]
    assert isinstance(fast, keras.Sequential) is not functional
    same_predictions(model, fast)


@pytest.mark.parametrize("add", [None, keras.ops.add, lambda a, b: b + a], ids=["layer", "ops", "operator"])
def test_residual_blocks(add: Any) -> None:
    model = residual_net(add=add)
    fast = quiet(model)
    found = states(fast)
    assert found["relu0"] == "bnfast + relu"
    assert found["out1"] == found["out2"] == "bnfast + add + relu"
    assert {found.pop(name, None) for name in ("bn1", "bn1s")} == {"bnfast", None}, "one of them is fused"
    assert len(found) == 3
    assert isinstance(fast.get_layer("out2"), BatchNormalizationAdd)
    assert report(fast).removed["bn2"] == "out2"
    same_predictions(model, fast)


def test_keras_ops_as_activation() -> None:
    inputs = keras.Input((5,))
    x = inputs
    for function in (keras.ops.relu, keras.ops.relu6, keras.ops.leaky_relu, keras.activations.relu):
        x = function(KERAS()(x))
    model = randomize(keras.Model(inputs, x))
    fast = quiet(model)
    assert [row.state.split()[-1] for row in report(fast).rows] == ["relu", "relu6", "leaky_relu", "relu"]
    same_predictions(model, fast)


def test_an_add_without_an_activation_is_fused() -> None:
    inputs = keras.Input((4,))
    model = randomize(keras.Model(inputs, L.Add(name="sum")([inputs, KERAS(name="bn")(inputs)])))
    fast = quiet(model)
    assert states(fast) == {"sum": "bnfast + add"}
    assert report(fast).removed == {"bn": "sum"}
    assert fast.output_names == ["sum"]
    same_predictions(model, fast)


def not_fused(how: str) -> Any:
    """A model in which a ReLU or an Add follows a batch norm but must not be fused with it."""
    inputs, norm, relu = keras.Input((4,)), KERAS(name="bn"), L.ReLU(name="relu")
    x = norm(inputs)
    if how == "used twice":
        outputs = L.Concatenate()([relu(x), x])
    elif how == "an output":
        outputs = [relu(x), x]
    elif how == "shared batch norm":
        outputs = [relu(x), L.Softmax()(norm(relu(x)))]
    elif how == "shared activation":
        outputs = relu(L.Dense(4)(relu(x)))
    elif how == "called with training":
        outputs = relu(norm(inputs, training=False)) if x is not None else None
    elif how == "Add of three":
        outputs = L.ReLU(name="after")(L.Add()([x, inputs, inputs]))
    elif how == "Add that broadcasts":
        outputs = L.ReLU(name="after")(L.Add()([x, L.Dense(1)(inputs)]))
    elif how == "Add to itself":
        outputs = L.ReLU(name="after")(L.Add()([x, x]))
    elif how == "activity regularizer":
        outputs = relu(KERAS(name="regularized", activity_regularizer="l2")(inputs))
    return randomize(keras.Model(inputs, outputs))


@pytest.mark.parametrize(
    "how",
    [
        "used twice",
        "an output",
        "shared batch norm",
        "shared activation",
        "called with training",
        "Add of three",
        "Add that broadcasts",
        "Add to itself",
        "activity regularizer",
    ],
)
def test_cases_that_are_not_fused(how: str) -> None:
    model = not_fused(how)
    fast = quiet(model)
    (row,) = report(fast).rows
    assert (row.state, row.removed) == ("bnfast", ())
    assert row.reason
    assert [layer.name for layer in fast.layers] == [layer.name for layer in model.layers]
    same_predictions(model, fast)


def test_shared_layers_stay_shared() -> None:
    """A batch norm and a ReLU, called twice as a pair, become one fused layer that is called twice."""
    first, second = keras.Input((4,)), keras.Input((4,))
    norm, relu = KERAS(), L.ReLU(name="relu")
    model = randomize(keras.Model([first, second], [relu(norm(first)), relu(norm(second))]))
    fast = quiet(model)
    assert states(fast) == {"relu": "bnfast + relu"}
    assert len(fast.weights) == 4
    same_predictions(model, fast, (3, 4), (3, 4))


def test_nested_models() -> None:
    inner = keras.Sequential([keras.Input((4,)), L.Dense(4), KERAS(), L.ReLU(name="inner_relu")], name="inner")
    inputs = keras.Input((4,))
    middle = keras.Model(inputs, L.ReLU(name="middle_relu")(KERAS()(inner(inputs))), name="middle")
    first, second = keras.Input((4,), name="first"), keras.Input((4,), name="second")
    model = keras.Model({"first": first, "second": second}, {"a": middle(first), "b": middle(inner(second))})
    fast = quiet(randomize(model))
    assert sorted(state for state in states(fast).values()) == ["bnfast + relu"] * 2
    assert fast.get_layer("middle").get_layer("inner") is fast.get_layer("inner")
    assert len(fast.weights) == len(model.weights)
    assert [layer.name for layer in fast.layers] == [layer.name for layer in model.layers]
    rng = np.random.default_rng(1)
    x = {name: rng.normal(size=(3, 4)).astype("float32") for name in ("first", "second")}
    for name, y in model(x).items():
        np.testing.assert_allclose(fast(x)[name], y, rtol=1e-5, atol=1e-5)


def test_the_original_model_is_not_changed() -> None:
    model = residual_net(compiled="adam")
    model.fit(*data(), verbose=0)

    def snapshot() -> Any:
        nodes = [(len(op._inbound_nodes), len(op._outbound_nodes)) for op in model.operations]
        return model.to_json(), nodes, [v.numpy().tobytes() for v in (*model.variables, *model.optimizer.variables)]

    before = snapshot()
    fast = quiet(model)
    assert snapshot() == before
    fast.fit(*data(), epochs=2, verbose=0)
    assert snapshot() == before
    assert not {id(v) for v in model.variables} & {id(v) for v in fast.variables}


def test_float64_training_equals_the_original() -> None:
    """After 20 steps of SGD(1e-3) all weights agree to 1e-6 in relative norm.

    The convolutions have no bias: its true gradient would be 0, so it would hold only rounding errors.
    """
    model = residual_net("float64", keras.optimizers.SGD(1e-3))
    fast = quiet(model)
    for step in range(20):
        x, label = data("float64", step)
        for trained in (model, fast):
            trained.train_on_batch(x, label)
    wanted = {weight.path: weight.numpy() for weight in model.weights}
    removed = report(fast).removed
    found = {weight.path: weight.numpy() for weight in fast.weights}
    for path, value in wanted.items():
        layer, name = path.split("/")
        actual = found[f"{removed.get(layer, layer)}/{name}"]
        assert np.linalg.norm(actual - value) <= 1e-6 * np.linalg.norm(value), path


def test_bnfast_layers_are_fused() -> None:
    with patch():
        model = sequential(keras.layers.BatchNormalization(), L.ReLU(name="relu"))
    model.add(BatchNormalization(name="ours", momentum=0.5, bridge="numpy_function"))
    model.add(L.ReLU(name="last"))
    fast = quiet(quiet(model))
    assert states(fast) == {"relu": "bnfast + relu", "last": "bnfast + relu"}
    assert fast.get_layer("last").bridge == "numpy_function"
    assert report(fast).removed["ours"] == "last"
    same_predictions(model, fast)


def test_without_the_op_small_inputs_stay_on_keras(monkeypatch):
    model = keras.Sequential([keras.Input((64, 64, 3)), L.Conv2D(64, 3), L.BatchNormalization(name="large"),
                              L.GlobalAveragePooling2D(), L.BatchNormalization(name="small")])  # fmt: skip
    assert states(quiet(model)) == {"large": "bnfast", "small": "bnfast"}
    monkeypatch.setattr("bnfast.tensorflow.op.status", lambda: (False, "it isn't there"))
    monkeypatch.delenv("BNFAST_BRIDGE", raising=False)
    fast = quiet(model)
    assert states(fast) == {"large": "bnfast", "small": "keras"}
    assert "8 KiB" in report(fast).keras[0].reason
    assert "it isn't there" in report(fast).keras[0].reason
    with pytest.raises(ValueError, match="small stays on Keras's layer: 8 KiB"):
        quiet(model, strict=True)
    assert states(quiet(model, bridge="numpy_function")) == {"large": "bnfast", "small": "bnfast"}
