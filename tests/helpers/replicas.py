"""The program that test_synchronized.py starts for its replicas: python replicas.py mirrored|worker FOLDER.

"mirrored" runs two replicas on two logical CPUs of this process, "worker" is one worker of the cluster in TF_CONFIG.
A case is a batch, cut into two parts at several places; test_synchronized.py computes the same batch in one process.
Results are written to FOLDER/found.pickle.
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

SECONDS = 120  # timeout: a replica whose peer is gone would wait for ever
RELU = {"activation": "relu"}
# name: (shape, arguments of the layer, what the batch holds besides x); full_batch takes its seed from the sorted names
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
    "without_updates": ((10, 4), {"update_statistics": False}, ()),
}
# cases that also run with `training` as a tensor
TENSOR_CASES = ("channels_first", "masked", "mask_by_channel", "also_in_inference", "moving_only")
# cases that also run with one process per replica
WORKER_CASES = ("channels_last", "channels_first", "masked", "alone")


def full_batch(name):
    """The whole batch, by argument name; None marks an argument that the case does not use."""
    shape, kwargs, more = CASES[name]
    rng = np.random.default_rng(sorted(CASES).index(name))
    dtype = {"float64": "float64", "mixed_float16": "float16"}.get(kwargs.get("dtype"), "float32")
    wide = "float64" if dtype == "float64" else "float32"
    x = rng.normal(rng.uniform(-1, 1), rng.uniform(0.5, 2), shape) + (1e4 if "offset" in more else 0)
    x[: len(x) // 3] += 1  # so that the replicas have different statistics
    batch = {"x": x.astype(dtype), "weights": rng.normal(size=shape).astype(wide), "residual": None, "mask": None}
    if "residual" in more:
        batch["residual"] = rng.normal(size=shape).astype(dtype)
    if "mask" in more:
        batch["mask"] = rng.uniform(size=shape[:-1]) < 0.6
        batch["mask"][: len(x) // 2] = False  # the whole first half: the first replica has no value
    if "attached" in more:
        batch["mask"] = rng.uniform(size=shape[:-1]) < 0.6
    if "nothing" in more:
        batch["mask"] = np.zeros(shape[:-1], bool)
    if "nan" in more:
        batch["x"][1, 2] = np.nan
    return batch


def cuts(name):
    """First sample of the second replica: near the middle; 1; and 0, where the first replica gets an empty batch."""
    samples = CASES[name][0][0]
    return [samples // 2, 1, 0]


def built_layer(name, **kwargs):
    """The built layer of a case, with random weights."""
    shape, arguments, more = CASES[name]
    kind = BatchNormalizationAdd if "residual" in more else BatchNormalization
    layer = kind(**{"momentum": 0.9, **arguments, **kwargs})
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
    """The gradients of sum(dx**2 * weights), where dx is the gradient of sum(y**3): not linear in y."""
    x, gamma = batch["x"], layer.gamma.value
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=training, mask=batch["mask"]) ** 3)
        outcome = tf.reduce_sum(tape.gradient(loss, x) ** 2 * batch["weights"])
    return dict(zip(("dx", "dgamma"), outer.gradient(outcome, [x, gamma]), strict=True))


def one_process_results(name, function=results, *more):
    """The results and the layer state of a case in one process without `synchronized`, as NumPy arrays."""
    layer = built_layer(name)
    batch = {key: None if a is None else tf.constant(a) for key, a in full_batch(name).items()}
    found = tf.function(lambda *more: function(layer, batch, *more), autograph=False)(*more)
    return {key: value.numpy() for key, value in found.items()} | {
        w.name: w.numpy() for w in layer.non_trainable_weights
    }


def replica_results(strategy, name, function=results, *more, eager=False):
    """Results and layer state per cut; each is a list of arrays, ordered by replica. All cuts share one trace."""
    with strategy.scope():
        layer = built_layer(name, synchronized=True)
    batch, samples, weights, found = full_batch(name), CASES[name][0][0], layer.get_weights(), []

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


def model(kind, **kwargs):
    """A compiled float64 model: one layer of `kind` between two dense layers."""
    keras.utils.set_random_seed(3)
    wide = {"dtype": "float64"}
    layers = [keras.layers.Dense(6, **wide), kind(momentum=0.8, **wide, **kwargs), keras.layers.Dense(1, **wide)]
    net = keras.Sequential([keras.Input((4,), **wide), *layers])
    net.compile(keras.optimizers.SGD(0.05, momentum=0.9), keras.losses.MeanSquaredError(dtype="float64"))
    return net


def samples():
    """Inputs and targets for `fit_weights_and_losses` and `custom_loop_weights`."""
    rng = np.random.default_rng(5)
    return rng.normal(2, 3, (48, 4)), rng.normal(size=(48, 1))


def fit_weights_and_losses(kind, **kwargs):
    """Weights and losses after two epochs of fit, in batches of 16."""
    net = model(kind, **kwargs)
    history = net.fit(*samples(), batch_size=16, epochs=2, shuffle=False, verbose=0)
    return [*net.get_weights(), np.array(history.history["loss"])]


def custom_loop_weights(strategy, **kwargs):
    """Weights after six steps of a custom loop. Of 16 samples per batch the first replica takes 5, the second 11."""
    with strategy.scope():
        net = model(BatchNormalization, **kwargs)
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
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # on a hang, print where
    if where == "mirrored":
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        strategy, names = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), CASES
    else:
        strategy, names = tf.distribute.MultiWorkerMirroredStrategy(), WORKER_CASES
    assert strategy.num_replicas_in_sync == 2
    found = {"looped": custom_loop_weights(strategy, synchronized=True)}
    found |= {name: replica_results(strategy, name) for name in names}
    found["eager"] = replica_results(strategy, "masked", eager=True)
    if where == "mirrored":
        for flag in (True, False):
            for name in TENSOR_CASES:
                found[name, flag] = replica_results(strategy, name, results, tf.constant(flag))
        found["second order"] = replica_results(strategy, "second_order", second_order)
        found["refused"] = outcome(replica_results, strategy, "second_order", second_order, tf.constant(True))
        with strategy.scope():
            found["fit"] = fit_weights_and_losses(BatchNormalization, synchronized=True)
            found["keras"] = fit_weights_and_losses(keras.layers.BatchNormalization, synchronized=True)
    (Path(folder) / "found.pickle").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
