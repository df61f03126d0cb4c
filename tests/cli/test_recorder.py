"""What `bnfast run --compare` records of a training: the steps, the losses, and the weights after the first and the
last step, however a script trains. Here the recorder watches this process; test_compare.py runs whole scripts."""

from __future__ import annotations

import gc
import itertools
import math

import numpy as np
import pytest
from bnfast.cli.compare.recorder import End, Recorder, _loss
from bnfast.cli.compare.trainings import FIRST, LAST, Training, moving_statistics, read, values

pytestmark = pytest.mark.needs("tensorflow", "keras")

X = np.random.default_rng(0).normal(3, 2, (40, 6)).astype("float32")
Y = X.sum(1)


class Watched:
    """A recorder, and what it has written."""

    def __init__(self, folder, steps, move=False):
        self.folder = folder
        self.recorder = Recorder(folder, steps, move)
        self.recorder.install()

    def trainings(self) -> list[Training]:
        self.recorder.finish()
        record = read(self.folder)
        assert record is not None
        self.record = record
        return record.trainings

    def kept(self, training: Training, when: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
        weights, moving = (values(self.folder, training, when, kind) for kind in ("weights", "moving"))
        return list(weights.values()), list(moving.values())


@pytest.fixture
def watch(monkeypatch, tmp_path):
    """watch(steps) records from now on to the end of the test."""
    import keras
    from keras.src.layers.normalization.batch_normalization import BatchNormalization
    from keras.src.optimizers.base_optimizer import BaseOptimizer
    from tensorflow.python.eager.polymorphic_function.polymorphic_function import Function

    wrapped = [(keras.Model, name) for name in ("fit", "train_on_batch", "evaluate")]
    for owner, name in [*wrapped, (BatchNormalization, "build"), (BaseOptimizer, "apply"), (Function, "__call__")]:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    return lambda steps, **options: Watched(tmp_path, steps, **options)


def make_model(name="net", optimizer="sgd"):
    """With a model inside it: two batch norms."""
    import keras

    keras.utils.set_random_seed(1)
    inner = keras.Sequential([keras.layers.Dense(5), keras.layers.BatchNormalization()])
    layers = [inner, keras.layers.ReLU(), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((6,)), *layers], name=name)
    model.compile(optimizer, "mse")
    return model


def state(model) -> tuple[list[np.ndarray], list[np.ndarray]]:
    moving = moving_statistics(model.non_trainable_variables)
    return [each.numpy() for each in model.trainable_variables], [each.numpy() for each in moving]


def check_equal(found, wanted) -> None:
    assert [len(each) for each in found] == [len(each) for each in wanted] == [8, 4]
    for arrays in zip(itertools.chain(*found), itertools.chain(*wanted), strict=True):
        np.testing.assert_array_equal(*arrays)


# ---- fit -------------------------------------------------------------------------------------------------------------


def test_a_fit_of_fewer_steps(watch):
    watched, model = watch(9), make_model()
    history = model.fit(X, Y, batch_size=20, epochs=2, verbose=0)
    (training,) = watched.trainings()
    assert (training.name, training.steps, len(training.losses)) == ("fit of net", 4, 4)
    assert training.losses[1::2] == pytest.approx(history.history["loss"]), "Keras's mean since the epoch began"
    check_equal(watched.kept(training, LAST), state(model))
    assert watched.record.batch_norms == 2


def test_a_fit_that_fails_is_kept_up_to_there(watch):
    def data():
        yield from [(X[:20], Y[:20]), (X[20:], Y[20:])]
        raise OSError("no more")

    watched, model = watch(9), make_model()
    with pytest.raises(Exception, match="no more"):
        model.fit(data(), steps_per_epoch=5, verbose=0)
    (training,) = watched.trainings()
    assert (training.steps, len(training.losses)) == (2, 2)
    check_equal(watched.kept(training, LAST), state(model))


@pytest.mark.parametrize("kind", ["none", "one", "several", "CallbackList"])
def test_the_script_s_callbacks_stay(watch, kind):
    """Keras calls those of a CallbackList in a thread, if none of them looks at batches."""
    import keras

    class Counts(keras.callbacks.Callback):
        epochs = 0

        def on_epoch_begin(self, epoch, logs=None):
            Counts.epochs += 1

    own = {"none": None, "one": Counts(), "several": [Counts(), keras.callbacks.TerminateOnNaN()]}
    callbacks = keras.callbacks.CallbackList([Counts()]) if kind == "CallbackList" else own[kind]
    first = make_model()
    first.train_on_batch(X[:8], Y[:8])
    watched, models = watch(2), [make_model(), make_model()]
    for model in models:
        model.fit(X, Y, batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)
    trainings = watched.trainings()
    for model, training in zip(models, trainings, strict=True):
        assert (training.steps, int(model.optimizer.iterations)) == (2, 2)
        for found, wanted in zip(watched.kept(training, FIRST)[0], state(first)[0], strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
        check_equal(watched.kept(training, LAST), state(model))
    assert Counts.epochs == 2 * (kind != "none")


def test_a_training_inside_another_is_part_of_it(watch):
    import keras

    class Trains(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            other.fit(X, Y, verbose=0)
            other.train_on_batch(X, Y)

    watched, model, other = watch(9), make_model(), make_model("other")
    model.fit(X, Y, batch_size=20, verbose=0, callbacks=[Trains()])
    assert [(each.name, each.steps) for each in watched.trainings()] == [("fit of net", 2)]
    assert int(other.optimizer.iterations) == 3


def test_evaluating_takes_no_more_steps_than_training(watch):
    import keras
    import tensorflow as tf

    class Counts(keras.callbacks.Callback):
        batches = 0

        def on_test_batch_end(self, batch, logs=None):
            Counts.batches += 1

    def count(call, *args, **options):
        before = Counts.batches
        call(*args, callbacks=[Counts()], verbose=0, **options)
        return Counts.batches - before

    watch(3)
    model = make_model()
    given = {"x": keras.Input((6,), name="x")}
    named = keras.Model(given, model(given["x"]))
    named.compile("sgd", "mse")
    pair = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
    assert count(model.evaluate, X, Y, batch_size=4) == 3
    assert count(model.evaluate, X, Y, batch_size=20) == 2
    assert count(named.evaluate, {"x": X}, Y, batch_size=4) == 3
    assert count(model.evaluate, pair) == 3
    assert count(model.evaluate, pair, steps=8) == 3
    assert count(model.evaluate, pair, steps=1) == 1
    assert count(model.evaluate, ((X[i : i + 8], Y[i : i + 8]) for i in range(0, 40, 8))) == 5, "of unknown length"
    for options in ({"validation_batch_size": 4}, {"batch_size": 4}):
        assert count(model.fit, X, Y, validation_data=(X, Y), **options) == 3
        assert count(model.fit, X, Y, validation_data=([X], Y), **options) == 3
    assert count(model.fit, X, Y, validation_data=(X, Y)) == 2


# ---- loops of the script's own ---------------------------------------------------------------------------------------


def test_train_on_batch(watch):
    """Of two models in turn, with weights that are frozen after their step."""
    watched, models = watch(4), [make_model("a"), make_model("b", "adam")]
    losses: dict = {"a": [], "b": []}
    after = {}
    for _ in range(3):
        for model in models:
            model.trainable = True
            losses[model.name].append(model.train_on_batch(X, Y, return_dict=model.name == "b"))
            after.setdefault(model.name, state(model))
            model.trainable = False
    trainings = watched.trainings()
    assert [(each.name, each.steps) for each in trainings] == [("train_on_batch of a", 3), ("train_on_batch of b", 3)]
    assert trainings[0].losses == pytest.approx(losses["a"])
    assert trainings[1].losses == pytest.approx([each["loss"] for each in losses["b"]])
    for model, training in zip(models, trainings, strict=True):
        check_equal(watched.kept(training, FIRST), after[model.name])
        model.trainable = True
        check_equal(watched.kept(training, LAST), state(model))


def test_train_on_batch_ends_the_script(watch):
    other = make_model()
    other.train_on_batch(X, Y)
    watched, model = watch(2, move=True), make_model()

    def script():
        for _ in range(5):
            model.train_on_batch(X, Y)

    with pytest.raises(End):
        script()
    (training,) = watched.trainings()
    assert (training.steps, int(model.optimizer.iterations)) == (2, 2)
    assert watched.record.stopped == "in a loop of its own"
    assert watched.record.moved
    assert [path.split("/")[-1] for path in watched.recorder._mover.moved] == ["gamma"]
    pairs = list(zip(watched.kept(training, FIRST)[0], state(other)[0], strict=True))
    assert any((a != b).any() for a, b in pairs)
    assert all(np.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda optimizers: optimizers.SGD(0.1, momentum=0.9), 4),
        (lambda optimizers: optimizers.AdamW(use_ema=True), 4),
        (lambda optimizers: optimizers.Adam(gradient_accumulation_steps=2), 2),
        (lambda optimizers: optimizers.LossScaleOptimizer(optimizers.Lion()), 4),
    ],
    ids=["SGD", "EMA", "accumulation", "loss scale"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_loops_of_optimizers(watch, make, steps, compiled):
    """The statistics are those of the model that the optimizer trains, whatever was trained before."""
    import keras
    import tensorflow as tf

    watched = watch(9, move=True)
    make_model("gone").train_on_batch(X, Y)
    watched.recorder._loops.clear()
    del watched.recorder.record.trainings[:]
    gc.collect()
    model, optimizer = make_model(), make(keras.optimizers)

    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(X, training=True) - Y[:, None]) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    call = tf.function(step) if compiled else step
    for _ in range(4):
        call()
    (training,) = watched.trainings()
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    assert (training.name, training.steps, training.losses) == (f"loop of {inner.name}", steps, [])
    check_equal(watched.kept(training, LAST), state(model))
    first, last = (watched.kept(training, when)[1] for when in (FIRST, LAST))
    assert all((a != b).any() for a, b in zip(first, last, strict=True))
    assert len(watched.recorder._mover.moved) == 2, "one weight of each model"


def test_what_fails_in_a_graph_fails_with_keras_s_message(watch):
    import tensorflow as tf

    def message() -> str:
        with tf.Graph().as_default(), pytest.raises(Exception) as caught:
            model.train_on_batch(X, Y)
        return f"{caught.type.__name__}: {caught.value}"

    model = make_model()
    model.train_on_batch(X, Y)
    wanted = message()
    watched = watch(9)
    model.train_on_batch(X, Y)
    assert message() == wanted
    (training,) = watched.trainings()
    assert training.steps == 1


@pytest.mark.parametrize(
    ("result", "loss"),
    [
        ({"accuracy": 0.5, "loss": 2.0}, 2.0),
        ({"d_loss": 3.0, "g_loss": 1.0}, 3.0),
        ([4.0, 0.5], 4.0),
        ({"losses": ([5.0, 1.0], 2.0)}, 5.0),
        (np.float32(6), 6.0),
        ([], math.nan),
        ({}, math.nan),
        (None, math.nan),
    ],
)
def test_the_loss_is_the_first_number(result, loss):
    assert _loss(result) == pytest.approx(loss, nan_ok=True)
