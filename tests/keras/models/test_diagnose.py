"""diagnose on models and data of every form: figures, scores, the state of the model, and bad input."""

from __future__ import annotations

import json

import keras
import keras_models
import numpy as np
import pytest
import tensorflow as tf
from bnfast.keras import BatchNormalization, ConditionalBatchNormalization, accelerate, diagnose, recalibrate
from keras import layers as L
from model_state import state

KERAS = keras.layers.BatchNormalization
RNG = np.random.default_rng(1)
X = RNG.normal(3, 2, (400, 6)).astype("float32")
Y = (X[:, 0] > 3).astype("int32")


def net(norm=KERAS, **kwargs):
    layers = [L.Dense(8), norm(name="a", **kwargs), L.ReLU(), L.Dense(8), norm(name="b", **kwargs), L.Dense(2)]
    return keras.Sequential([keras.Input((6,)), *layers])


def compiled(model, **kwargs):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, **kwargs)
    return model


def unchanged(model, *args, **kwargs):
    before = state(model)
    found = diagnose(model, *args, **kwargs)
    assert state(model) == before
    return found


def test_scores_are_those_of_evaluate():
    model = compiled(net(), metrics=["accuracy"], weighted_metrics=["sparse_categorical_accuracy"])
    model.fit(X, Y, epochs=2, verbose=0)
    found = unchanged(model, X[:100], Y[:100])
    assert found.figures.compared == 100
    wanted = model.evaluate(X[:100], Y[:100], verbose=0, return_dict=True)
    assert found.figures.scores["moving"].keys() == wanted.keys()
    for name, value in wanted.items():
        assert found.figures.scores["moving"][name] == pytest.approx(value, rel=1e-5)
    recalibrate(model, X[:100], verbose=0)
    better = model.evaluate(X[:100], Y[:100], verbose=0, return_dict=True)
    for name, value in better.items():
        assert found.figures.scores["recalibrated"][name] == pytest.approx(value, rel=1e-4)


def test_the_distances_are_those_of_the_outputs():
    model = keras_models.randomize(net())
    found = unchanged(model, X, batch_size=400)
    moving = model.predict(X, verbose=0, batch_size=400)
    training = np.asarray(model(X, training=False))
    recalibrate(model, X, verbose=0, batch_size=400)
    after = model.predict(X, verbose=0, batch_size=400)
    np.testing.assert_allclose(moving, training, rtol=1e-4, atol=1e-5)
    wanted = np.sqrt(np.mean((moving - after) ** 2)) / after.std()
    assert found.figures.distance == pytest.approx(wanted, rel=1e-3)
    assert found.figures.scores == {}


def test_the_layer_where_the_gap_opens():
    model = compiled(net())
    model.fit(X, Y, epochs=30, verbose=0)
    recalibrate(model, X, verbose=0)
    assert unchanged(model, X, Y).healthy
    model.get_layer("b").moving_mean.assign(np.asarray(model.get_layer("b").moving_mean) + 3)
    found = unchanged(model, X, Y)
    assert found.first_gap == "b"
    a, b = found.figures.layers
    assert a.effect is None
    assert b.effect > 0.5
    assert b.step > 0
    unknown = "Whether the weights drift is unknown: "
    notes = unchanged(model, X).figures.notes
    assert notes == [f"{unknown}that needs targets."]
    vars(model)["held"] = (i for i in range(3))
    (note,) = unchanged(model, X, Y).figures.notes
    assert note.startswith(f"{unknown}a copy of the model can't be trained: {model.name} (Sequential).held can't be")


def test_cost_in_passes():
    model = compiled(net(), metrics=["accuracy"])
    model.fit(X, Y, epochs=1, verbose=0)
    calls = []

    class Counting(keras.utils.PyDataset):
        def __len__(self):
            return 16

        def __getitem__(self, i):
            calls.append(i)
            return X[25 * i : 25 * i + 25], Y[25 * i : 25 * i + 25]

    found = unchanged(model, Counting())
    assert calls == list(range(16))
    suspects = sum(row.effect is not None for row in found.figures.layers)
    assert found.figures.passes <= 1 + 2 * 150 / 400 + suspects


def test_models_of_every_form():
    models = {
        "subclassed": (keras_models.subclassed(), X[:, :4]),
        "accelerated": (accelerate(net(), verbose=False), X),
        "renorm": (net(renorm=True), X),
        "ours": (net(BatchNormalization, activation="relu", momentum=None), X),
        "float16": (
            keras.Sequential([keras.Input((6,)), KERAS(dtype="mixed_float16"), L.Dense(2, dtype="float32")]),
            X,
        ),
        "bfloat16": (keras.Sequential([keras.Input((6,)), KERAS(dtype="mixed_bfloat16")]), X),
    }
    for name, (model, x) in models.items():
        found = unchanged(model, x)
        assert found.verdicts, name
        assert not any("call" in vars(layer) for layer in model._flatten_layers())
        json.dumps(found.to_dict(), allow_nan=False)
        assert str(found).count("\n") > 3


def test_inputs_of_every_form():
    a, b = keras.Input((6,), name="a"), keras.Input((), dtype="int32", name="label")
    h = ConditionalBatchNormalization(num_classes=2)([KERAS()(a), b])
    model = compiled(keras.Model({"a": a, "label": b}, L.Dense(2)(h)))
    inputs = {"a": X, "label": Y}
    dataset = tf.data.Dataset.from_tensor_slices((inputs, Y, np.ones(400, "float32"))).batch(64)
    for data, targets in ((inputs, Y), ((inputs, Y, np.ones(400)), None), (dataset, None), (iter(dataset), None)):
        found = unchanged(model, data, targets)
        assert "loss" in found.figures.scores["moving"]
        assert len(found.figures.layers) == 2


def test_several_outputs():
    inputs = keras.Input((6,))
    h = KERAS()(inputs)
    model = keras.Model(inputs, {"p": L.Dense(2, name="p")(h), "q": L.Dense(1, name="q")(h)})
    loss = {"p": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "q": "mse"}
    model.compile("adam", loss, metrics={"p": ["accuracy"], "q": ["mae"]})
    found = unchanged(model, X, {"p": Y, "q": X[:, :1]})
    wanted = model.evaluate(X, {"p": Y, "q": X[:, :1]}, verbose=0, return_dict=True)
    assert found.figures.scores["moving"]["loss"] > 0
    assert "p_accuracy" in found.figures.scores["moving"]
    assert wanted.keys() >= found.figures.scores["moving"].keys()


def test_uncompiled_models_are_scored_by_accuracy():
    assert set(unchanged(net(), X, Y).figures.scores["moving"]) == {"accuracy"}
    assert unchanged(net(), X).figures.scores == {}


def test_unusable_targets_are_noted():
    model = compiled(net(), metrics=["accuracy"])
    found = unchanged(model, X, np.zeros((400, 3, 3), "float32"))
    assert found.figures.scores == {}
    assert "can't be computed from these targets" in str(found)


class Odd(keras.metrics.SparseCategoricalAccuracy):
    def __init__(self, secret):
        super().__init__(name="odd")

    def get_config(self):
        return {}


def test_a_metric_that_cannot_be_made_anew_is_noted():
    model = compiled(net(), metrics=["accuracy", Odd(3)])
    found = unchanged(model, X, Y)
    assert "accuracy" in found.figures.scores["moving"]
    assert "odd is left out" in str(found)


def test_a_model_with_its_own_training_flag():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = KERAS(name="first"), KERAS(name="second"), L.Dense(2)

        def call(self, x, training=None):
            return self.head(self.second(self.first(x, training=True), training=training))

    model = Own()
    model(X[:2])
    found = unchanged(model, X)
    assert "always-training" in [verdict.code for verdict in found.verdicts]
    assert next(v for v in found.verdicts if v.code == "always-training").layers == ("first",)


def test_batch_norms_that_are_not_called():
    class Partly(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.unused = KERAS(name="used"), KERAS(name="unused")
            self.unused.build((None, 6))

        def call(self, x, training=None):
            return self.used(x, training=training)

    model = Partly()
    model(X[:2])
    found = unchanged(model, X)
    assert found.figures.unreached == ("unused",)
    assert "unused: the model doesn't call it" in str(found)


def test_data2_is_scored_too():
    model = compiled(net(), metrics=["accuracy"])
    model.fit(X, Y, epochs=20, verbose=0)
    found = unchanged(model, X, Y, data2=(X * 5, Y))
    assert set(found.figures.other_scores) == {"loss", "accuracy"}
    assert found.verdicts[0].code == "shifted-data" or "shifted-data" in [v.code for v in found.verdicts]


@pytest.mark.parametrize("eager", [False, True])
def test_what_a_batch_norm_sees(eager):
    """Batches that are masked or not finite don't count; a mask, many values or its own axis leave samples alone."""
    inputs = keras.Input((7, 4))
    masked = keras.Model(inputs, KERAS(name="bn")(L.Masking()(inputs)))
    masked.compile(run_eagerly=eager)
    x = RNG.normal(2, 3, (12, 7, 4)).astype("float32")
    zeros = np.zeros((12, 7, 4), "float32")
    (row,) = unchanged(masked, iter([x, zeros, x]), data2=zeros).figures.layers
    assert (row.batches, row.count, row.top_row, row.other) == (2, 168, None, None)
    np.testing.assert_allclose(row.mean, x.mean((0, 1), "float64"), rtol=1e-6)
    big = keras.Sequential([keras.Input((6,)), L.Dense(6, kernel_initializer="identity"), KERAS(name="bn")])
    big.compile(run_eagerly=eager)
    first = np.full((4, 6), 3e38, "float32")
    big.layers[0].kernel.assign(np.eye(6) * 1e10)
    found = unchanged(big, iter([X, first, X]), data2=X)
    (row,) = found.figures.layers
    assert (row.infinite_batches, row.batches) == (1, 2)
    assert found.verdicts[0].code == "overflow"
    np.testing.assert_allclose(row.other[0], X.mean(0, "float64") * 1e10, rtol=1e-5)
    own = keras.Sequential([keras.Input(batch_shape=(8, 6)), KERAS(axis=0, name="bn")])
    own.compile(run_eagerly=eager)
    found = unchanged(own, X[:80])
    assert "wrong-axis" in [verdict.code for verdict in found.verdicts]
    assert found.figures.layers[0].top_row is None


def test_the_axis_of_the_features_in_sequences():
    x = RNG.normal(2, 3, (40, 5, 4)).astype("float32")
    for axis, others, expected in ((1, [L.Dense(3)], 2), (2, [L.LSTM(3)], 2), (1, [], None)):
        model = keras.Sequential([keras.Input((5, 4)), KERAS(axis=axis, name="bn"), *others])
        found = diagnose(model, x)
        assert found.figures.layers[0].expected_axis == expected
        assert ("wrong-axis" in [verdict.code for verdict in found.verdicts]) is (expected not in (None, axis))


def test_outputs_of_other_kinds():
    """Text and what is empty is left out; sequences whose lengths differ from batch to batch are compared."""
    inputs = keras.Input((None, 6))
    y = KERAS(name="bn")(inputs)
    empty, scalar = y[:, :, :0], keras.ops.mean(y)
    words = L.StringLookup(vocabulary=["a", "b"], invert=True)(keras.ops.cast(y[:, 0, 0] > 0, "int64"))
    batches = [X[:60].reshape(12, 5, 6), X[60:144].reshape(12, 7, 6)]
    x = X[:144].astype("float64")
    moving, recalibrated = x / np.sqrt(1.001), (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3)
    wanted = np.sqrt(np.mean((moving - recalibrated) ** 2) / recalibrated.var())
    for outputs, distance in ((y, wanted), ([y, empty, words], wanted), ([empty, words], 0)):
        found = unchanged(keras.Model(inputs, outputs), iter(batches)).figures
        assert found.distance == pytest.approx(distance, rel=1e-4)
    assert unchanged(keras.Model(inputs, scalar), iter(batches)).figures.distance > 1


class Untraceable(keras.Model):
    def __init__(self):
        super().__init__()
        self.norm = KERAS(name="bn")

    def call(self, x, training=None):
        if training:
            raise NotImplementedError("only for inference")
        return self.norm(x)


def test_a_model_that_cannot_be_trained_is_noted():
    model = Untraceable()
    model(X[:2])
    (note,) = unchanged(model, X).figures.notes
    assert note.startswith("the model can't be traced with training=True: ")
    assert "only for inference" in note


class Scheduled(keras.optimizers.SGD):
    @property
    def learning_rate(self):
        return {"first": 0.1, "second": 0.2}


def test_a_learning_rate_that_is_no_number_is_left_out():
    model = net()
    model.compile(Scheduled(), "mse")
    assert unchanged(model, X).figures.learning_rate is None


def test_a_metric_per_class_is_left_out():
    model = net()
    model.compile("sgd", "mse", metrics=[keras.metrics.F1Score(), "mae"])
    assert set(unchanged(model, X, np.eye(2, dtype="float32")[Y]).figures.scores["moving"]) == {"loss", "mae"}


def test_more_batches_of_data2_than_are_scored():
    model = compiled(net())
    pairs = tf.data.Dataset.from_tensor_slices((X, Y)).batch(10)
    found = unchanged(model, X, Y, data2=pairs).figures
    assert found.other_samples == 400
    np.testing.assert_allclose(found.layers[0].other[0], found.layers[0].mean, rtol=1e-5, atol=1e-6)
    assert found.other_scores == pytest.approx(diagnose(model, X, Y, data2=pairs.take(32)).figures.other_scores)


def test_starting_statistics_that_are_unknown():
    random = KERAS(moving_mean_initializer="random_normal", name="bn")
    model = keras.Sequential([keras.Input((6,)), random])
    assert diagnose(model, X).figures.layers[0].start is None
    ramp = keras.initializers.Constant(np.ones((1, 2, 1, 3), "float32"))
    model = keras.Sequential([keras.Input((2, 1, 3)), BatchNormalization(axis=[1, 3], moving_mean_initializer=ramp)])
    assert diagnose(model, X.reshape(400, 2, 1, 3)).figures.layers[0].start is None


@pytest.mark.parametrize(
    ("model", "data", "kwargs", "error", "words"),
    [
        (net, np.zeros((0, 6)), {}, ValueError, "empty"),
        (net, np.full((4, 6), np.nan), {}, ValueError, "NaN or Inf"),
        (net, X, {"data2": np.full((4, 6), np.nan)}, ValueError, "data2 holds NaN"),
        (net, X, {"targets": Y[:5]}, ValueError, "same number"),
        (net, tf.data.Dataset.from_tensor_slices(X).batch(5), {"targets": Y}, ValueError, "targets must be None"),
        (net, {"wrong": X}, {}, ValueError, "lacks the input"),
        (net, (X, Y), {"targets": Y}, ValueError, "^targets must be None where data has them: it is a tuple of 2$"),
        (net, [X, X], {}, ValueError, "1 inputs"),
        (lambda: keras.Sequential([keras.Input((6,)), L.Dense(2)]), X, {}, ValueError, "no batch norm"),
        (lambda: keras.Sequential([KERAS()]), X, {}, ValueError, "not built"),
        (lambda: KERAS(), X, {}, TypeError, "keras.Model"),
    ],
)  # fmt: skip
def test_bad_input(model, data, kwargs, error, words):
    with pytest.raises(error, match=words):
        diagnose(model(), data, **kwargs)


def test_an_error_in_the_middle_restores_the_model():
    model = compiled(net())

    def batches():
        yield X[:10], Y[:10]
        raise OSError("gone")

    before = state(model)
    with pytest.raises(OSError, match="gone"):
        diagnose(model, batches())
    assert state(model) == before
    assert not any("call" in vars(layer) for layer in model.layers)
