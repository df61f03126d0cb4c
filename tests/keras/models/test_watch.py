"""Watch: batch statistics read back from the moving ones, verdicts said once, TensorBoard, and its cost."""

from __future__ import annotations

import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from bnfast.keras import BatchNormalization, Watch, accelerate
from keras import layers as L
from model_state import state

KERAS = keras.layers.BatchNormalization
RNG = np.random.default_rng(1)
X = RNG.normal(3, 2, (640, 6)).astype("float32")
Y = (X[:, 0] > 3).astype("int32")


def net(norm=KERAS, **kwargs):
    model = keras.Sequential([keras.Input((6,)), norm(name="bn", **kwargs), L.Dense(4), L.ReLU(), L.Dense(2)])
    return compiled(model)


def compiled(model, **kwargs):
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), **kwargs)
    return model


def fit(model, watch, epochs=2, **kwargs):
    return model.fit(X, Y, batch_size=64, epochs=epochs, shuffle=False, verbose=0, callbacks=[watch], **kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"momentum": 0.5}, {"renorm": True}])
@pytest.mark.parametrize("norm", [KERAS, BatchNormalization])
def test_the_batch_statistics_are_read_back(norm, kwargs):
    model, watch = net(norm, **kwargs), Watch(budget=1.0, verbose=0)
    fit(model, watch, 1)
    (samples,) = watch._samples
    assert len(samples) == 10
    for i, (mean, variance) in enumerate(samples):
        batch = X[64 * i : 64 * i + 64].astype("float64")
        np.testing.assert_allclose(mean, batch.mean(0), atol=2e-3)
        np.testing.assert_allclose(variance, batch.var(0), rtol=2e-3)
    assert watch.history[0]["bn"] > 0
    assert watch.left == {}


@pytest.mark.parametrize("form", ["accelerated", "shared", "several steps per execution"])
def test_updates_per_step_are_counted(form):
    if form == "shared":
        inputs, norm = keras.Input((6,)), KERAS(name="bn", momentum=0.5)
        model = compiled(keras.Model(inputs, L.Dense(2)(norm(inputs) + norm(inputs))))
    else:
        model = net(momentum=0.5)
        if form == "accelerated":
            model = accelerate(model, verbose=False)
        else:
            compiled(model, steps_per_execution=5)
    watch = Watch(budget=1.0, verbose=0)
    fit(model, watch, 1)
    assert list(watch._counts.values()) == [2 if form == "shared" else 1]
    means = np.mean([mean for mean, _ in watch._samples[0]], 0)
    np.testing.assert_allclose(means, X.mean(0), atol=0.3)


def test_a_short_training_is_told_at_once_and_only_once(capsys):
    watch = Watch()
    fit(net(), watch, 3)
    out = capsys.readouterr().out
    assert out.count("Too few updates") == 1
    assert "epoch 1" in out
    assert watch.verdicts["too-few-updates"][0] == 0
    assert len(watch.history) == 3


def test_a_long_training_is_left_alone(capsys):
    watch = Watch(budget=1.0)
    fit(net(momentum=0.9), watch, 10)
    assert capsys.readouterr().out == ""
    assert watch.verdicts == {}
    assert watch.history[-1]["bn"] < 0.15


def test_stopped_early(capsys):
    stop = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", True))
    model, watch = net(), Watch()
    model.fit(X, Y, batch_size=64, epochs=200, verbose=0, callbacks=[stop, watch])
    assert "too-few-updates" in watch.verdicts
    assert "Too few updates" in capsys.readouterr().out


def test_one_watch_for_two_trainings():
    """What was counted holds for the second one, unless the model was compiled anew: here it starts frozen."""
    model, watch = net(), Watch(budget=1.0, verbose=0)
    model.layers[0].trainable = False
    fit(compiled(model), watch, 1)
    assert watch._samples == [[]]
    model.layers[0].trainable = True
    compiled(model)
    for epochs in (1, 2):
        fit(model, watch, epochs)
        assert list(watch._counts.values()) == [1]
        np.testing.assert_allclose(watch._samples[0][-1][0], X[-64:].mean(0), atol=2e-3)
        assert watch.history[-1]["bn"] > 0
    assert len(watch.history) == 4
    assert not any("assign" in vars(variable) for variable in model.variables)


class Never(keras.Model):
    def __init__(self):
        super().__init__()
        self.norm, self.head = KERAS(name="bn"), L.Dense(2)

    def call(self, x, training=None):
        return self.head(self.norm(x, training=False))


def test_a_layer_that_training_does_not_update():
    model, watch = Never(), Watch(verbose=0)
    model(X[:2])
    fit(compiled(model), watch, 1)
    assert watch.verdicts["never-updated"][1].layers == ("bn",)


class Gan(keras.Model):
    """A discriminator that is trained twice per step, by an optimizer of its own."""

    def __init__(self):
        super().__init__()
        self.d, self.own = keras.Sequential([keras.Input((6,)), KERAS(name="bn", momentum=0.9), L.Dense(1)]), None

    def call(self, x):
        return self.d(x)

    def train_step(self, data):
        for x in (data[0], -data[0]):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self.d(x, training=True) ** 2)
            self.own.apply(tape.gradient(loss, self.d.trainable_variables), self.d.trainable_variables)
        return {"loss": loss}


@pytest.mark.parametrize("optimizer", ["rmsprop", None])
def test_a_train_step_that_updates_twice(optimizer):
    model, watch = Gan(), Watch(budget=1.0, verbose=0)
    model(X[:2])
    model.own = keras.optimizers.Adam()
    model.compile(optimizer)
    fit(model, watch, 5)
    assert list(watch._counts.values()) == [2]
    mean, _ = watch._samples[0][0]
    assert np.abs(mean).max() < 1  # of both halves
    assert watch.history[-1]["bn"] < 0.2
    assert watch.left == {}


REPLICAS = """
import os
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import keras, numpy as np, tensorflow as tf
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], two)
from bnfast.keras import Watch, diagnose, recalibrate
x = np.random.default_rng(0).normal(3, 2, (640, 6)).astype("float32")
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    norm = keras.layers.BatchNormalization(synchronized=True)
    model = keras.Sequential([keras.Input((6,)), norm, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
watch = Watch(budget=1.0, verbose=0)
model.fit(x, x[:, 0], epochs=1, verbose=0, callbacks=[watch])
assert list(watch._counts.values()) == [1], watch._counts
assert diagnose(model, x, x[:, 0]).verdicts[0].code == "too-few-updates"
recalibrate(model, x, verbose=0)
for copy in norm.moving_variance.value.values:
    np.testing.assert_allclose(np.asarray(copy), x.astype("float64").var(0), rtol=1e-6)
assert diagnose(model, x, x[:, 0]).healthy
"""


def test_two_replicas():
    run = subprocess.run([sys.executable, "-c", REPLICAS], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


def test_an_interrupted_training_leaves_nothing():
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 3:
                raise KeyboardInterrupt

    model = net()
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, verbose=0, callbacks=[Watch(verbose=0), Interrupt()])
    assert not any("assign" in vars(variable) for variable in model.variables)


def test_not_finite():
    model, watch = net(), Watch(verbose=0)
    x = X.copy()
    x[300] = np.nan
    model.fit(x, Y, batch_size=64, epochs=1, verbose=0, callbacks=[watch])
    assert "not-finite" in watch.verdicts


def test_what_cannot_be_watched_is_said():
    model, watch = net(BatchNormalization, momentum=None), Watch(verbose=0)
    fit(model, watch, 1)
    assert watch.left == {"bn": "momentum=None"}
    model = net()
    model.layers[0].trainable = False
    watch = Watch(verbose=0)
    fit(compiled(model), watch, 1)
    assert watch.left == {"bn": "it is frozen"}
    watch = Watch(verbose=0)
    fit(net(momentum=0.99999), watch, 1)
    assert watch.left == {"bn": "at momentum 0.99999 batch statistics can't be read back"}
    assert watch.history == [{}]
    watch = Watch(verbose=0)
    fit(compiled(net(), run_eagerly=True), watch, 1)
    assert "eagerly" in watch.left["bn"]
    assert watch.verdicts == {}


def test_the_training_is_the_same():
    models = []
    for callbacks in ([], [Watch(verbose=0)]):
        keras.utils.set_random_seed(0)
        model = net()
        model.fit(X, Y, epochs=2, verbose=0, callbacks=callbacks)
        model.fit(X, Y, epochs=1, verbose=0)
        models.append(model)
    for a, b in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    plain, watched = (state(model)["attributes"] for model in models)
    assert plain == watched
    assert not any("assign" in vars(v) for v in models[1].variables)


def test_data_whose_end_is_unknown():
    """How many updates are still to come is unknown, too: only what more of them cure is said at once."""
    model, watch = net(momentum=0.999), Watch(budget=1.0, verbose=0)
    batches = (((X[i : i + 64], Y[i : i + 64])) for i in range(0, 640, 64))
    model.fit(batches, epochs=1, verbose=0, callbacks=[watch])
    assert watch.verdicts["too-few-updates"][0] == 0


def test_tensorboard(tmp_path):
    inputs, frozen = keras.Input((6,)), KERAS(name="frozen", trainable=False)
    model = compiled(keras.Model(inputs, L.Dense(2)(KERAS(name="bn")(frozen(inputs)))))
    fit(model, Watch(tmp_path, verbose=0), 2)
    (file,) = tmp_path.iterdir()
    tags = {value.tag for event in tf.compat.v1.train.summary_iterator(str(file)) for value in event.summary.value}
    assert tags == {f"batch_norm/bn/{name}" for name in ("gap", "mean_off", "variance_log2")}


@pytest.mark.serial
def test_the_budget_is_kept():
    model, watch = net(), Watch(verbose=0)
    started = time.perf_counter()
    fit(model, watch, 40)
    allowed = 0.02 * (time.perf_counter() - started)
    assert watch.seconds <= allowed + 0.3  # the first step and epoch, the last epoch, and a step under way
    assert len(watch.history) == 40
    assert watch.history[-1]


@pytest.mark.parametrize("budget", [0, -1, 2, "x", True])
def test_a_wrong_budget(budget):
    with pytest.raises(ValueError, match="budget"):
        Watch(budget=budget)


def test_a_model_without_batch_norm():
    model = compiled(keras.Sequential([keras.Input((6,)), L.Dense(2)]))
    with pytest.raises(ValueError, match="no batch norm"):
        fit(model, Watch())
