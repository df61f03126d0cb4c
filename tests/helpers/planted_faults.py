"""Models of scikit-learn's digits with one planted fault each, and healthy ones, for the tests of diagnose.

Each fault is a function of the kind of model ("mlp", "cnn", "resnet") and returns a Planted: the model, the data, and
what diagnose must say. Trainings last a second or two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers as L
from needs import need_module

KERAS = keras.layers.BatchNormalization
KINDS = ("mlp", "cnn", "resnet")
MIDDLE = {"mlp": "bn1", "cnn": "bn1", "resnet": "bn1"}  # a layer that isn't the first


@dataclass
class Planted:
    model: Any
    data: Any
    targets: Any = None
    verdict: str | None = None  # None: healthy
    layer: str | None = None  # None: any
    kwargs: dict[str, Any] = field(default_factory=dict)


class Fixed(L.Layer):
    """Calls a layer with training=True or False, whatever it is for the model. (In a functional model the value that
    fit and predict give replaces the one of the symbolic call.)"""

    def __init__(self, layer: Any, training: bool) -> None:
        super().__init__()
        self.inner, self.given = layer, training

    def build(self, shape: Any) -> None:
        self.inner.build(shape)

    def call(self, x: Any) -> Any:
        return self.inner(x, training=self.given)


@cache
def digits() -> tuple[Any, Any, Any, Any]:
    """x_train, y_train, x_test, y_test; images of shape (8, 8, 1) in [0, 1]."""
    x, y = need_module("sklearn.datasets").load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype("float32").reshape(-1, 8, 8, 1), y[order]
    return x[:1400], y[:1400], x[1400:], y[1400:]


def build(
    kind: str,
    *,
    norm: Callable[..., Any] | None = None,
    call: dict[str, dict[str, Any]] | None = None,
    options: dict[str, dict[str, Any]] | None = None,
    before: bool = True,
    **common: Any,
) -> Any:
    """A model with batch norms bn0, bn1, ... call, options: arguments of the call or constructor of single ones.

    before=False puts the activation before the batch norm.
    """
    make = norm or KERAS

    def bn(x: Any, name: str) -> Any:
        layer = make(name=name, **{**common, **(options or {}).get(name, {})})
        return Fixed(layer, **call[name])(x) if name in (call or {}) else layer(x)

    def unit(x: Any, layer: Any, name: str, last: bool = False) -> Any:
        x = layer(x)
        if not before:
            return bn(L.ReLU()(x), name)
        x = bn(x, name)
        return x if last else L.ReLU()(x)

    inputs = x = keras.Input((8, 8, 1), name="image")
    if kind == "mlp":
        x = L.Flatten()(x)
        for i, width in enumerate((64, 64, 32)):
            x = unit(x, L.Dense(width, name=f"layer{i}"), f"bn{i}")
    elif kind == "cnn":
        for i, filters in enumerate((16, 16, 32)):
            x = unit(x, L.Conv2D(filters, 3, padding="same", name=f"layer{i}"), f"bn{i}")
            x = L.MaxPooling2D()(x) if i == 1 else x
        x = L.GlobalAveragePooling2D()(x)
    else:
        x = unit(x, L.Conv2D(16, 3, padding="same", name="layer0"), "bn0")
        for i, (filters, stride) in enumerate(((16, 1), (32, 2))):
            y = unit(x, L.Conv2D(filters, 3, stride, padding="same", name=f"layer{2 * i + 1}"), f"bn{2 * i + 1}")
            y = unit(y, L.Conv2D(filters, 3, padding="same", name=f"layer{2 * i + 2}"), f"bn{2 * i + 2}", last=True)
            x = x if stride == 1 else L.Conv2D(filters, 1, stride)(x)
            x = L.ReLU()(L.Add()([x, y]))
        x = L.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, L.Dense(10, dtype="float32", name="head")(x), name=kind)


def train(
    model: Any,
    x: Any,
    y: Any,
    *,
    steps: int = 150,
    batch: int = 64,
    rate: float = 2e-3,
    optimizer: Any = None,
    seed: int = 0,
) -> Any:
    """Compile and fit on random batches."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    rng, rows = np.random.default_rng(seed), []
    n = len(y)
    while len(rows) < steps * batch:
        rows += list(rng.permutation(n))
    rows = rows[: steps * batch]
    given = keras.tree.map_structure(lambda a: a[rows], x)
    model.fit(given, y[rows], batch_size=batch, shuffle=False, verbose=0)
    return model


def good(kind: str, **kwargs: Any) -> Any:
    """A healthy model: momentum 0.9, 200 updates."""
    x, y, _, _ = digits()
    keras.utils.set_random_seed(1)
    model = build(kind, **{"momentum": 0.9, **kwargs})
    train(model, x, y, steps=150)
    return train(model, x, y, steps=60, rate=3e-4, seed=1)


def too_few_updates(kind: str) -> Planted:
    x, y, _, _ = digits()
    keras.utils.set_random_seed(0)
    return Planted(train(build(kind), x, y, steps=48), x, y, "too-few-updates")


def never_updated(kind: str) -> Planted:
    """Loaded without moving statistics."""
    x, y, _, _ = digits()
    model = good(kind)
    reset(model)
    return Planted(model, x, y, "never-updated", "bn0")


def reset(model: Any, *names: str) -> None:
    for layer in model.layers:
        if isinstance(layer, KERAS) and (not names or layer.name in names):
            layer.moving_mean.assign(np.zeros(layer.moving_mean.shape))
            layer.moving_variance.assign(np.ones(layer.moving_mean.shape))


def one_never_updated(kind: str) -> Planted:
    """training=False written into the call of one layer."""
    x, y, _, _ = digits()
    keras.utils.set_random_seed(0)
    name = MIDDLE[kind]
    model = build(kind, momentum=0.9, call={name: {"training": False}})
    return Planted(train(model, x * 30, y), x * 30, y, "never-updated", name)


def never_trained(kind: str) -> Planted:
    x, y, _, _ = digits()
    keras.utils.set_random_seed(0)
    return Planted(build(kind), x, y, "never-trained")


def small_batches(kind: str) -> Planted:
    x, y, _, _ = digits()
    keras.utils.set_random_seed(0)
    model = train(build(kind, momentum=0.99), x, y, steps=700, batch=2)
    return Planted(model, tf.data.Dataset.from_tensor_slices((x[:500], y[:500])).batch(2), None, "small-batches")


def frozen_other_data(kind: str) -> Planted:
    x, y, _, _ = digits()
    model = good(kind)
    for layer in model.layers:
        layer.trainable = not isinstance(layer, KERAS)
    other = 2.5 * (1 - x) + 1
    train(model, other, y, steps=30)
    return Planted(model, other, y, "frozen-other-data", "bn0")


def outlier(kind: str) -> Planted:
    x, y, _, _ = digits()
    x = x.copy()
    x[77] *= 1000
    keras.utils.set_random_seed(0)
    return Planted(train(build(kind, momentum=0.9), x, y), x, y, "outlier", "bn0")


def wrong_axis(kind: str) -> Planted:
    x, y, _, _ = digits()
    keras.utils.set_random_seed(0)
    if kind != "mlp":
        name = MIDDLE[kind]
        return Planted(train(build(kind, momentum=0.9, options={name: {"axis": 1}}), x, y), x, y, "wrong-axis", name)
    rows = keras.Input((8, 8))
    h = rows
    for i in range(2):
        h = L.ReLU()(KERAS(axis=1 if i else -1, momentum=0.9, name=f"bn{i}")(L.Dense(24)(h)))
    model = keras.Model(rows, L.Dense(10)(L.Flatten()(h)), name="mlp")
    given = x.reshape(-1, 8, 8)
    return Planted(train(model, given, y), given, y, "wrong-axis", "bn1")


def shared(kind: str) -> Planted:
    """A Siamese net whose inputs differ: pixels, and inverted ones."""
    x, y, _, _ = digits()
    keras.utils.set_random_seed(0)
    whole = build(kind, momentum=0.9)
    tower = keras.Model(whole.input, whole.layers[-2].output, name="tower")
    inputs = [keras.Input((8, 8, 1)), keras.Input((8, 8, 1))]
    model = keras.Model(inputs, L.Dense(10)(L.Concatenate()([tower(one) for one in inputs])), name=kind)
    given = [x, 2 * (1 - x)]
    return Planted(train(model, given, y), given, y, "shared", "bn0")


def two_kinds_of_batches(kind: str) -> Planted:
    """A discriminator's diet: batches of real images and batches of noise by turns."""
    x, _, _, _ = digits()
    keras.utils.set_random_seed(0)
    model = build(kind, momentum=0.9)
    rng = np.random.default_rng(0)
    noise = rng.normal(1.0, 1.0, x.shape).astype("float32")
    batches, labels = [], []
    for i in range(0, 1280, 64):
        batches += [x[i : i + 64], noise[i : i + 64]]
        labels += [np.zeros(64, int), np.ones(64, int)]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
    for _ in range(3):
        for a, b in zip(batches, labels, strict=True):
            model.train_on_batch(a, b)
    data = tf.data.Dataset.from_tensor_slices((np.stack(batches), np.stack(labels)))
    return Planted(model, data, None, "mixed-batches", "bn0")


def drift(kind: str) -> Planted:
    """A learning rate that is too large: the weights run away from the moving statistics."""
    x, y, _, _ = digits()
    keras.utils.set_random_seed(0)
    model = build(kind, momentum=0.99)
    train(model, x, y, steps=500, batch=32)
    model.optimizer.learning_rate = 0.05
    model.fit(x[:1280], y[:1280], batch_size=32, verbose=0)
    return Planted(model, x, y, "drift")


def dead(kind: str) -> Planted:
    x, y, _, _ = digits()
    name = MIDDLE[kind]
    model = good(kind, before=False)
    layer = model.get_layer(name.replace("bn", "layer"))
    layer.bias.assign(np.full(layer.bias.shape, -1000.0))
    return Planted(train(model, x, y, steps=100), x, y, "constant-channels", name)


def not_finite(kind: str) -> Planted:
    x, y, _, _ = digits()
    model, name = good(kind), MIDDLE[kind]
    variance = np.asarray(model.get_layer(name).moving_variance).copy()
    variance[3] = np.nan
    model.get_layer(name).moving_variance.assign(variance)
    return Planted(model, x, y, "not-finite", name)


def negative_variance(kind: str) -> Planted:
    x, y, _, _ = digits()
    model, name = good(kind), MIDDLE[kind]
    model.get_layer(name).moving_variance.assign(-np.asarray(model.get_layer(name).moving_variance))
    return Planted(model, x, y, "not-finite", name)


def shifted(kind: str) -> Planted:
    """Prediction's data isn't training's: other units."""
    x, y, x_test, y_test = digits()
    return Planted(good(kind), x, y, "shifted-data", "bn0", {"data2": (4 * x_test + 1, y_test)})


def overflow(kind: str) -> Planted:
    x, y, _, _ = digits()
    keras.utils.set_random_seed(0)
    model = build(kind, momentum=0.9, norm=lambda **kwargs: KERAS(dtype="mixed_float16", **kwargs))
    for layer in model.layers:
        if layer.name.startswith("layer"):
            layer.dtype_policy = keras.DTypePolicy("mixed_float16")
    train(model, x, y, steps=60)
    layer = model.get_layer("layer1")
    layer.kernel.assign(np.asarray(layer.kernel) * 1e6)
    return Planted(model, x, y, "overflow", "bn1")


def epsilon(kind: str) -> Planted:
    """Weights of a framework whose epsilon is 1e-5, in a layer whose default is 1e-3; the data has small variances."""
    x, y, _, _ = digits()
    model = good(kind, epsilon=1e-5, options={"bn0": {"epsilon": 1e-5}})
    first = next(layer for layer in model.layers if layer.name == "layer0")
    norm = model.get_layer("bn0")
    small = 0.003
    first.kernel.assign(np.asarray(first.kernel) * small)
    first.bias.assign(np.asarray(first.bias) * small)
    train(model, x, y, steps=150)
    norm.epsilon = 1e-3
    return Planted(model, x, y, "epsilon", "bn0")


def momentum(kind: str) -> Planted:
    x, y, _, _ = digits()
    keras.utils.set_random_seed(0)
    return Planted(train(build(kind, momentum=0.1), x, y, batch=32), x, y, "momentum", "bn0")


def hard_wired(kind: str) -> Planted:
    x, y, _, _ = digits()
    keras.utils.set_random_seed(0)
    name = MIDDLE[kind]
    return Planted(
        train(build(kind, momentum=0.9, call={name: {"training": True}}), x, y), x, y, "always-training", name
    )


FAULTS = {
    fault.__name__: fault
    for fault in (
        too_few_updates, never_updated, one_never_updated, never_trained, small_batches, frozen_other_data, outlier,
        wrong_axis, shared, two_kinds_of_batches, drift, dead, not_finite, negative_variance, shifted, overflow,
        epsilon, momentum, hard_wired,
    )
}  # fmt: skip


# ---- healthy ---------------------------------------------------------------------------------------------------------


def healthy_plain(kind: str) -> Planted:
    x, y, _, _ = digits()
    return Planted(good(kind), x, y)


def healthy_long(kind: str) -> Planted:
    """Keras's defaults, trained long enough."""
    x, y, _, _ = digits()
    keras.utils.set_random_seed(0)
    return Planted(train(train(build(kind), x, y, steps=500, batch=32), x, y, steps=300, rate=3e-4, batch=32), x, y)


def healthy_recalibrated(kind: str) -> Planted:
    from bnfast.keras import recalibrate

    planted = too_few_updates(kind)
    recalibrate(planted.model, planted.data, verbose=0)
    return Planted(planted.model, planted.data, planted.targets)


def healthy_renorm(kind: str) -> Planted:
    x, y, _, _ = digits()
    return Planted(good(kind, renorm=True, renorm_momentum=0.9), x, y)


def healthy_frozen(kind: str) -> Planted:
    """Frozen with matching data, and trained on."""
    x, y, _, _ = digits()
    model = good(kind)
    for layer in model.layers:
        layer.trainable = not isinstance(layer, KERAS)
    model.get_layer("head").trainable = True
    for layer in model.layers:
        layer.trainable = layer.name == "head"
    return Planted(train(model, x, y, steps=50, rate=3e-4), x, y)


def healthy_test_data(kind: str) -> Planted:
    _, _, x_test, y_test = digits()
    return Planted(good(kind), x_test, y_test)


def healthy_data2(kind: str) -> Planted:
    x, y, x_test, y_test = digits()
    return Planted(good(kind), x, y, kwargs={"data2": (x_test, y_test)})


def healthy_after(kind: str) -> Planted:
    """Batch norm after the activation, sparse features, no labels."""
    x, _, _, _ = digits()
    return Planted(good(kind, before=False), x)


def healthy_bnfast(kind: str) -> Planted:
    from bnfast.keras import BatchNormalization

    x, y, _, _ = digits()
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(50)
    return Planted(good(kind, norm=BatchNormalization), data)


def healthy_input_norm(kind: str) -> Planted:
    """A batch norm of the pixels, of which some are always 0."""
    x, y, _, _ = digits()
    keras.utils.set_random_seed(0)
    inner = build(kind, momentum=0.9)
    flat = KERAS(momentum=0.9, name="pixels")(L.Flatten()(inputs := keras.Input((8, 8, 1))))
    model = keras.Model(inputs, inner(L.Reshape((8, 8, 1))(flat)), name=kind)
    train(model, x, y)
    return Planted(train(model, x, y, steps=60, rate=3e-4, seed=1), x, y)


def healthy_no_affine(kind: str) -> Planted:
    x, y, _, _ = digits()
    return Planted(good(kind, scale=False, center=False), x, y)


def healthy_fine_tuned(kind: str) -> Planted:
    """Not frozen, fine-tuned on other data for long enough."""
    x, y, _, _ = digits()
    model = good(kind)
    train(model, 1.5 * (1 - x), y, steps=150)
    return Planted(train(model, 1.5 * (1 - x), y, steps=60, rate=3e-4), 1.5 * (1 - x), y)


HEALTHY = {
    model.__name__: model
    for model in (
        healthy_plain, healthy_long, healthy_recalibrated, healthy_renorm, healthy_frozen, healthy_test_data,
        healthy_data2, healthy_after, healthy_bnfast, healthy_input_norm, healthy_no_affine, healthy_fine_tuned,
    )
}  # fmt: skip
