"""synchronized=True: two replicas against one process.

The replicas run helpers/replicas.py: once on two logical CPUs of one process, and once as two worker processes.
"""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import bnfast.keras
import keras
import replicas
import tensorflow as tf
from bnfast.keras import BatchNormalization, accelerate, to_keras

PROGRAM = Path(replicas.__file__)
SHARDED = ("y", "dx", "dresidual")
SUMMED = ("dgamma", "dbeta")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of replicas.py: two logical CPUs in one process, worker 0, worker 1. All three run at once."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    cluster = {"worker": [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]}
    for one in sockets:
        one.close()
    tasks = [{"cluster": cluster, "task": {"type": "worker", "index": index}} for index in range(2)]
    configs = [{}, *({"TF_CONFIG": json.dumps(task)} for task in tasks)]
    base = {key: value for key, value in os.environ.items() if key != "TF_CONFIG"}
    folders = [tmp_path_factory.mktemp("replicas") for _ in configs]
    processes = []
    try:
        for folder, config in zip(folders, configs, strict=True):
            command = [sys.executable, str(PROGRAM), "worker" if config else "mirrored", str(folder)]
            with (folder / "log").open("w") as log:
                processes.append(subprocess.Popen(command, env=base | config, stdout=log, stderr=log))
        end = time.monotonic() + replicas.SECONDS + 20
        for process, folder in zip(processes, folders, strict=True):
            code = process.wait(end - time.monotonic())
            assert code == 0, (folder / "log").read_text()[-6000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [pickle.loads((folder / "found.pickle").read_bytes()) for folder in folders]


@pytest.fixture(scope="module")
def mirrored(found):
    return found[0]


@pytest.fixture(scope="module")
def workers(found):
    return found[1:]


def check(name, found, expected, half=False):
    """Compare lists of the replicas' arrays with the arrays of one process, to 1e-6 of the largest value.

    half: outputs are float16, so they may also differ in the last place. State must have equal bits on all replicas.
    """
    for key, right in expected.items():
        parts = found[key]
        if key in SUMMED:
            actual = sum(parts)
        elif key in SHARDED:
            actual = np.concatenate(parts)
        else:
            actual = parts[0]
            assert all(np.array_equal(part, actual, equal_nan=True) for part in parts), (name, key)
        assert actual.dtype == right.dtype, (name, key)
        assert actual.shape == right.shape, (name, key)
        largest = np.max(np.abs(right[np.isfinite(right)]), initial=0)
        rtol = 1e-3 if half and key in SHARDED else 0
        np.testing.assert_allclose(actual, right, rtol=rtol, atol=1e-6 * largest, err_msg=f"{name} {key}")
    assert set(found) == set(expected)


def joined(found):
    """Merge the results of two processes into one list per name."""
    return [{key: [part for one in pair for part in one[key]] for key in pair[0]} for pair in zip(*found, strict=True)]


@pytest.mark.parametrize("name", replicas.CASES)
def test_replicas_equal_one_process(mirrored, name):
    expected = replicas.one_process_results(name)
    for cut, found in zip(replicas.cuts(name), mirrored[name], strict=True):
        check(f"{name} cut at {cut}", found, expected, half=name == "mixed")


@pytest.mark.parametrize("name", replicas.WORKER_CASES)
def test_workers_equal_one_process(workers, name):
    expected = replicas.one_process_results(name)
    for cut, found in zip(replicas.cuts(name), joined([worker[name] for worker in workers]), strict=True):
        check(f"{name} cut at {cut}", found, expected)


def test_eager_mode(mirrored, workers):
    expected = replicas.one_process_results("masked")
    for everyone in (mirrored["eager"], joined([worker["eager"] for worker in workers])):
        for found in everyone:
            check("eager", found, expected)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("name", replicas.TENSOR_CASES)
def test_training_as_a_tensor(mirrored, name, flag):
    expected = replicas.one_process_results(name, replicas.results, tf.constant(flag))
    for found in mirrored[name, flag]:
        check(name, found, expected)


def test_second_order(mirrored):
    expected = replicas.one_process_results("second_order", replicas.second_order)
    for found in mirrored["second order"]:
        check("second order", found, expected)


def test_second_order_with_training_as_a_tensor_is_an_error(mirrored):
    assert "NotImplementedError" in mirrored["refused"]
    assert "second-order gradients with synchronized=True need training=True or False" in mirrored["refused"]


def test_a_fully_masked_batch_changes_nothing(mirrored):
    before = {w.name: w.numpy() for w in replicas.built_layer("all_masked").non_trainable_weights}
    for found in mirrored["all_masked"]:
        for name, value in before.items():
            assert all(np.array_equal(part, value) for part in found[name])


def test_fit(mirrored):
    """With equal shards, Keras's own synchronized layer gives the same results."""
    expected = replicas.fit_weights_and_losses(BatchNormalization)
    for ours, one, keras_s in zip(mirrored["fit"], expected, mirrored["keras"], strict=True):
        np.testing.assert_allclose(ours, one, rtol=0, atol=1e-9)
        np.testing.assert_allclose(ours, keras_s, rtol=0, atol=1e-9)


def test_custom_loop_over_unequal_shards(mirrored, workers):
    expected = replicas.custom_loop_weights(tf.distribute.get_strategy())
    for found in (mirrored, *workers):
        for replica, one in zip(found["looped"], expected, strict=True):
            np.testing.assert_allclose(replica, one, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("name", ["channels_last", "channels_first", "masked", "mixed"])
def test_one_replica_has_the_bits_of_the_plain_layer(name):
    batch = {key: None if a is None else tf.constant(a) for key, a in replicas.full_batch(name).items()}
    plain, alone, inside = (replicas.built_layer(name, synchronized=one > 0) for one in range(3))
    expected = replicas.results(plain, batch)
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    for layer, found in (
        (alone, replicas.results(alone, batch)),
        (inside, strategy.run(replicas.results, (inside, batch))),
    ):
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)
        for one, other in zip(layer.get_weights(), plain.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)


def test_config_and_file(tmp_path):
    layer = BatchNormalization(synchronized=True, correction=1)
    config = layer.get_config()
    assert (config["synchronized"], config["correction"]) == (True, 1)
    assert BatchNormalization.from_config(config).get_config() == config
    net = keras.Sequential([keras.Input((3,)), layer])
    net.save(tmp_path / "net.keras")
    assert keras.models.load_model(tmp_path / "net.keras").layers[0].synchronized is True


@pytest.mark.parametrize("inplace", [False, True])
def test_accelerate_and_to_keras_keep_synchronized(inplace):
    norm = keras.layers.BatchNormalization(synchronized=True, name="norm")
    net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), norm])
    fast = accelerate(net, inplace=inplace, verbose=False)
    ours = fast.get_layer("norm")
    assert isinstance(ours, BatchNormalization)
    assert ours.synchronized is True
    back = to_keras(fast, inplace=inplace).get_layer("norm")
    assert type(back) is type(keras.layers.BatchNormalization())
    assert back.synchronized is True


def test_patch_supports_synchronized():
    with bnfast.keras.patch():
        layer = keras.layers.BatchNormalization(synchronized=True)
    assert bnfast.keras.uses_bnfast(layer)
    assert layer.synchronized is True
