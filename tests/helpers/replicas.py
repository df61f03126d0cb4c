"""What the replicas of test_synchronized.py run: python replicas.py mirrored|worker FOLDER.

mirrored: two replicas on two logical CPUs of this process; worker: one of the workers that TF_CONFIG names. A case is a
whole batch and where it is cut; test_synchronized.py makes the same one for a single process. Results go to
FOLDER/found.pickle.
"""

import faulthandler
import os
import pickle
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from bnfast.keras import BatchNormalization, BatchNormalizationAdd

SECONDS = 120  # a replica that waits for another one waits for ever
RELU = {"activation": "relu"}
# name: shape, arguments of the layer, what else there is in the batch
CASES = {
    "channels_last": ((13, 5, 3, 6), RELU, ()),
    "channels_first": ((9, 7, 8), {"axis": 1, "activation": "leaky_relu", "correction": 1}, ("residual",)),
    "numpy_function": ((13, 5, 3), {"activation": "relu6", "bridge": "numpy_function"}, ("residual", "mask")),
    "offset": ((301, 4), {"scale": False}, ("offset",)),
    "float64": ((24, 5), {"dtype": "float64", "center": False}, ("residual",)),
    "mixed": ((40, 3, 8), {"dtype": "mixed_float16", **RELU}, ()),
    "masked": ((16, 5, 3), {"momentum": None}, ("mask",)),
    "all_masked": ((8, 3), {"momentum": None}, ("nothing",)),
    "several_axes": ((9, 4, 3, 5), {"axis": [1, 3], **RELU}, ()),
    "mask_by_channel": ((9, 4, 5), {"axis": [1, 2], **RELU}, ("attached",)),
    "alone": ((3, 3), {"epsilon": 0.0}, ()),
    "nan": ((12, 4), {"nan_policy": "skip_update"}, ("nan",)),
    "also_in_inference": ((10, 4), {"use_batch_statistics": True, **RELU}, ()),
    "second_order": ((9, 4), {"dtype": "float64"}, ("attached",)),
    "without_epsilon": ((16, 5, 3), {"epsilon": 0.0}, ("mask",)),
    "moving_only": ((10, 4), {"use_batch_statistics": False, **RELU}, ()),
}
TENSOR = (
    "channels_first",
    "masked",
    "mask_by_channel",
    "also_in_inference",
    "moving_only",
)  # `training` as a tensor too
WORKERS = ("channels_last", "channels_first", "masked", "alone")  # one process a replica: what is the same there


def whole(name):
    """The batch in one piece, by argument; entries that are None aren't there."""
    shape, words, more = CASES[name]
    rng = np.random.default_rng(sorted(CASES).index(name))
    dtype = {"float64": "float64", "mixed_float16": "float16"}.get(words.get("dtype"), "float32")
    wide = "float64" if dtype == "float64" else "float32"
    x = rng.normal(rng.uniform(-1, 1), rng.uniform(0.5, 2), shape) + (1e4 if "offset" in more else 0)
    x[: len(x) // 3] += 1  # replicas differ
    batch = {"x": x.astype(dtype), "weights": rng.normal(size=shape).astype(wide), "residual": None, "mask": None}
    if "residual" in more:
        batch["residual"] = rng.normal(size=shape).astype(dtype)
    if "mask" in more:
        batch["mask"] = rng.uniform(size=shape[:-1]) < 0.6
        batch["mask"][: len(x) // 2] = False  # all of a first half
    if "attached" in more:
        batch["mask"] = rng.uniform(size=shape[:-1]) < 0.6
    if "nothing" in more:
        batch["mask"] = np.zeros(shape[:-1], bool)
    if "nan" in more:
        batch["x"][1, 2] = np.nan
    return batch


def cuts(name):
    """Where the second replica's samples begin: about the middle, after the first sample, before it."""
    samples = CASES[name][0][0]
    return [samples // 2, 1, 0]


def made(name, **words):
    """The layer of a case, built, with weights of its own."""
    shape, arguments, more = CASES[name]
    kind = BatchNormalizationAdd if "residual" in more else BatchNormalization
    layer = kind(**{"momentum": 0.9, **arguments, **words})
    layer.build([shape, shape] if "residual" in more else shape)
    rng = np.random.default_rng(7)
    layer.set_weights([(rng.uniform(0.5, 2, w.shape) if w.ndim else w).astype(w.dtype) for w in layer.get_weights()])
    return layer


def results(layer, batch, training=True):
    """y and the gradients of sum(y*weights), by name."""
    names = [name for name in ("x", "residual") if batch[name] is not None]
    tensors = [batch[name] for name in names]
    parameters = {name: getattr(layer, name).value for name in ("gamma", "beta") if getattr(layer, name) is not None}
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        y = layer(tensors if len(tensors) > 1 else tensors[0], training=training, mask=batch["mask"])
        loss = tf.reduce_sum(tf.cast(y, batch["weights"].dtype) * batch["weights"])
    gradients = tape.gradient(loss, [*tensors, *parameters.values()])
    return {"y": y, **{f"d{name}": g for name, g in zip([*names, *parameters], gradients, strict=True)}}


def second_order(layer, batch, training=True):
    """The gradients of sum(dx**2 * weights), dx that of a loss which isn't linear in y."""
    x, gamma = batch["x"], layer.gamma.value
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=training, mask=batch["mask"]) ** 3)
        outcome = tf.reduce_sum(tape.gradient(loss, x) ** 2 * batch["weights"])
    return dict(zip(("dx", "dgamma"), outer.gradient(outcome, [x, gamma]), strict=True))


def in_one(name, function=results, *more):
    """What one process makes of a case without `synchronized`: results and state, as numpy arrays."""
    layer = made(name)
    batch = {key: None if a is None else tf.constant(a) for key, a in whole(name).items()}
    found = tf.function(lambda *more: function(layer, batch, *more), autograph=False)(*more)
    return {key: value.numpy() for key, value in found.items()} | {
        w.name: w.numpy() for w in layer.non_trainable_weights
    }


def in_replicas(strategy, name, function=results, *more, eager=False):
    """The same for each cut from the replicas of this process: lists of arrays, in order. One trace for all cuts."""
    with strategy.scope():
        layer = made(name, synchronized=True)
    batch, samples, weights, found = whole(name), CASES[name][0][0], layer.get_weights(), []

    def replica(cut, *more):
        first = tf.equal(tf.distribute.get_replica_context().replica_id_in_sync_group, 0)
        begin, end = tf.where(first, 0, cut), tf.where(first, cut, samples)
        own = {key: None if a is None else tf.constant(a)[begin:end] for key, a in batch.items()}
        return function(layer, own, *more)

    def run(*given):
        return strategy.run(replica, given)

    call = run if eager else tf.function(run, autograph=False)
    for cut in cuts(name):
        layer.set_weights(weights)
        values = call(tf.constant(cut), *more)
        values |= {w.name: w.value for w in layer.non_trainable_weights}
        found.append({key: [a.numpy() for a in strategy.experimental_local_results(v)] for key, v in values.items()})
    return found


def model(kind, **words):
    """One layer of `kind` between two others, in float64, compiled."""
    keras.utils.set_random_seed(3)
    wide = {"dtype": "float64"}
    layers = [keras.layers.Dense(6, **wide), kind(momentum=0.8, **wide, **words), keras.layers.Dense(1, **wide)]
    net = keras.Sequential([keras.Input((4,), **wide), *layers])
    net.compile(keras.optimizers.SGD(0.05, momentum=0.9), keras.losses.MeanSquaredError(dtype="float64"))
    return net


def samples():
    rng = np.random.default_rng(5)
    return rng.normal(2, 3, (48, 4)), rng.normal(size=(48, 1))


def fitted(kind, **words):
    """Weights and losses after two epochs of fit, in batches of 16."""
    net = model(kind, **words)
    history = net.fit(*samples(), batch_size=16, epochs=2, shuffle=False, verbose=0)
    return [*net.get_weights(), np.array(history.history["loss"])]


def looped(strategy, **words):
    """Weights after six steps of a loop of one's own; of each batch of 16 the first replica takes 5, the other 11."""
    with strategy.scope():
        net = model(BatchNormalization, **words)
        net.optimizer.build(net.trainable_weights)
    x, targets = (tf.constant(a) for a in samples())

    def replica(begin):
        first = tf.equal(tf.distribute.get_replica_context().replica_id_in_sync_group, 0)
        alone = strategy.num_replicas_in_sync == 1
        cut = begin + (16 if alone else 5)
        own = slice(tf.where(first, begin, cut), tf.where(first, cut, begin + 16))
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((net(x[own], training=True) - targets[own]) ** 2) / 16
        net.optimizer.apply(tape.gradient(loss, net.trainable_weights), net.trainable_weights)

    step = tf.function(lambda begin: strategy.run(replica, (begin,)), autograph=False)
    for begin in (0, 16, 32) * 2:
        step(tf.constant(begin))
    return net.get_weights()


def outcome(call, *args):
    try:
        call(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def main(where, folder):
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # a hang says where
    if where == "mirrored":
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        strategy, names = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), CASES
    else:
        strategy, names = tf.distribute.MultiWorkerMirroredStrategy(), WORKERS
    assert strategy.num_replicas_in_sync == 2
    found = {"looped": looped(strategy, synchronized=True)}
    found |= {name: in_replicas(strategy, name) for name in names}
    found["eager"] = in_replicas(strategy, "masked", eager=True)
    if where == "mirrored":
        for flag in (True, False):
            found |= {(name, flag): in_replicas(strategy, name, results, tf.constant(flag)) for name in TENSOR}
        found["second order"] = in_replicas(strategy, "second_order", second_order)
        found["refused"] = outcome(in_replicas, strategy, "second_order", second_order, tf.constant(True))
        with strategy.scope():
            found["fit"] = fitted(BatchNormalization, synchronized=True)
            found["keras"] = fitted(keras.layers.BatchNormalization, synchronized=True)
    (Path(folder) / "found.pickle").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
