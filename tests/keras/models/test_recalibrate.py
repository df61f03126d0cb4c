"""recalibrate: equal to float64 statistics of what each batch norm saw, for every kind of layer, model and data."""

from __future__ import annotations

import keras
import keras_models
import numpy as np
import pytest
import tensorflow as tf
from bnfast.keras import (
    BatchNormalization,
    BatchNormalizationAdd,
    ConditionalBatchNormalization,
    accelerate,
    diagnose,
    recalibrate,
)
from keras import layers as L
from model_state import state
from needs import need_module

KERAS = keras.layers.BatchNormalization
RNG = np.random.default_rng(5)


def quiet(model, data, **kwargs):
    return recalibrate(model, data, verbose=0, **kwargs)


def statistics(layer):
    return [np.asarray(getattr(layer, name)).astype("float64") for name in ("moving_mean", "moving_variance")]


def same(layer, x, axis=-1, correction=0, rtol=1e-6):
    """The layer's moving statistics are those of x in float64."""
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1).reshape(-1, x.shape[axis])
    mean, variance = statistics(layer)
    np.testing.assert_allclose(variance, x.var(0, ddof=correction), rtol=rtol, atol=1e-12)
    assert np.abs((mean - x.mean(0)) / x.std(0)).max() < rtol


@pytest.fixture
def x():
    return RNG.normal(3, 2, (300, 6)).astype("float32")


def dense_net(norm=KERAS, **kwargs):
    first, second = (norm(name=name, **kwargs) for name in ("first", "second"))
    return keras.Sequential([keras.Input((6,)), L.Dense(8), first, L.ReLU(), L.Dense(3), second])


@pytest.fixture(scope="module")
def digits():
    load = need_module("sklearn.datasets").load_digits
    x, y = load(return_X_y=True)
    return (x / 16).astype("float32").reshape(-1, 8, 8, 1), y


@pytest.mark.parametrize("norm", [KERAS, BatchNormalization])
def test_48_updates_at_momentum_099(digits, norm):
    x, y = digits[0][:1437], digits[1][:1437]
    keras.utils.set_random_seed(0)
    conv = [L.Conv2D(filters, 3, padding="same") for filters in (32, 32, 64)]
    blocks = [layer for one in conv for layer in (one, norm(), L.ReLU())]
    head = [L.Dropout(0.2), L.GlobalAveragePooling2D(), L.Dense(10)]
    model = keras.Sequential([keras.Input((8, 8, 1)), *blocks, *head])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
    rows = np.concatenate([np.random.default_rng(i).permutation(len(x)) for i in range(3)])[: 48 * 64]
    model.fit(x[rows], y[rows], batch_size=64, shuffle=False, verbose=0)
    assert int(model.optimizer.iterations) == 48
    training = np.mean([
        np.mean(np.argmax(model(x[i : i + 64], training=True), -1) == y[i : i + 64]) for i in range(0, 1408, 64)
    ])  # fmt: skip
    for layer in model.layers:  # these calls have updated the statistics 22 times
        if isinstance(layer, KERAS):
            layer.moving_mean.assign(0.6 * np.asarray(layer.moving_mean))
    before = model.evaluate(x, y, verbose=0)[1]
    found = quiet(model, x)
    after = model.evaluate(x, y, verbose=0)[1]
    assert before < 0.6
    assert after >= 0.99 * training
    assert (found.samples, found.batches, len(found.rows)) == (1437, 6, 3)
    same(model.layers[1], model.layers[0](x))
    assert str(found).startswith(f"{model.name}: 3 batch norms recalibrated from 1437 samples in 6 batches")


def test_every_layer_is_exact_with_sequential(x):
    model = keras_models.randomize(dense_net())
    quiet(model, x, sequential=True)
    for layer in (model.layers[1], model.layers[4]):
        same(layer, keras.Model(model.inputs, layer.input).predict(x, verbose=0))


def test_one_pass_gives_later_layers_what_training_gives_them(x):
    """One batch: then what training gives is known."""
    model = keras_models.randomize(dense_net())
    quiet(model, x, batch_size=len(x))
    h = np.asarray(model.layers[0](x), np.float64)
    normed = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-3) * np.asarray(model.layers[1].gamma) + model.layers[1].beta
    same(model.layers[4], model.layers[3](np.maximum(normed, 0).astype("float32")))


@pytest.mark.parametrize("estimator", ["population", "average"])
def test_torch_is_the_oracle(need, x, estimator):
    torch = need("torch")
    model = keras.Sequential([keras.Input((6,)), L.Dense(8), BatchNormalization(correction=1)])
    kernel, bias = map(np.asarray, model.layers[0].weights)
    linear, norm = torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(kernel.T.copy()))
        linear.bias.copy_(torch.from_numpy(bias))
    net, parts = torch.nn.Sequential(linear, norm), np.array_split(x, 7)
    quiet(model, iter(parts), estimator=estimator)
    if estimator == "average":
        torch.optim.swa_utils.update_bn([torch.from_numpy(p) for p in parts], net)
        theirs = [norm.running_mean.numpy(), norm.running_var.numpy()]
    else:  # fvcore's PreciseBN: E[x^2] - E[x]^2 of all batches; its correction is of all values here
        h = [linear(torch.from_numpy(p)).detach().double() for p in parts]
        mean = sum(len(p) * p.mean(0) for p in h) / len(x)
        square = sum(len(p) * (p**2).mean(0) for p in h) / len(x)
        theirs = [mean.numpy(), ((square - mean**2) * len(x) / (len(x) - 1)).numpy()]
    for mine, wanted in zip(statistics(model.layers[-1]), theirs, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=2e-6, atol=2e-6)


def test_cuts_do_not_matter_to_the_first_layer(x):
    model = dense_net()
    found = []
    for data in (x, iter(np.array_split(x, 11)), tf.data.Dataset.from_tensor_slices(x).batch(7), [x]):
        quiet(model, data)
        found.append(np.array(statistics(model.layers[1])))
    for one in found[1:]:
        np.testing.assert_allclose(one, found[0], rtol=1e-6)


# ---- what is left as it was ------------------------------------------------------------------------------------------


class Counter(L.Layer):
    """Counts its calls, in inference too, and adds a loss."""

    def build(self, shape):
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.count.assign_add(1.0)
        self.add_loss(keras.ops.mean(x))
        return x


def test_nothing_but_moving_statistics_changes(x):
    inputs = keras.Input((6,))
    h = L.Dropout(0.5, seed=3)(KERAS(name="bn")(L.Dense(4)(inputs)), training=True)
    model = keras.Model(inputs, L.Dense(1)(Counter()(L.GaussianNoise(1.0)(L.LayerNormalization()(h)))))
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(x, x[:, :1], epochs=1, verbose=0)
    model.predict(x, verbose=0)
    before = state(model)
    quiet(model, x)
    after = state(model)
    changed = {name for name in before if before[name] != after[name]}
    assert {name.split(" ")[1] for name in changed} == {"bn/moving_mean", "bn/moving_variance"}


@pytest.mark.parametrize("kind", ["nan in data", "interrupt", "late"])
def test_an_error_changes_nothing(x, kind):
    model = keras_models.randomize(dense_net())

    def data():
        yield x[:50]
        if kind == "interrupt":
            raise KeyboardInterrupt
        if kind == "late":
            raise OSError("the disk is gone")
        yield np.full((3, 6), np.nan, "float32")

    before = state(model)
    with pytest.raises({"nan in data": ValueError, "interrupt": KeyboardInterrupt, "late": OSError}[kind]):
        quiet(model, data())
    assert state(model) == before


@pytest.mark.parametrize("eager", [False, True])
def test_overflow_inside_is_named(x, eager):
    model = keras.Sequential([keras.Input((6,)), L.Dense(4, name="big"), KERAS(name="sees_inf")])
    model.get_layer("big").kernel.assign(np.full((6, 4), 3e38, "float32"))
    model.compile(run_eagerly=eager)
    before = state(model)
    with pytest.raises(FloatingPointError, match=r"^layer sees_inf sees NaN or Inf in batch 1 \(float32\), though"):
        quiet(model, x)
    assert state(model) == before


def test_statistics_that_do_not_fit_are_named():
    """Values that float16 holds, with a variance that it doesn't."""
    model = keras.Sequential([keras.Input((6,)), KERAS(dtype="float16", name="small")])
    before = state(model)
    with pytest.raises(FloatingPointError, match=r"^the new statistics of layer small don't fit in float16$"):
        quiet(model, RNG.normal(0, 1e3, (50, 6)).astype("float32"))
    assert state(model) == before


def test_an_interrupted_assignment_is_undone(x):
    model = keras_models.randomize(dense_net())
    before, last = state(model), model.layers[-1].moving_variance

    def interrupted(value):
        del vars(last)["assign"]
        raise KeyboardInterrupt

    vars(last)["assign"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        quiet(model, x)
    assert state(model) == before


# ---- kinds of layers -------------------------------------------------------------------------------------------------


def test_frozen_layers_stay_unless_named(x):
    model = keras_models.randomize(dense_net())
    first, second = model.layers[1], model.layers[4]
    first.trainable = False
    before = statistics(first)
    found = quiet(model, x)
    np.testing.assert_array_equal(statistics(first), before)
    assert [row.name for row in found.rows] == ["second"]
    assert "frozen" in found.left["first"]
    same(second, keras.Model(model.inputs, second.input).predict(x, verbose=0))  # the frozen one used its own
    quiet(model, x, layers=["first"])
    same(first, model.layers[0](x))
    model.trainable = False
    with pytest.raises(ValueError, match="frozen"):
        quiet(model, x)


def test_update_statistics_false_is_frozen(x):
    model = keras.Sequential(
        [keras.Input((6,)), BatchNormalization(name="a", update_statistics=False), KERAS(name="b")]
    )
    assert [row.name for row in quiet(model, x).rows] == ["b"]


@pytest.mark.parametrize("norm", [KERAS, BatchNormalization])
def test_renorm(x, norm):
    model = keras.Sequential([keras.Input((6,)), norm(renorm=True)])
    quiet(model, x)
    layer = model.layers[0]
    stddev = np.sqrt(x.astype("float64").var(0) + 1e-3)
    same(layer, x, rtol=2e-6)
    for name, wanted in (("moving_stddev", stddev), ("renorm_stddev", stddev), ("renorm_mean", x.mean(0, "float64"))):
        np.testing.assert_allclose(np.asarray(getattr(layer, name)), wanted, rtol=1e-6)


def test_renorm_average_is_what_keras_averages(x):
    parts = np.array_split(x, 5)
    model = keras.Sequential([keras.Input((6,)), KERAS(renorm=True)])
    quiet(model, iter(parts), estimator="average")
    stddev = np.mean([np.sqrt(p.astype("float64").var(0) + 1e-3) for p in parts], 0)
    np.testing.assert_allclose(np.asarray(model.layers[0].moving_stddev), stddev, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(model.layers[0].moving_variance), stddev**2 - 1e-3, rtol=1e-5)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
def test_ghosts(x, grouping, eager):
    model = keras.Sequential(
        [keras.Input((6,)), BatchNormalization(virtual_batch_size=10, virtual_batch_grouping=grouping)]
    )
    model.compile(run_eagerly=eager)
    quiet(model, x)
    same(model.layers[0], x)
    quiet(model, iter([x]), estimator="average")
    ghosts = x.reshape(30, 10, 6) if grouping == "contiguous" else x.reshape(10, 30, 6).swapaxes(0, 1)
    wanted = ghosts.astype("float64").var(1).mean(0)
    np.testing.assert_allclose(np.asarray(model.layers[0].moving_variance), wanted, rtol=1e-6)
    of_ghosts = np.repeat([1, 0, 3], 10)  # a ghost without weight doesn't count
    weights = np.repeat(of_ghosts, 10) if grouping == "contiguous" else np.tile(of_ghosts, 10)
    quiet(model, iter([(x, None, weights)]), estimator="average", use_sample_weight=True)
    wanted = ghosts[of_ghosts > 0].astype("float64").mean((0, 1))
    np.testing.assert_allclose(np.asarray(model.layers[0].moving_mean), wanted, rtol=1e-5)


def test_average_of_all_batches_counts_them(x):
    model = keras.Sequential([keras.Input((6,)), BatchNormalization(momentum=None)])
    model.compile("sgd", "mse")
    model.fit(x, x, epochs=1, verbose=0)
    quiet(model, iter(np.array_split(x, 4)))
    same(model.layers[0], x)
    assert int(model.layers[0].batches) == 4


@pytest.mark.parametrize("norm", [KERAS, BatchNormalization])
@pytest.mark.parametrize(("shape", "axis"), [((5, 4), 1), ((5, 4), 2), ((3, 4, 2), 1), ((3, 4, 2), -1)])
def test_axes(norm, shape, axis):
    x = RNG.normal(1, 3, (20, *shape)).astype("float32")
    model = keras.Sequential([keras.Input(shape), norm(axis=axis)])
    quiet(model, x)
    same(model.layers[0], x, axis)


@pytest.mark.parametrize("axis", [[1, 2], [1, 3]])
def test_several_axes(axis):
    x = RNG.normal(1, 3, (20, 3, 4, 2)).astype("float32")
    model = keras.Sequential([keras.Input((3, 4, 2)), BatchNormalization(axis=axis)])
    quiet(model, x)
    rest = tuple(i for i in range(4) if i not in axis)
    wanted = x.astype("float64").var(rest, keepdims=True)
    np.testing.assert_allclose(np.asarray(model.layers[0].moving_variance), wanted, rtol=1e-6)


@pytest.mark.parametrize("norm", [KERAS, BatchNormalization])
def test_masked_steps_do_not_count(norm):
    x = RNG.normal(2, 3, (30, 7, 4)).astype("float32")
    lengths = RNG.integers(1, 8, 30)
    for row, length in zip(x, lengths, strict=True):
        row[length:] = 0
    model = keras.Sequential([keras.Input((7, 4)), L.Masking(), norm()])
    found = quiet(model, x)
    same(model.layers[-1], np.concatenate([row[:n] for row, n in zip(x, lengths, strict=True)]))
    assert found.rows[0].count == lengths.sum()


@pytest.mark.parametrize("norm", [KERAS, BatchNormalization])
def test_a_mask_along_the_channels_is_refused(norm):
    """The attached mask is (N, 4), of the axes 0 and 1, the second of which is the channel axis."""
    inputs = keras.Input((4, 4))
    model = keras.Model(inputs, norm(axis=1, name="bn")(L.Masking()(inputs)))
    x = RNG.normal(2, 3, (10, 4, 4)).astype("float32")
    x[::3, 2:] = 0
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"layer bn has a mask that varies along its channel axis \(1, "):
        quiet(model, x)
    for value, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_a_model_that_is_masked_everywhere_is_an_error(eager, sequential):
    model = keras.Sequential([keras.Input((7, 4)), L.Masking(), KERAS(name="bn")])
    model.compile(run_eagerly=eager)
    with pytest.raises(ValueError, match="bn saw no values"):
        quiet(model, np.zeros((5, 7, 4), "float32"), sequential=sequential)


@pytest.mark.parametrize("eager", [False, True])
def test_sample_weights(x, eager):
    model = dense_net()
    model.compile(run_eagerly=eager)
    weights = RNG.integers(0, 3, len(x))
    quiet(model, (x, None, weights), use_sample_weight=True)
    same(model.layers[1], np.repeat(np.asarray(model.layers[0](x)), weights, 0))
    quiet(model, (x, None, weights))
    same(model.layers[1], model.layers[0](x))
    with pytest.raises(ValueError, match="use_sample_weight"):
        quiet(model, x, use_sample_weight=True)
    with pytest.raises(ValueError, match="finite numbers"):
        quiet(model, (x, None, weights - 1.0), use_sample_weight=True)
    rows = keras.Sequential([keras.Input((6,)), L.Lambda(lambda t: keras.ops.reshape(t, (-1, 3))), KERAS(name="rows")])
    rows.compile(run_eagerly=eager)
    with pytest.raises(ValueError, match=r"^sample weights can't be used: layer rows sees 600 rows for 300 samples$"):
        quiet(rows, (x, None, weights), use_sample_weight=True, batch_size=300)


@pytest.mark.parametrize("eager", [False, True])
def test_sample_weights_and_masks(eager):
    x = RNG.normal(2, 3, (30, 7, 4)).astype("float32")
    x[:15, 4:] = 0
    weights = RNG.integers(0, 3, 30)
    model = keras.Sequential([keras.Input((7, 4)), L.Masking(), KERAS()])
    model.compile(run_eagerly=eager)
    quiet(model, (x, None, weights), use_sample_weight=True)
    repeated = np.repeat(x, weights, 0).reshape(-1, 4)
    same(model.layers[-1], repeated[(repeated != 0).any(-1)])


def test_shared_layers_merge_their_calls(x):
    inputs, shared = [keras.Input((6,)), keras.Input((6,))], KERAS()
    model = keras.Model(inputs, L.Add()([shared(tensor) for tensor in inputs]))
    quiet(model, [x, 2 * x - 7])
    same(shared, np.concatenate([x, 2 * x - 7]))


def test_residual_and_conditional(x):
    inputs, labels = keras.Input((6,)), keras.Input((), dtype="int32")
    add, conditional = BatchNormalizationAdd(activation="relu"), ConditionalBatchNormalization(num_classes=3)
    model = keras.Model([inputs, labels], conditional([add([inputs, inputs]), labels]))
    given = [x, RNG.integers(0, 3, len(x)).astype("int32")]
    quiet(model, given, sequential=True)
    same(add, x)
    same(conditional, np.asarray(add([x, x])))


def test_nested_subclassed_accelerated_and_repeated(x):
    for model in (keras_models.subclassed(), accelerate(dense_net(), verbose=False)):
        given = x[:, :4] if model.name == "block" else x
        found = quiet(model, given)
        assert all(row.count in (300, 600) for row in found.rows)
        assert not any("call" in vars(layer) for layer in model._flatten_layers())
    inner = keras.Sequential([keras.Input((6,)), KERAS(name="inner")])
    outer = keras.Sequential([keras.Input((6,)), inner, L.Dense(2)])
    quiet(outer, x)
    same(inner.layers[0], x)


@pytest.mark.parametrize("steps", [5, None])
def test_time_distributed_and_recurrent(steps):
    x = RNG.normal(1, 2, (12, 5, 3)).astype("float32")
    norm = KERAS()
    model = keras.Sequential([keras.Input((steps, 3)), L.TimeDistributed(norm)])
    quiet(model, x)
    same(norm, x)

    class Cell(L.Layer):
        state_size = output_size = 3

        def __init__(self):
            super().__init__()
            self.norm = KERAS()

        def build(self, shape):
            self.norm.build(shape)

        def call(self, x, states, training=None):
            y = self.norm(x, training=training)
            return y, [y]

    cell = Cell()
    model = keras.Sequential([keras.Input((steps, 3)), L.RNN(cell)])
    quiet(model, x)
    same(cell.norm, x)


def test_training_written_into_the_call_does_not_matter(x):
    inputs, norm = keras.Input((6,)), KERAS()
    for flag in (True, False):
        model = keras.Model(inputs, norm(inputs, training=flag))
        quiet(model, x)
        same(norm, x)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_dtypes(x, policy):
    model = keras.Sequential([keras.Input((6,), dtype="float32"), L.Dense(4, dtype=policy), KERAS(dtype=policy)])
    quiet(model, x)
    same(model.layers[1], np.asarray(model.layers[0](x)).astype("float64"), rtol=1e-6)


def test_a_call_of_the_layers_own(x):
    """A script has replaced the `call` of one layer: it stays, and computes what later layers see."""
    model = dense_net()
    layer = model.layers[1]
    own, flags = layer.call, []

    def doubled(inputs, training=None, mask=None):
        flags.append(training)
        return 2 * own(inputs, training=training, mask=mask)

    layer.call = doubled
    quiet(model, x, batch_size=len(x))
    assert layer.call is doubled
    assert flags[-1] is False
    h = np.asarray(model.layers[0](x), np.float64)
    same(layer, h)
    normed = 2 * (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-3)
    same(model.layers[4], model.layers[3](np.maximum(normed, 0).astype("float32")), rtol=2e-6)


class Told(keras.Model):
    """Passes a tensor on as `training`, and takes inputs of any length."""

    def __init__(self):
        super().__init__()
        self.norm = KERAS(name="bn")

    def call(self, x, training=None):
        return self.norm(x.values, training=tf.reduce_sum(x.values) < 0)


def test_ragged_inputs_and_a_training_flag_that_is_a_tensor(x):
    model = Told()
    model(tf.RaggedTensor.from_row_lengths(x, [100, 200]))
    parts = [
        tf.RaggedTensor.from_row_lengths(x[:50], [20, 30]),
        tf.RaggedTensor.from_row_lengths(x[50:], [150, 50, 50]),
    ]
    found = quiet(model, iter(parts))
    assert (found.samples, found.rows[0].count) == (5, 300)
    same(model.norm, x)
    assert not diagnose(model, iter(parts)).figures.layers[0].always_batch


def test_run_eagerly(x):
    model = dense_net()
    model.compile("sgd", "mse", run_eagerly=True)
    quiet(model, x)
    same(model.layers[1], model.layers[0](x))


class Cell(L.Layer):
    """Normalizes its input, and, with `twice`, its state by the same layer; with `traced`, in a tf.function."""

    state_size = output_size = 3

    def __init__(self, twice=False, traced=False, **kwargs):
        super().__init__(**kwargs)
        self.norm, self.twice = KERAS(), twice
        self.normalize = tf.function(self._normalize, autograph=False) if traced else self._normalize

    def build(self, shape):
        self.norm.build((None, 3))

    def _normalize(self, x):
        return self.norm(x, training=False)

    def call(self, x, states, training=None):
        y = self.normalize(x)
        return y, [self.normalize(states[0] + y) if self.twice else y]


class Mapped(L.Layer):
    def __init__(self):
        super().__init__()
        self.norm = KERAS()

    def build(self, shape):
        self.norm.build((None, 3))

    def call(self, x):
        swapped = keras.ops.transpose(x, [1, 0, 2])
        return keras.ops.transpose(keras.ops.map(self.norm, swapped), [1, 0, 2])


class Within(L.Layer):
    """A cell with an RNN inside: each step runs over the four parts of its input."""

    state_size = output_size = 3

    def __init__(self, inner, traced=False):
        super().__init__()
        self.inner = L.RNN(inner)
        self.run = tf.function(self.inner, autograph=False) if traced else self.inner

    def build(self, shape):
        self.inner.build((None, 4, 3))

    def call(self, x, states):
        y = self.run(keras.ops.reshape(x, [-1, 4, 3]))
        return y, [y]


def bidirectional():
    with keras.utils.custom_object_scope({"Cell": Cell}):
        return L.Bidirectional(L.RNN(Cell()))


LOOPS = {
    "rnn": lambda: L.RNN(Cell(), return_sequences=True),
    "backwards, unrolled": lambda: L.RNN(Cell(), go_backwards=True, unroll=True, return_sequences=True),
    "bidirectional": bidirectional,
    "time distributed": lambda: L.TimeDistributed(KERAS()),
    "map": Mapped,
}


def loop_model(made, eager, width=3):
    model = keras.Sequential([keras.Input((5, width)), made])
    model.compile(run_eagerly=eager)
    return model, [layer for layer in model._flatten_layers() if isinstance(layer, KERAS)]


@pytest.mark.parametrize("kind", LOOPS)
def test_each_step_counts_once_eagerly_too(kind):
    """Keras's loops call once more, for the shape of the output. Steps differ, so that a wrong count shows."""
    x = (RNG.normal(1, 2, (20, 5, 3)) + 3 * np.arange(5)[:, None]).astype("float32")
    for eager in (False, True):
        model, layers = loop_model(LOOPS[kind](), eager)
        rows = quiet(model, x, batch_size=8).rows  # three batches, the last of 4
        assert [row.count for row in rows] == [100] * len(layers)
        for layer in layers:
            same(layer, x)


class OutputCell(L.SimpleRNNCell):
    """Only its output is normalized, so that of an RNN's last output all other steps' are read by nobody."""

    def __init__(self, units):
        super().__init__(units)
        self.norm = KERAS()

    def call(self, x, states, training=False):
        y, states = super().call(x, states)
        return self.norm(y, training=training), states


@pytest.mark.parametrize("unroll", [False, True])
def test_steps_whose_output_nobody_reads_count_as_in_training(unroll):
    x = RNG.normal(1, 2, (16, 5, 3)).astype("float32")
    for eager in (False, True):
        for sequences in (False, True):
            model, _ = loop_model(L.RNN(OutputCell(4), unroll=unroll, return_sequences=sequences), eager)
            with pytest.raises(ValueError, match=r"layer .* is not built, although the model is"):
                quiet(model, x)
            model(x)
            assert quiet(model, x).rows[0].count == 80


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("make", [lambda: L.RNN(Cell(twice=True)), lambda: L.RNN(Within(Cell()))])
def test_loops_give_the_same_eagerly_and_in_a_graph(make, masked):
    """The same layer twice in a step, and a loop in a loop; masks of the steps are not the cell's."""
    width = 3 if isinstance(make().cell, Cell) else 12
    x = RNG.normal(1, 2, (16, 5, width)).astype("float32")
    x[:5, 2:] = 0
    found = []
    for eager in (False, True):
        made = keras.Sequential([keras.Input((5, width)), *([L.Masking()] if masked else []), make()])
        made.compile(run_eagerly=eager)
        (layer,) = (layer for layer in made._flatten_layers() if isinstance(layer, KERAS))
        rows = quiet(made, x).rows
        figures = diagnose(made, x).figures.layers[0]
        found.append((rows[0].count, len(figures.sites), *statistics(layer), *figures.sites[-1]))
    assert found[0][:2] == (16 * 5 * (2 if width == 3 else 4), 2 if width == 3 else 1)
    for graph, eager in zip(*found, strict=True):
        np.testing.assert_allclose(eager, graph, rtol=1e-6, atol=1e-7)


def test_one_rnn_for_two_inputs_has_two_places():
    """diagnose must see that a layer gets two distributions, whose calls are two runs of one loop."""
    first, second = RNG.normal(0, 1, (40, 5, 3)).astype("float32"), RNG.normal(8, 1, (40, 5, 3)).astype("float32")
    for eager in (False, True):
        a, b, shared = keras.Input((5, 3)), keras.Input((5, 3)), L.RNN(Cell())
        model = keras.Model([a, b], [shared(a), shared(b)])
        model.compile(run_eagerly=eager)
        (row,) = diagnose(model, [first, second]).figures.layers
        expected = [x.astype("float64").reshape(-1, 3) for x in (first, second)]
        places = sorted(row.sites, key=lambda place: place[0][0])  # Keras may call for the second input first
        np.testing.assert_allclose([mean for mean, _ in places], [x.mean(0) for x in expected], atol=1e-5)
        np.testing.assert_allclose([variance for _, variance in places], [x.var(0) for x in expected], rtol=1e-5)


@pytest.mark.parametrize("make", [lambda: Cell(traced=True), lambda: Within(Cell(), traced=True)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_tf_function_in_a_loop_is_right_or_refused(make, masked):
    """One trace of it serves the steps and the call for the shape, so that the two can't be told apart. In a graph
    without masks and inner loops the latter is pruned."""
    x = RNG.normal(1, 2, (8, 5, 3 if isinstance(make(), Cell) else 12)).astype("float32")
    for eager in (True, False):
        model = keras.Sequential([keras.Input(x.shape[1:]), *([L.Masking()] if masked else []), L.RNN(make())])
        model.compile(run_eagerly=eager)
        if not eager and not masked and x.shape[-1] == 3:
            assert quiet(model, x).rows[0].count == 40
            continue
        before = state(model)
        for call in (quiet, diagnose):
            with pytest.raises(RuntimeError, match=r"^layer batch_normalization.* a tf.function inside the loop"):
                call(model, x)
            assert state(model) == before


def test_under_a_strategy(x):
    """Variables that a strategy mirrors: all copies get the result. (One logical device is enough to mirror.)"""
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = keras_models.randomize(dense_net())
    for scope in (False, True):
        model.layers[1].moving_mean.assign(np.ones(8))
        if scope:
            with strategy.scope():
                quiet(model, x)
        else:
            quiet(model, x)
        same(model.layers[1], model.layers[0](x))


# ---- kinds of data ---------------------------------------------------------------------------------------------------


class Pages(keras.utils.PyDataset):
    def __init__(self, x):
        super().__init__()
        self.x = x

    def __len__(self):
        return 4

    def __getitem__(self, i):
        part = np.array_split(self.x, 4)[i]
        return part, part[:, :1]


def test_data(x):
    inputs = {"a": keras.Input((6,), name="a"), "b": keras.Input((6,), name="b")}
    norms = KERAS(name="na"), KERAS(name="nb")
    model = keras.Model(inputs, L.Add()([norms[0](inputs["a"]), norms[1](inputs["b"])]))
    given = {"a": x, "b": -x}
    for data in (given, (given, x), tf.data.Dataset.from_tensor_slices((given, x)).batch(32), iter([(given, x)])):
        quiet(model, data)
        same(norms[0], x)
        same(norms[1], -x)
    with pytest.raises(ValueError, match="lacks the input 'b'"):
        quiet(model, {"a": x, "c": x})
    plain = dense_net()
    for data in (Pages(x), tf.constant(x), [x], (x, x), (x,), x.astype("float64")):
        quiet(plain, data)
        same(plain.layers[1], plain.layers[0](x))


def test_a_torch_loader(need, x):
    torch = need("torch")
    pairs = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.zeros(len(x)))
    model = dense_net()
    quiet(model, torch.utils.data.DataLoader(pairs, batch_size=50))
    same(model.layers[1], model.layers[0](x))


def test_batches_and_data_without_an_end(x):
    model = dense_net()
    endless = tf.data.Dataset.from_tensor_slices(x).batch(10).repeat()
    with pytest.raises(ValueError, match="no end"):
        quiet(model, endless)
    found = quiet(model, endless, batches=3)
    assert (found.batches, found.samples) == (3, 30)
    same(model.layers[1], np.asarray(model.layers[0](x[:30])))
    pairs = tf.data.Dataset.from_tensor_slices(((x, x), x)).batch(32)
    two = [keras.Input((6,)), keras.Input((6,))]
    norm = KERAS()
    quiet(keras.Model(two, norm(L.Add()(two))), pairs)
    same(norm, 2 * x)


class Endless(Pages):
    __len__ = None

    @property
    def num_batches(self):
        return None


def test_pages_without_an_end_and_empty_batches(x):
    model = dense_net()
    with pytest.raises(ValueError, match=r"^data has no end: say how many batches to use, with batches=$"):
        quiet(model, Endless(x))
    found = quiet(model, Endless(x), batches=3)
    assert (found.batches, found.samples) == (3, 225)
    same(model.layers[1], model.layers[0](x[:225]))
    found = quiet(model, iter([x[:0], x[:50], x[:0], x[50:]]))
    assert (found.batches, found.samples) == (2, 300)
    same(model.layers[1], model.layers[0](x))


def test_a_distributed_dataset_is_refused(x):
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    data = strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensor_slices(x).batch(10))
    words = r"^data must be a plain tf\.data\.Dataset\. Received: one that a strategy distributes$"
    with pytest.raises(TypeError, match=words):
        quiet(dense_net(), data)


def test_a_fixed_batch_size(x):
    model = keras.Sequential([keras.Input(batch_shape=(50, 6)), KERAS()])
    quiet(model, x)
    same(model.layers[0], x)


# ---- bad input -------------------------------------------------------------------------------------------------------


class Unbuilt(keras.Model):
    def call(self, x):
        return x


@pytest.mark.parametrize(
    ("model", "data", "kwargs", "error", "words"),
    [
        (None, np.zeros((0, 6), "float32"), {}, ValueError, "empty"),
        (None, iter([]), {}, ValueError, "empty"),
        (None, tf.data.Dataset.from_tensor_slices(np.zeros((4, 6))), {}, ValueError, "no batches"),
        (None, np.full((9, 6), np.inf), {}, ValueError, "NaN or Inf"),
        (None, [np.zeros((4, 6)), np.zeros((4, 6))], {}, ValueError, "1 inputs"),
        (None, (np.zeros((4, 6)), np.zeros(3)), {}, ValueError, "same number"),
        (None, (), {}, ValueError, r"^data as a tuple must be .* several inputs .*\. Received: a tuple of 0$"),
        (None, (np.zeros((4, 6)),) * 4, {}, ValueError, r"^data as a tuple must be .*\. Received: a tuple of 4$"),
        (None, iter([(np.zeros((4, 6)),) * 4]), {}, ValueError, r"^a batch of data must be .* Received: a tuple of 4$"),
        (None, [], {}, ValueError, r"^data is empty: it holds no array$"),
        (None, {}, {}, ValueError, r"^data is empty: it holds no array$"),
        (None, np.full((4, 6), "a"), {}, ValueError, r"^input .* must hold numbers\. Received: dtype <U1$"),
        (
            None,
            [np.float32(3)],
            {},
            ValueError,
            "^data must have samples along its first axis. Received: an array of r",
        ),
        (None, "x", {}, TypeError, "data must"),
        (None, 3, {}, TypeError, "data must"),
        (None, iter([np.zeros((4, 6))]), {"sequential": True}, ValueError, "sequential"),
        (None, np.zeros((4, 6)), {"layers": "nothing"}, ValueError, "layers must name batch norms"),
        (None, np.zeros((4, 6)), {"layers": []}, ValueError, "at least one"),
        (None, np.zeros((4, 6)), {"layers": 3}, TypeError, "layers must be"),
        (None, np.zeros((4, 6)), {"estimator": "median"}, ValueError, "estimator"),
        (None, np.zeros((4, 6)), {"batches": 0}, ValueError, "batches"),
        (None, np.zeros((4, 6)), {"batch_size": 2.5}, ValueError, "batch_size"),
        (None, tf.data.Dataset.range(3), {"batch_size": 2}, ValueError, "batch_size is for arrays"),
        ("none", np.zeros((4, 6)), {}, ValueError, "no batch norm"),
        ("unbuilt", np.zeros((4, 6)), {}, ValueError, "not built"),
        ("layer", np.zeros((4, 6)), {}, TypeError, "keras.Model"),
    ],
)
def test_bad_input(model, data, kwargs, error, words):
    models = {
        None: dense_net,
        "none": lambda: keras.Sequential([keras.Input((6,)), L.Dense(2)]),
        "unbuilt": lambda: keras.Sequential([KERAS()]),
        "layer": KERAS,
    }
    given = models[model]()
    before = state(given) if model in (None, "none") else None
    with pytest.raises(error, match=words):
        quiet(given, data, **kwargs)
    if before is not None:
        assert state(given) == before
