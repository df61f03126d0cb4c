"""accelerate: which activations and Adds are fused in a traced training step, and that each case computes as Keras."""

from collections.abc import Callable
from typing import Any

import keras_models
import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalization, BatchNormalizationAdd, accelerate, patch, report, to_keras
from keras import layers as L
from keras_models import KERAS, data, fused, quiet, randomize, residual_net, same_predictions, same_steps, states, step

pytestmark = pytest.mark.usefixtures("float64")
IMAGE = (6, 6, 4)


def model_of(follow: Any, inputs: int = 1, shape: Any = IMAGE) -> Any:
    """follow: the function of the inputs that gives the outputs."""
    given = [keras.Input(shape) for _ in range(inputs)]
    return randomize(keras.Model(given if inputs > 1 else given[0], follow(*given)))


def batch(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


ACTIVATIONS: list[Any] = [
    (lambda: L.ReLU(), "relu"),
    (lambda: L.ReLU(6.0), "relu6"),
    (lambda: L.ReLU(negative_slope=0.1), "leaky_relu"),
    (lambda: L.LeakyReLU(0.3), "leaky_relu"),
    (lambda: L.Activation("relu"), "relu"),
    (lambda: L.Activation("relu6"), "relu6"),
    (lambda: L.Activation("leaky_relu"), "leaky_relu"),
    (lambda: L.ReLU(activity_regularizer="l2"), "relu"),
    (lambda: keras.ops.relu, "relu"),
    (lambda: keras.ops.relu6, "relu6"),
    (lambda: keras.ops.leaky_relu, "leaky_relu"),
    (lambda: keras.activations.relu, "relu"),
    *((lambda slope=slope: L.LeakyReLU(slope), "leaky_relu") for slope in (1e-46, 1e-40, 1.0, 2.5)),
    (lambda: lambda x: keras.ops.leaky_relu(x, -0.5), ""),
    (lambda: L.LeakyReLU(0.0), ""),
    (lambda: L.Activation("swish"), "silu"),
    (lambda: L.Activation("softsign"), ""),
    (lambda: L.ReLU(max_value=3.0), "relu"),  # then a minimum of Keras's
    (lambda: L.ReLU(max_value=6.0, threshold=0.1), ""),
    (lambda: L.ReLU(max_value=3.0, negative_slope=0.1), ""),
    (lambda: L.ReLU(dtype="float32"), ""),
    (L.PReLU, "relu"),  # relu(y) - alpha*relu(-y): a layer counts as one reader, though this one reads y twice
    (lambda: L.Subtract(), ""),
]


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize(("make", "wanted"), ACTIVATIONS)
def test_which_activations_are_fused(make: Any, wanted: str) -> None:
    activation = make()
    x = batch(5, *IMAGE)

    def follow(inputs: Any) -> Any:
        y = KERAS()(inputs)
        return activation([y, inputs]) if isinstance(activation, L.Subtract) else activation(y)

    model = model_of(follow)
    fast = quiet(model)
    assert fused(fast) == [""]
    single = getattr(activation, "compute_dtype", None) == "float32"
    same_steps(fast, model, x, tolerance=1e-4 if single else 1e-9)
    assert fused(fast) == [wanted]
    assert bool(report(fast).rows[0].reason) is not bool(wanted)


def same_tensor(inputs: Any) -> Any:
    y = KERAS()(inputs)
    return L.ReLU()(L.Add()([y, y]))


def read_by_three(inputs: Any) -> Any:
    y = KERAS()(inputs)
    return [L.ReLU()(y), y, L.Add()([inputs, y])]


def shared_activation(inputs: Any) -> Any:
    relu = L.ReLU()
    return relu(L.Conv2D(4, 1)(relu(KERAS()(inputs))))


def shared_norm(inputs: Any) -> Any:
    norm = KERAS()
    return L.ReLU()(norm(L.ReLU()(norm(inputs))))


def own_output(inputs: Any) -> Any:
    norm = KERAS()
    y = norm(inputs)
    return L.ReLU()(L.Add()([y, norm(y)]))


def both(a: Any, b: Any) -> Any:
    return L.ReLU()(L.Add()([a, b]))


def late_shortcut(inputs: Any) -> Any:
    y = KERAS()(L.Conv2D(4, 1)(inputs))
    return both(y, L.Conv2D(4, 1)(inputs))


def ops_add(inputs: Any) -> Any:
    return keras.ops.relu(keras.ops.add(inputs, KERAS()(inputs)))


CASES: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "Add": (lambda i: both(i, KERAS()(i)), ["add + relu"]),
    "Add alone": (lambda i: L.Add()([KERAS()(i), i]), ["add"]),
    "keras.ops.add": (ops_add, ["add + relu"]),
    "operator": (lambda i: keras.ops.leaky_relu(KERAS()(i) + i), ["add + leaky_relu"]),
    "a shortcut computed last": (late_shortcut, ["add + relu"]),
    "two batch norms": (lambda i: both(KERAS()(i), KERAS()(L.Conv2D(4, 1)(i))), ["", "add + relu"]),
    "three inputs": (lambda i: L.ReLU()(L.Add()([KERAS()(i), i, i])), ["add"]),
    "three inputs, the last": (lambda i: L.ReLU()(L.Add()([i, i, KERAS()(i)])), ["add + relu"]),
    "a ReLU before the Add": (lambda i: L.Add()([L.ReLU()(KERAS()(i)), i]), ["relu"]),
    "two Adds": (lambda i: both(i, L.Add()([KERAS()(i), i])), ["add"]),
    "an Add that broadcasts": (lambda i: both(KERAS()(i), L.Conv2D(1, 1)(i)), [""]),
    "another rank": (lambda i: both(KERAS()(i), L.GlobalAveragePooling2D()(i)), [""]),
    "the same tensor twice": (same_tensor, [""]),
    "another dtype": (lambda i: keras.ops.add(KERAS()(i), keras.ops.cast(i, "float32")), [""]),
    "a constant": (lambda i: KERAS()(i) + 1.5, [""]),
    "activity regularizer": (lambda i: L.ReLU()(KERAS(activity_regularizer="l2")(i)), [""]),
    "three readers": (read_by_three, [""]),
    "a shared activation": (shared_activation, ["relu"]),
    "a shared batch norm": (shared_norm, ["relu"]),
    "a batch norm of its own output": (own_output, ["add + relu"]),
    "training=True": (lambda i: L.ReLU()(KERAS()(i, training=True)), ["relu"]),
    "axis 1": (lambda i: both(i, KERAS(axis=1)(i)), ["add + relu"]),
    "no gamma and beta": (lambda i: L.ReLU()(KERAS(scale=False, center=False)(i)), ["relu"]),
    "regularized gamma": (lambda i: L.ReLU()(KERAS(gamma_regularizer="l2", momentum=0.5)(i)), ["relu"]),
    "momentum 0 and 1": (lambda i: L.ReLU()(KERAS(momentum=1.0)(L.ReLU()(KERAS(momentum=0.0)(i)))), ["relu", "relu"]),
    "frozen": (lambda i: L.ReLU()(KERAS(trainable=False)(i)), [""]),
}
if "renorm" in KERAS().get_config():  # Keras 3.14 and later
    CASES["renorm"] = lambda i: both(KERAS(renorm=True, renorm_clipping={"rmax": 1.2})(i), i), ["add + relu"]


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("case", CASES)
def test_adds_and_cases_that_are_not_fused(case: str) -> None:
    follow, wanted = CASES[case]
    model = model_of(follow)
    fast = quiet(model)
    same_steps(fast, model, batch(5, *IMAGE), tolerance=1e-5 if case == "another dtype" else 1e-9)
    assert sorted(fused(fast)) == sorted(wanted)
    same_steps(fast, model, batch(4, *IMAGE, seed=1), training=False, tolerance=1e-5)


@pytest.mark.usefixtures("each_bridge")
def test_an_add_of_two_calls_of_one_batch_norm() -> None:
    """The second call reads the moving statistics after the first one, whose fused op would need its output."""

    def follow(inputs: Any) -> Any:
        norm = KERAS()
        return both(norm(inputs), norm(L.Conv2D(4, 1)(inputs)))

    model = model_of(follow)
    same_steps(quiet(model), model, batch(5, *IMAGE))


OWN: dict[str, tuple[dict[str, Any], str]] = {
    "average": ({"momentum": None}, "add + relu"),
    "correction": ({"correction": 1}, "add + relu"),
    "nan_policy": ({"nan_policy": "skip_update"}, "add + relu"),
    "no update": ({"update_statistics": False}, "add + relu"),
    "batch statistics": ({"use_batch_statistics": True}, "add + relu"),
    "moving statistics": ({"use_batch_statistics": False}, ""),
    "synchronized": ({"synchronized": True}, "add + relu"),
    "ghosts": ({"virtual_batch_size": 2}, ""),
    "strided ghosts": ({"virtual_batch_size": 2, "virtual_batch_grouping": "strided"}, ""),
    "adjacent axes": ({"axis": [1, 2]}, ""),
    "axes apart": ({"axis": [1, 3]}, ""),
    "adjustment": ({"adjustment": lambda shape: (tf.fill([shape[0], 1, 1, 1], tf.constant(3.0, "float64")), 0.5)}, ""),
    "relu built in": ({"activation": "relu"}, "relu"),
    "tanh built in": ({"activation": "tanh"}, "tanh"),
    "softsign built in": ({"activation": "softsign"}, ""),
}


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("case", OWN)
def test_options_that_only_our_layer_has(case: str) -> None:
    """The graph, where operations are fused, against the eager layer, where none is."""
    kwargs, wanted = OWN[case]
    model, twin = (model_of(lambda i: both(i, BatchNormalization(**kwargs)(i))) for _ in range(2))
    got = step(model, batch(6, *IMAGE))
    assert fused(model) == [wanted]
    assert "ran eagerly" not in report(model).rows[0].reason
    tf.config.run_functions_eagerly(True)
    try:
        eager = step(twin, batch(6, *IMAGE))
    finally:
        tf.config.run_functions_eagerly(False)
    for a, b in zip(got, eager, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max())
    assert fused(twin) == [wanted if "built in" in case else ""]


def test_operations_behind_hand_built_layers() -> None:
    """accelerate leaves bnfast's own layers as they are; a layer with an Add or an activation is fused no further."""
    with patch():
        patched = keras.layers.BatchNormalization()
    ours = BatchNormalization(bridge="numpy_function")
    model = model_of(lambda i: L.ReLU()(BatchNormalizationAdd()([L.ReLU()(ours(L.ReLU()(patched(i)))), i])))
    fast = quiet(quiet(model, bridge="op"))
    assert [type(n) for n in fast.layers] == [type(n) for n in model.layers]
    step(fast, batch(5, *IMAGE))
    assert fused(fast) == ["relu", "relu", "add"]
    assert [row.bridge for row in report(fast).rows][1] == "numpy_function"


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("add", [False, True])
def test_masks(add: bool) -> None:
    """Masked values do not enter the statistics, and the next layer still receives the mask."""

    def follow(inputs: Any) -> Any:
        masked = L.Masking()(inputs)
        y = KERAS(momentum=0.5)(masked)
        return L.LSTM(4)(L.ReLU()(L.Add()([masked, y]) if add else y))

    model = model_of(follow, shape=(5, 3))
    x = batch(6, 5, 3)
    x[:, 3:] = 0
    fast = quiet(model)
    same_steps(fast, model, x, tolerance=1e-6)  # Keras adds 1e-7 to the count
    assert fused(fast) == ["add + relu" if add else "relu"]
    same_steps(to_keras(fast), model, x)


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "float32"])
def test_dtype_policies(policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    model = model_of(lambda i: both(i, KERAS(momentum=0.5)(L.ReLU()(KERAS()(i)))), shape=(4,))
    keras.config.set_dtype_policy("float64")
    fast, x = quiet(model), batch(16, 4)
    y, wanted = ([m(x, training=True) for _ in range(3)] for m in map(tf.function, (fast, model)))
    for a, b in zip(y, wanted, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, "float64"), np.asarray(b, "float64"), rtol=2e-2, atol=2e-2)
    for ours, theirs in zip(fast.weights, model.weights, strict=True):
        np.testing.assert_allclose(np.asarray(ours, "float64"), np.asarray(theirs, "float64"), rtol=2e-2, atol=2e-3)
    assert fused(fast) == ["relu", "add + relu"]


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("steps_per_execution", [1, 3])
def test_fit_fuses(steps_per_execution: int) -> None:
    models = residual_net("float64"), quiet(residual_net("float64"))
    for model in models:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss, steps_per_execution=steps_per_execution)
        model.fit(*data("float64"), batch_size=5, epochs=2, shuffle=False, verbose=0)
    assert sorted(fused(models[1])) == ["", "add + relu", "add + relu", "relu"]
    for a, b in zip(models[1].weights, models[0].weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12, err_msg=a.path)


def test_without_the_op_small_inputs_stay_on_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    model = keras.Sequential([keras.Input((64, 64, 3)), L.Conv2D(64, 3), L.BatchNormalization(name="large"),
                              L.GlobalAveragePooling2D(), L.BatchNormalization(name="small")])  # fmt: skip
    assert states(quiet(model)) == {"large": "bnfast", "small": "bnfast"}
    monkeypatch.setattr("bnfast.tensorflow.op.status", lambda: (False, "it isn't there"))
    monkeypatch.delenv("BNFAST_BRIDGE", raising=False)
    fast = quiet(model)
    assert states(fast) == {"large": "bnfast", "small": "keras"}
    assert "16 KiB" in report(fast).keras[0].reason
    assert "it isn't there" in report(fast).keras[0].reason
    with pytest.raises(ValueError, match="small stays on Keras's layer: 16 KiB"):
        quiet(model, strict=True)
    assert states(quiet(model, bridge="numpy_function")) == {"large": "bnfast", "small": "bnfast"}


def test_verbose_of_accelerate(capsys: pytest.CaptureFixture[str]) -> None:
    assert accelerate(residual_net(), verbose=0).name == "net"
    assert capsys.readouterr().out == ""
    accelerate(residual_net(), verbose=2, inplace=True)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2 + 4 + 1
    assert out.endswith("The given model is now the fast one.\n")
    with pytest.raises(ValueError, match=r"verbose must be 0, 1 or 2\. Received: 3"):
        accelerate(residual_net(), verbose=3)


def test_the_report_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    fast = accelerate(residual_net())
    title, heads, row, last = capsys.readouterr().out.splitlines()
    assert title == "net: 4 of 4 batch norms on bnfast, 0 fused"
    assert heads.split() == ["count", "state", "fused", "bridge", "reason", "layers"]
    assert row.startswith("4      bnfast")
    assert "no training call of it has been seen yet" in row
    assert row.endswith("and 1 more")
    assert last == "The model that accelerate returned is the fast one: train it. The given model is unchanged."
    assert report(fast).text(verbose=2).count("no training call of it has been seen yet") == 4
    step(fast, data()[0])
    title, _, *rows = str(report(fast)).splitlines()
    assert title == "net: 4 of 4 batch norms on bnfast, 3 fused"
    assert sum(int(row.split()[0]) for row in rows) == 4
    assert len(rows) == len(set(report(fast).rows[i].fused for i in range(4)))
    assert report(fast)._repr_html_().count("<tr>") == 1 + len(rows)
    fast(data()[0], training=True)
    assert [row.reason for row in report(fast).rows] == [
        "its last training call ran eagerly, and only graphs are fused"
    ] * 4
    (row,) = report(keras_models.dense_net()).rows
    assert (row.state, row.reason) == ("keras", "accelerate() has not been applied")
    same_predictions(fast, to_keras(fast))
