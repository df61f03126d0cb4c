"""Invariant 4 for outputs: their memory is 64-byte aligned and recycled if and only if nothing refers to it."""

import gc
import os
import subprocess
import sys
import textwrap
import threading

import bnfast
import numpy as np
import pytest
import sample_data
from bnfast import _core

pytestmark = pytest.mark.serial  # measures the process's memory

SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 1000, 4095, 4096, 100003, (1 << 19) - 1, 1 << 19, (1 << 19) + 1]  # around 2 MiB


def statistics():
    return bnfast.build_info()["memory"]


def train(size, fill=1.0):
    return bnfast.batch_norm_train(np.full((size, 1), fill, np.float32))


def address(a):
    return a.__array_interface__["data"][0]


@pytest.fixture(autouse=True)
def fresh_pool():
    limit = statistics()["limit_bytes"]
    gc.collect()
    _core.clear_memory()
    yield
    _core.set_memory_limit(limit)
    _core.clear_memory()


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
def test_every_output_is_aligned(dtype):
    dtype = sample_data.dtype_of(dtype)
    kept = []
    for size in SIZES:
        for shape in ((size,), (1, size), (size, 1)):
            x = np.ones(shape, dtype)
            result = bnfast.batch_norm_train(x)
            grad = bnfast.batch_norm_grad(x, x, result.mean, result.invstd, residual=x, activation="relu")
            moments = bnfast.moments(x)
            infer = bnfast.batch_norm_infer(x, result.mean, result.variance)
            outputs = [*result, *grad, *moments[1:], infer]
            assert [address(a) % 64 for a in outputs] == [0] * len(outputs)
            assert all(a.flags.c_contiguous and a.flags.writeable for a in outputs)
            kept = [outputs, *kept[:2]]  # so that calls get different blocks


def test_core_empty_is_aligned_and_rejects_bad_shapes():
    for shape in ((), (0,), (5,), (3, 0, 2), (7, 11)):
        a = _core.empty(shape, np.dtype(np.float64))
        assert a.shape == shape
        assert address(a) % 64 == 0
    for shape in ((1 << 50,), (1 << 61, 3), ((1 << 61) + 1,), (1 << 62, 1 << 62)):
        with pytest.raises((MemoryError, ValueError)):
            _core.empty(shape, np.dtype(np.float32))
    with pytest.raises(ValueError, match="Received: -1"):
        _core.empty((3, -1), np.dtype(np.float32))


def test_the_second_call_reuses_the_memory_of_the_first():
    for size in (5, 1000, 300000, 3000000):
        result = train(size)
        where = address(result.y)
        in_use = statistics()["in_use_bytes"]
        assert in_use >= 4 * size
        del result
        before = statistics()
        assert before["held_bytes"] >= 4 * size
        assert before["in_use_bytes"] <= in_use - 4 * size
        result = train(size)
        after = statistics()
        assert address(result.y) == where
        assert after["fresh"] == before["fresh"]
        assert after["reused"] == before["reused"] + 2  # y, and the block of mean, variance and invstd
        del result
        _core.clear_memory()


VIEWS = {
    "slice": lambda y: y[100:200],
    "reshape": lambda y: y.reshape(-1)[5:],
    "memoryview": memoryview,
    "transpose of a view": lambda y: y[::2].T,
    "dlpack": np.from_dlpack,
}


@pytest.mark.parametrize("view", VIEWS)
def test_memory_is_not_recycled_while_anything_refers_to_it(view):
    y = train(300000, 3.0).y
    y[...] = np.arange(300000, dtype=np.float32)[:, None]
    where = address(y)
    alive = VIEWS[view](y)
    bytes_before = np.asarray(alive).tobytes()
    del y
    gc.collect()
    others = [train(300000, float(i)) for i in range(4)]
    assert where not in [address(o.y) for o in others]
    assert np.asarray(alive).tobytes() == bytes_before
    del alive
    gc.collect()
    assert address(train(300000).y) == where


def test_the_vectors_of_a_call_hold_their_common_block():
    mean = bnfast.batch_norm_train(np.full((10, 100), 7, np.float32)).mean
    expected = mean.copy()
    others = [bnfast.batch_norm_train(np.full((10, 100), i, np.float32)) for i in range(3)]
    assert np.array_equal(mean, expected)
    assert all(address(mean) != address(o.mean) for o in others)


def test_clear_gives_back_and_the_limit_bounds_what_is_kept():
    kept = train(250000).y
    del kept
    assert statistics()["held_bytes"] >= 1000000
    _core.clear_memory()
    assert statistics()["held_bytes"] == 0

    _core.set_memory_limit(3 << 20)
    assert statistics()["limit_bytes"] == 3 << 20
    results = [train(250000) for _ in range(6)]
    while results:
        results.pop()
        assert statistics()["held_bytes"] <= 3 << 20
    assert statistics()["held_bytes"] >= 1 << 20
    _core.set_memory_limit(0)
    assert statistics()["held_bytes"] == 0
    del results
    train(250000)
    assert statistics()["held_bytes"] == 0


def test_an_error_returns_its_blocks():
    x = np.full((1000, 100), np.nan, np.float32)
    before = statistics()["in_use_bytes"]
    for _ in range(3):
        with pytest.raises(FloatingPointError):
            bnfast.batch_norm_train(x, nan_policy="raise")
        with pytest.raises(ValueError):
            bnfast.batch_norm_train(x, epsilon=-1.0)
    gc.collect()
    assert statistics()["in_use_bytes"] == before


def test_out_takes_no_memory_of_the_pool():
    x, out = np.ones((300000, 1), np.float32), np.empty((300000, 1), np.float32)
    before = statistics()
    result = bnfast.batch_norm_train(x, out=out)
    assert result.y is out
    assert statistics()["in_use_bytes"] - before["in_use_bytes"] < 10000


def test_threads_share_the_pool_and_no_block():
    wrong = []

    def work(value):
        for i in range(200):
            x = np.full((100 + i % 3, 50), value, np.float64)
            y = bnfast.batch_norm_infer(x, np.zeros(50), np.ones(50), epsilon=0.0)
            if not (y == value).all():
                wrong.append(value)

    in_use = statistics()["in_use_bytes"]
    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert statistics()["in_use_bytes"] == in_use


def run_python(code):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_leaves_both_pools_working():
    code = """
        import os, signal, threading, warnings
        import bnfast, numpy as np
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: of a fork beside other threads
        x = np.ones((300000, 1), np.float32)
        kept = bnfast.batch_norm_train(x)
        stop = threading.Event()

        def busy():  # so that the pool's lock is often held when fork comes
            while not stop.is_set():
                bnfast._core.empty((1000,), np.dtype("f4"))

        thread = threading.Thread(target=busy)
        thread.start()
        codes = []
        for _ in range(5):
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                expected = kept.y.copy()
                others = [bnfast.batch_norm_train(x) for _ in range(3)]
                ok = (kept.y == expected).all() and len({id(o) for o in others}) == 3
                del others
                bnfast._core.clear_memory()
                os._exit(0 if ok and bnfast.build_info()["memory"]["held_bytes"] == 0 else 3)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        stop.set()
        thread.join()
        print(codes, bnfast.batch_norm_train(x).y.shape)
    """
    assert run_python(code) == "[0, 0, 0, 0, 0] (300000, 1)\n"


def test_the_interpreter_ends_with_arrays_alive():
    code = """
        import sys, threading
        import bnfast, numpy as np
        bnfast.set_num_threads(3)
        bnfast._core._set_serial_bytes(0)
        x = np.ones((300000, 1), np.float32)
        result = bnfast.batch_norm_train(x)
        sys.kept_to_the_very_end = result.y[5:]
        np.kept_too = memoryview(bnfast.batch_norm_train(x).y)

        class Cycle:
            pass

        c = Cycle()
        c.self, c.y = c, bnfast.batch_norm_train(x).y

        def forever():
            mine = bnfast.batch_norm_train(x)
            threading.Event().wait()

        threading.Thread(target=forever, daemon=True).start()
        print("done")
    """
    assert run_python(code) == "done\n"
