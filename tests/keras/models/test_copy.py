"""duplicate: the copy equals the model in everything, shares no state with it, and trains in the same way."""

import collections
import functools
import gc
import pickle
import threading
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalization, fold, to_keras
from bnfast.keras.models.copy import duplicate
from bnfast.keras.models.object_copy import ObjectCopier
from keras import layers as L
from tensorflow.python.ops.resource_variable_ops import UninitializedVariable

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 6, 6, 2)).astype("float32")
Y = RNG.normal(size=(12, 3)).astype("float32")


def two_branches() -> Any:
    x = keras.Input((6, 6, 2))
    branches = [L.BatchNormalization()(L.Conv2D(4, 3, padding="same")(x)) for _ in range(2)]
    h = L.Concatenate()([L.ReLU()(branch) for branch in branches])
    return keras.Model(x, L.Dense(3)(L.Dropout(0.3)(L.Flatten()(h))))


class Containers(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = 10.0
        self.blocks = [L.Dense(4), L.BatchNormalization()]
        self.heads = {"a": L.Dense(3), "b": [L.Dense(3), {"c": L.Dropout(0.2)}]}
        self.pair = (L.Dense(2), "name")
        self.flatten = L.Flatten()

    def call(self, x: Any, training: bool = False) -> Any:
        x = self.flatten(x)
        for block in self.blocks:
            x = block(x, training=training) if isinstance(block, L.BatchNormalization) else block(x)
        first, tail = self.heads["b"]
        y = self.heads["a"](x) + tail["c"](first(x), training=training)
        self.add_loss(keras.ops.mean(self.pair[0](x) ** 2))
        return y / self.temperature


def nested() -> Any:
    inner = keras.Sequential([keras.Input((6, 6, 2)), L.Conv2D(2, 3, padding="same"), L.BatchNormalization()])
    x = keras.Input((6, 6, 2))
    middle = keras.Model(x, L.ReLU()(inner(x)) + x, name="middle")
    y = keras.Input((6, 6, 2))
    return keras.Model(y, L.Dense(3)(L.Flatten()(middle(middle(y)))))


def shared() -> Any:
    norm, dense = L.BatchNormalization(), L.Dense(5, kernel_regularizer="l2", activity_regularizer="l1")
    x = keras.Input((6, 6, 2))
    h = L.Flatten()(x)
    return keras.Model(x, L.Dense(3)(L.Add()([norm(dense(h)), norm(dense(-h))])))


def time_distributed() -> Any:
    x = keras.Input((6, 6, 2))
    h = L.TimeDistributed(L.BatchNormalization())(L.TimeDistributed(L.Conv1D(3, 2))(x))
    return keras.Model(x, L.Dense(3)(L.Flatten()(h)))


class Cell(L.Layer):
    def __init__(self, units: int) -> None:
        super().__init__()
        self.state_size = units
        self.dense, self.norm = L.Dense(units), L.BatchNormalization()

    def build(self, shape: Any) -> None:
        self.dense.build((None, shape[-1] + self.state_size))
        self.norm.build((None, self.state_size))

    def call(self, x: Any, states: Any) -> Any:
        y = keras.ops.tanh(self.norm(self.dense(keras.ops.concatenate([x, states[0]], -1))))
        return y, [y]


def recurrent() -> Any:
    x = keras.Input((6, 6, 2))
    h = L.Masking()(L.Reshape((6, 12))(x))
    h = L.Bidirectional(L.GRU(3, return_sequences=True, dropout=0.2))(h)
    return keras.Model(x, L.Dense(3)(L.RNN(Cell(4))(h)))


class Scaled(keras.Model):
    """A Functional subclass with a required constructor argument."""

    def __init__(self, units: int) -> None:
        x = keras.Input((6, 6, 2))
        h = L.BatchNormalization(name="norm")(L.Conv2D(units, 3, name="conv")(x))
        super().__init__(inputs=x, outputs=L.Dense(3)(L.Flatten()(h)))
        self.temperature = 1.0
        self.norm = self.get_layer("norm")

    def call(self, x: Any, training: Any = None, mask: Any = None) -> Any:
        return super().call(x, training=training, mask=mask) / self.temperature

    def predict_step(self, data: Any) -> Any:
        return super().predict_step(data) + 100.0


def scaled() -> Any:
    model = Scaled(4)
    model.temperature = 10.0
    return model


def residuals() -> Any:
    x = keras.Input((6, 6, 2))
    h = x
    for _ in range(3):
        h = keras.ops.relu(L.BatchNormalization()(L.Conv2D(2, 3, padding="same")(h)) * 0.5 + h)
    return keras.Model(x, L.Dense(3)(keras.ops.mean(h, axis=(1, 2))))


class Custom(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm, self.out = L.Dense(4), L.BatchNormalization(), L.Dense(3)
        self.seen = keras.metrics.Mean(name="seen")

    def call(self, x: Any, training: bool = False) -> Any:
        return self.out(self.norm(self.dense(keras.ops.reshape(x, (-1, 72))), training=training))

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            loss = keras.ops.mean((self(x, training=True) - y) ** 2)
        weights = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        self.seen.update_state(loss)
        return {"seen": self.seen.result()}


def sequential() -> Any:
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            L.Conv2D(3, 3),
            L.BatchNormalization(),
            L.ReLU(),
            L.Flatten(),
            L.Dropout(0.5),
            L.Dense(3),
        ]
    )


MODELS: list[Callable[[], Any]] = [
    two_branches, Containers, nested, shared, time_distributed, recurrent, scaled, residuals, Custom, sequential,
]  # fmt: skip


def made(make: Callable[[], Any], *, fitted: bool = True, **options: Any) -> Any:
    keras.utils.set_random_seed(3)
    model = make()
    model(X)
    if fitted:
        metrics = None if make is Custom else ["mae"]
        model.compile(**{"optimizer": "adam", "loss": "mse", "metrics": metrics, **options})
        fit(model)
    return model


def fit(model: Any) -> Any:
    # TensorFlow optimizes a function that is traced again differently: both models trace theirs.
    model.make_train_function(force=True)
    return model.fit(X, Y, batch_size=4, shuffle=False, verbose=0).history


def state(model: Any, saved: bool = False) -> list[Any]:
    """Every value that training changes. saved: without metrics, which are not saved."""
    variables = list(model.weights if saved else model.variables)
    if model.compiled and not saved:
        variables += model.optimizer.variables
        variables += [variable for metric in model.metrics for variable in metric.variables]
    return variables


def values(model: Any, saved: bool = False) -> list[Any]:
    return [(v.path, v.trainable, str(v.dtype), v.numpy()) for v in state(model, saved)]


def same(a: list[Any], b: list[Any], paths: bool = True) -> bool:
    first = 0 if paths else 1
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(p[first:3] == q[first:3] and np.array_equal(p[3], q[3]) for p, q in pairs)


def check_equal(model: Any, copy: Any) -> None:
    assert type(copy) is type(model)
    assert same(values(model), values(copy))
    assert not {id(v) for v in state(model)} & {id(v) for v in state(copy)}
    assert len({id(v) for v in state(model)}) == len({id(v) for v in state(copy)})
    ours, theirs = (list(m._flatten_layers()) for m in (model, copy))
    assert [(type(a), a.name, a.path, a.trainable, a.dtype_policy) for a in ours] == [
        (type(b), b.name, b.path, b.trainable, b.dtype_policy) for b in theirs
    ]
    assert [list(vars(a)) for a in ours] == [list(vars(b)) for b in theirs]
    assert not {id(a) for a in ours} & {id(b) for b in theirs}


@pytest.mark.sample(len(MODELS))
@pytest.mark.parametrize("fitted", [True, False], ids=["fitted", "uncompiled"])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_equal_and_independent(make: Callable[[], Any], fitted: bool) -> None:
    model = made(make, fitted=fitted)
    copy = duplicate(model)
    check_equal(model, copy)
    assert np.array_equal(model(X), copy(X))
    assert getattr(copy, "temperature", None) == getattr(model, "temperature", None)
    if not fitted:
        if make not in (two_branches, Containers):  # the others are fitted in the other case
            return
        for each in (model, copy):
            keras.utils.set_random_seed(5)
            each.compile("sgd", "mse")
    before = values(model)
    history = fit(copy)
    assert same(before, values(model))
    after = values(copy)
    assert fit(model) == history
    assert same(values(model), after, paths=fitted)  # compiled apart, the two optimizers have different names
    assert same(after, values(copy))
    if make is scaled:  # its predict_step differs from its call; the other models would trace it in vain
        assert np.array_equal(model.predict(X, verbose=0), copy.predict(X, verbose=0))
        assert model.predict(X, verbose=0).min() > 50.0


@pytest.mark.parametrize(
    "make", [two_branches, nested, shared, scaled, residuals, sequential], ids=lambda m: m.__name__
)
def test_the_graph_is_connected(make: Callable[[], Any]) -> None:
    model = made(make)
    copy = duplicate(model)
    assert [layer.name for layer in copy.layers] == [layer.name for layer in model.layers]
    assert not {id(t) for t in keras.tree.flatten(model.inputs)} & {id(t) for t in keras.tree.flatten(copy.inputs)}
    for ours, theirs in zip(model.layers, copy.layers, strict=True):
        if isinstance(ours, keras.Model):  # its output is that of its own graph
            continue
        a, b = (keras.Model(m.inputs, layer.output) for m, layer in ((model, ours), (copy, theirs)))
        assert np.array_equal(a(X), b(X))
    if make is not scaled:
        assert copy.get_config() == model.get_config()
    head = keras.Model(copy.inputs, L.Dense(2)(copy.outputs[0]))
    assert head(X).shape == (12, 2)
    assert all(len(a._outbound_nodes) == len(b._outbound_nodes) - (b is copy.layers[-1])
               for a, b in zip(model.layers, copy.layers, strict=True))  # fmt: skip


@pytest.mark.parametrize("make", [two_branches, nested, sequential], ids=lambda m: m.__name__)
def test_saving(make: Callable[[], Any], tmp_path: Path) -> None:
    model = made(make)
    copy = duplicate(model)
    copy.save(tmp_path / "copy.keras")
    check = keras.models.load_model(tmp_path / "copy.keras")
    assert np.array_equal(check(X), model(X))
    assert check.optimizer.iterations == 3
    assert same(values(check, saved=True), values(model, saved=True), paths=False)  # Keras rebuilds with other paths
    copy.save_weights(tmp_path / "copy.weights.h5")
    fresh = make()
    fresh.load_weights(tmp_path / "copy.weights.h5")
    assert np.array_equal(fresh(X), model(X))
    model.save_weights(tmp_path / "model.weights.h5")
    fit(copy)
    copy.load_weights(tmp_path / "model.weights.h5")
    assert same(values(copy, saved=True), values(model, saved=True))
    assert np.array_equal(pickle.loads(pickle.dumps(copy))(X), model(X))


@pytest.mark.parametrize("make", [Custom, scaled], ids=lambda m: m.__name__)
def test_checkpoints_go_both_ways(make: Callable[[], Any], tmp_path: Path) -> None:
    model = made(make)
    copy = duplicate(model)
    expected, steps = values(model, saved=True), int(model.optimizer.iterations)
    place = tf.train.Checkpoint(model=model).write(str(tmp_path / "model"))
    fit(copy)
    tf.train.Checkpoint(model=copy).read(place).assert_existing_objects_matched()
    assert same(expected, values(copy, saved=True))
    assert copy.optimizer.iterations == steps
    place = tf.train.Checkpoint(model=copy).write(str(tmp_path / "copy"))
    fit(model)
    tf.train.Checkpoint(model=model).read(place).assert_existing_objects_matched()
    assert same(expected, values(model, saved=True))
    assert same(expected, values(duplicate(copy), saved=True))


def small() -> Any:
    return keras.Sequential([keras.Input((6, 6, 2)), L.Flatten(), L.BatchNormalization(), L.Dense(3)])


def excluding() -> Any:
    optimizer = keras.optimizers.AdamW(0.01, use_ema=True, ema_overwrite_frequency=2, clipnorm=1.0)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma"])
    return optimizer


OPTIMIZERS: list[Callable[[], Any]] = [
    lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5), momentum=0.9),
    excluding,
    lambda: keras.optimizers.Muon(0.01),
    lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
    lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_optimizers(make: Callable[[], Any]) -> None:
    model = made(small, optimizer=make())
    copy = duplicate(model)
    check_equal(model, copy)
    assert fit(copy) == fit(model)
    assert same(values(model), values(copy))
    assert copy.optimizer.get_config() == model.optimizer.get_config()


def test_after_predict_and_evaluate() -> None:
    model = made(small)
    before = model.predict(X, verbose=0), model.evaluate(X, Y, verbose=0)
    model.fit(X, Y, verbose=0, validation_data=(X, Y), epochs=0)
    copy = duplicate(model)
    assert copy.train_function is copy.test_function is copy.predict_function is None
    assert np.array_equal(copy.predict(X, verbose=0), before[0])
    assert copy.evaluate(X, Y, verbose=0) == before[1]
    assert copy.history.model is copy


def test_weights_that_are_excluded_from_decay_by_identity() -> None:
    model = two_branches()
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.5)
    elsewhere = small().trainable_variables[0]
    optimizer.exclude_from_weight_decay(var_list=[elsewhere, *model.layers[1].trainable_variables])
    model.compile(optimizer, "mse")
    copy = duplicate(model)  # before the optimizer is built
    for variable, other in zip(model.trainable_variables, copy.trainable_variables, strict=True):
        assert optimizer._use_weight_decay(variable) == copy.optimizer._use_weight_decay(other)
    assert fit(copy) == fit(model)


class Compiled(Custom):
    def compile(self, scale: float, teacher: Any, **options: Any) -> None:
        super().compile(**options)
        self.scale, self.options = scale, {"teacher": [teacher]}


def test_compile_arguments_of_the_subclass() -> None:
    model = Compiled()
    model(X)
    teacher = np.arange(3)
    model.compile(3.0, teacher=teacher, optimizer="adam")
    copy = duplicate(model)
    assert copy.scale == 3.0
    assert copy.options["teacher"][0] is not teacher
    assert np.array_equal(copy.options["teacher"][0], teacher)


def test_loss_weights_and_metrics_of_several_outputs() -> None:
    x = keras.Input((6, 6, 2))
    h = L.BatchNormalization()(L.Flatten()(x))
    model = keras.Model(x, {"a": L.Dense(3, name="a")(h), "b": L.Dense(3, name="b")(h)})
    model.compile(
        "adam",
        {"a": "mse", "b": keras.losses.Huber(0.5)},
        loss_weights={"a": 0.3, "b": 2.0},
        metrics={"a": ["mae", keras.metrics.RootMeanSquaredError()]},
    )
    options: Any = {"verbose": 0, "shuffle": False}
    model.fit(X, {"a": Y, "b": Y}, **options)
    copy = duplicate(model)
    check_equal(model, copy)
    for each in (model, copy):
        each.make_train_function(force=True)
    assert copy.fit(X, {"a": Y, "b": Y}, **options).history == model.fit(X, {"a": Y, "b": Y}, **options).history


def test_flags_policies_and_masks() -> None:
    x = keras.Input((5,), dtype="int32")
    h = L.Embedding(7, 4, mask_zero=True)(x)
    h = L.BatchNormalization(dtype="mixed_float16")(h)
    model = keras.Model(x, L.Dense(2)(L.LSTM(3)(h)))
    model.layers[1].trainable = False
    model.layers[-1].kernel.trainable = False
    copy = duplicate(model)
    check_equal(model, copy)
    ids = np.array([[1, 2, 0, 0, 0], [3, 4, 5, 6, 0]])
    assert np.array_equal(model(ids), copy(ids))
    assert len(copy.trainable_weights) == len(model.trainable_weights)


def test_vocabularies_and_normalization() -> None:
    words = np.array([["a b"], ["b c"], ["b"]])
    text = L.TextVectorization(output_mode="tf_idf")
    text.adapt(words)
    lookup = L.StringLookup(vocabulary=["x", "y"])
    pending = L.StringLookup()
    pending.update_state(tf.constant(["u", "v", "v"]))
    normalization = L.Normalization()
    normalization.adapt(X)
    x = keras.Input((1,), dtype="string")
    model = keras.Model(x, [text(x), lookup(x)])
    model.pending, model.normalization = pending, normalization
    copy = duplicate(model)
    for ours, theirs in zip(model(tf.constant(words)), copy(tf.constant(words)), strict=True):
        assert np.array_equal(ours, theirs)
    assert copy.layers[1].get_vocabulary() == model.layers[1].get_vocabulary()
    assert np.array_equal(copy.normalization(X), normalization(X))
    copy.pending.update_state(tf.constant(["u", "u", "u"]))
    copy.pending.finalize_state()
    pending.finalize_state()
    assert (copy.pending.get_vocabulary()[1], pending.get_vocabulary()[1]) == ("u", "v")


class Point(collections.namedtuple("Point", ["layer", "number"])):
    __slots__ = ()


class Helper:
    __slots__ = ("__dict__", "layer")

    def __init__(self, layer: Any) -> None:
        self.layer, self.other = layer, [layer]


def test_python_attributes() -> None:
    model = made(Containers, fitted=False)
    layer = model.blocks[0]
    things = {
        "helper": Helper(layer),
        "point": Point(layer, 3),
        "bound": layer.count_params,
        "part": functools.partial(np.multiply, 2),
        "later": functools.partial(type(layer).count_params, layer),
        "default": collections.defaultdict(list, {"k": [layer]}),
        "ordered": collections.OrderedDict(b=layer, a=1),
        "queue": collections.deque([layer, 2], maxlen=3),
        "frozen": frozenset({layer}),
        "by_layer": {layer: "first"},
        "by_id": {id(layer): "first"},
        "array": np.arange(3),
        "random": np.random.default_rng(7),
        "tf_random": tf.random.Generator.from_seed(1),
        "lock": threading.RLock(),
        "reference": weakref.ref(layer),
        "weak": weakref.WeakKeyDictionary({layer: 1}),
        "double": lambda x, sizes=model.blocks[:0]: 2 * x,
    }
    vars(model).update(things)  # past Keras's tracking
    copy = duplicate(model)
    twin = copy.blocks[0]
    assert copy.helper.layer is twin
    assert copy.helper.other == [twin]
    assert type(copy.point) is Point
    assert copy.point.layer is twin
    assert copy.bound.__self__ is twin
    assert copy.part(3) == 6
    assert copy.later.args == (twin,)
    assert copy.default["new"] == []
    assert copy.default["k"] == [twin]
    assert list(copy.ordered.items()) == [("b", twin), ("a", 1)]
    assert (list(copy.queue), copy.queue.maxlen) == ([twin, 2], 3)
    assert copy.frozen == {twin}
    assert copy.by_layer == {twin: "first"}
    assert copy.by_id == {id(twin): "first"}
    copy.array[0] = 5
    assert model.array[0] == 0
    assert copy.random.normal() == model.random.normal()
    assert np.array_equal(copy.tf_random.normal([2]), model.tf_random.normal([2]))
    assert copy.lock is not model.lock
    assert copy.reference() is twin
    assert dict(copy.weak) == {twin: 1}
    assert copy.double is model.double
    assert "new" not in model.default


def test_other_models_are_left_out() -> None:
    inner = keras.Sequential([keras.Input((6, 6, 2)), L.Conv2D(2, 3), L.BatchNormalization(), L.Flatten()])
    x = keras.Input((6, 6, 2))
    before, after = L.Conv2D(2, 1), L.Dense(3)
    before.secret = L.Lambda(lambda x: after(x))  # could not be copied
    outer = keras.Model(x, after(inner(before(x))))
    copy = duplicate(inner)
    assert np.array_equal(copy(X), inner(X))
    assert len(copy._inbound_nodes) == len(inner._inbound_nodes)
    y = keras.Input((6, 6, 2))
    again = keras.Model(y, copy(y))
    assert np.array_equal(again(X), inner(X))
    assert outer(X).shape == (12, 3)
    assert np.array_equal(duplicate(copy)(X), inner(X))  # whose calls in other models have lost their inputs


def test_a_call_that_no_output_needs_is_copied() -> None:
    """Its inputs belong to the model, and a model made of it later reads them."""
    x, twice = keras.Input((3,)), L.Dense(3, name="twice")
    h = L.ReLU()(twice(x))
    model, unused = keras.Model(x, h), twice(h)
    copy = duplicate(model)
    again = copy.get_layer("twice")._inbound_nodes[1].outputs[0]
    assert again is not unused
    assert np.array_equal(keras.Model(copy.inputs, again)(X[:, 0, 0, :1] + [[1, 2, 3]]),
                          keras.Model(x, unused)(X[:, 0, 0, :1] + [[1, 2, 3]]))  # fmt: skip


class Local(threading.local):
    def __init__(self, number: int = 0) -> None:
        self.number = number


class Needs(threading.local):
    def __init__(self, number: int) -> None:
        self.number = number


def objects(*items: Any) -> Any:
    array = np.empty(len(items), object)
    array[:] = items
    array.flags.writeable = False
    return array


def filled(local: Any, **values: Any) -> Any:
    vars(local).update(values)
    return local


OUTSIDE = L.Dense(1, name="outside")
ITEMS = [3, 1]
THINGS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], bool]]] = {
    "a method written in C": (
        lambda _: ITEMS.append,
        lambda new, _: new.__self__ == ITEMS and new.__self__ is not ITEMS,
    ),
    "a builtin function": (lambda _: len, lambda new, _: new is len),
    "a method of a type": (lambda _: dict.fromkeys, lambda new, _: new(["a"]) == {"a": None}),
    "an immutable set": (lambda _: frozenset({1, (2, 3)}), lambda new, _: new == {1, (2, 3)}),
    "a slice": (lambda layer: slice(layer, 2), lambda new, twin: new.start is twin and new.stop == 2),
    "a proxy": (lambda layer: types.MappingProxyType({"a": layer}), lambda new, twin: dict(new) == {"a": twin}),
    "an array of objects": (
        lambda layer: objects(layer, [layer]),
        lambda new, twin: new[0] is twin and new[1] == [twin] and not new.flags.writeable,
    ),
    "a cell": (types.CellType, lambda new, twin: new.cell_contents is twin),
    "an empty cell": (lambda _: types.CellType(), lambda new, _: new == types.CellType()),
    "a lock": (lambda _: threading.Lock(), lambda new, _: new.acquire(blocking=False)),
    "values of a thread": (lambda layer: filled(threading.local(), layer=layer), lambda new, twin: new.layer is twin),
    "a class of these": (lambda _: filled(Local(), number=3), lambda new, _: type(new) is Local and new.number == 3),
    "a weak set": (lambda layer: weakref.WeakSet([layer, OUTSIDE]), lambda new, twin: set(new) == {twin, OUTSIDE}),
    "weak values": (
        lambda layer: weakref.WeakValueDictionary({"in": layer, "out": OUTSIDE}),
        lambda new, twin: dict(new) == {"in": twin, "out": OUTSIDE},
    ),
    "weak keys": (
        lambda layer: weakref.WeakKeyDictionary({layer: [layer], OUTSIDE: 2}),
        lambda new, twin: dict(new) == {twin: [twin], OUTSIDE: 2},
    ),
    "a weak reference to what is outside": (lambda _: weakref.ref(OUTSIDE), lambda new, _: new() is OUTSIDE),
}


def test_objects_of_python() -> None:
    model = small()
    for name, (make, holds) in THINGS.items():
        vars(model)["thing"] = make(model.layers[-1])
        copy = duplicate(model)
        gc.collect()  # what only the copier held
        assert holds(copy.thing, copy.layers[-1]), name


class Slots:
    __slots__ = ("absent", "present")


def test_a_copier_of_its_own() -> None:
    """object_copy.py by itself knows nothing of layers, and shares every function."""
    thing = Slots()
    thing.present = [thing, len, lambda: thing]
    copier = ObjectCopier()
    twin = copier.copy(thing, "thing")
    copier.finish()
    assert twin.present == [twin, len, thing.present[2]]
    assert not hasattr(twin, "absent")


def test_what_cannot_be_copied_is_named() -> None:
    dense = L.Dense(3)
    x = keras.Input((3,))
    with pytest.raises(ValueError, match=r"over \(Lambda\)\.function.*the layer dense.* \(Dense\).*inplace=True"):
        duplicate(keras.Model(x, L.Lambda(lambda t: dense(t), name="over")(x)))
    model = made(Containers, fitted=False)
    model.fast = {"key": tf.function(model.call)}
    with pytest.raises(ValueError, match=r"\.fast\['key'\] can't be copied.*Containers"):
        duplicate(model)
    model.fast = (i for i in range(3))
    with pytest.raises(ValueError, match=r"\.fast can't be copied.*generator"):
        duplicate(model)
    model.fast = tf.lookup.experimental.DenseHashTable(tf.int64, tf.int64, -1, -2, -3)
    with pytest.raises(ValueError, match=r"\.fast can't be copied.*DenseHashTable"):
        duplicate(model)
    variable = tf.Variable(1.0, name="w")
    empty = UninitializedVariable(dtype="float32", shape=(2,), name="empty")
    for thing, words in (
        (lambda: variable, r"the function .*<lambda>, which holds w:0 \(ResourceVariable\)"),
        (
            (lambda weak: lambda: weak())(weakref.ref(variable)),
            r"the function .*, which holds w:0 \(ResourceVariable\)",
        ),
        (variable.handle, r"the handle of a resource, .* \(EagerTensor\)"),
        (empty, r"the variable empty:0, which has no value"),
        ([weakref.ref(variable)], r"an object \(ReferenceType\)"),
        (Needs(3), r"an object \(Needs\) \(.*missing 1 required positional argument: 'number'\)"),
    ):
        vars(model)["fast"] = thing
        with pytest.raises(ValueError, match=rf"\.fast(\[0\])? can't be copied: it is {words}\. Remove the attribute"):
            duplicate(model)


@pytest.mark.parametrize("name", ["MobileNetV3Small", "EfficientNetB0", "DenseNet121"])
def test_applications(name: str) -> None:
    model = getattr(keras.applications, name)(weights=None, input_shape=(32, 32, 3), classes=3)
    copy = duplicate(model)
    check_equal(model, copy)
    x = RNG.uniform(size=(1, 32, 32, 3)).astype("float32")
    assert np.array_equal(model(x), copy(x))


class Tempered(keras.Model):
    """A Functional subclass for fold and to_keras, which rebuild its graph."""

    def __init__(self, units: int, norm: Any) -> None:
        x = keras.Input((6, 6, 2))
        h = norm(name="norm")(L.Conv2D(units, 3, name="conv")(x))
        super().__init__(inputs=x, outputs=L.Dense(3, name="head")(L.Flatten()(h)))
        self.temperature = 1.0
        self.named = {"head": self.get_layer("head")}
        self.counter = keras.metrics.Mean(name="counter")

    def call(self, x: Any, training: Any = None, mask: Any = None) -> Any:
        return super().call(x, training=training, mask=mask) / self.temperature


class TemperedSequential(keras.Sequential):
    def __init__(self, units: int, norm: Any) -> None:
        layers = [keras.Input((6, 6, 2)), L.Conv2D(units, 3), norm(), L.Flatten(), L.Dense(3, name="head")]
        super().__init__(layers)
        self.temperature = 1.0
        self.named = {"head": self.get_layer("head")}
        self.counter = keras.metrics.Mean(name="counter")

    def call(self, x: Any, training: Any = None, mask: Any = None) -> Any:
        return super().call(x, training=training, mask=mask) / self.temperature


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
@pytest.mark.parametrize("kind", [Tempered, TemperedSequential])
@pytest.mark.parametrize("convert", [fold, to_keras])
def test_rebuilt_subclasses_keep_their_attributes(convert: Any, kind: Any, nested: bool) -> None:
    inner = kind(4, BatchNormalization)
    inner.temperature = 10.0
    inner.counter.update_state([3.0])
    model = inner
    if nested:
        x = keras.Input((6, 6, 2))
        model = keras.Model(x, inner(x) + 1.0)
    model.compile("sgd", "mse")
    copy = convert(model)
    twin = next(layer for layer in copy.layers if isinstance(layer, kind)) if nested else copy
    assert type(twin) is kind
    assert twin.temperature == 10.0
    assert twin.named["head"] is twin.get_layer("head")
    assert twin.counter is not inner.counter
    assert twin.counter in twin._metrics
    assert twin.counter.result() == inner.counter.result()
    assert not any(isinstance(layer, BatchNormalization) for layer in copy._flatten_layers())
    np.testing.assert_allclose(copy(X), model(X), rtol=1e-5, atol=1e-5)
    assert inner.temperature == 10.0


def test_attributes_that_hold_a_layer_that_is_replaced() -> None:
    model = Tempered(4, keras.layers.BatchNormalization)
    model.norm = model.get_layer("norm")
    with pytest.raises(ValueError, match=r"Tempered.*call\(\).*attribute norm.*layer norm"):
        fold(model)
    plain = Tempered(4, keras.layers.BatchNormalization)
    plain.fn = lambda x: plain.get_layer("conv")(x)
    with pytest.raises(ValueError, match=r"fn can't be copied.*Remove the attribute"):
        fold(plain)
