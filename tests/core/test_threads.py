"""Invariant 7, threads are polite: the requested number runs, host threads do not multiply it; fork and the GIL."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import bnfast
import numpy as np
import pytest
from bnfast import _core

pytestmark = pytest.mark.serial  # counts threads and forks

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, sets the affinity")
x86 = pytest.mark.skipif(_core._fp_mode() & 0x1F80 != 0x1F80, reason="MXCSR is x86's")
X = np.random.default_rng(0).standard_normal((500, 40)).astype(np.float32)


def run_python(code, **environment):
    """The output of `code` in another process. A hang or a signal is a failure."""
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = os.environ | {"PYTHONPATH": path} | environment
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, (run.returncode, run.stderr)
    return run.stdout


def os_threads():
    status = Path("/proc/self/status").read_text()
    return int(status.split("Threads:")[1].split()[0])


def test_an_explicit_number_is_honoured(force_threads):
    for n in (1, 2, 5, 8):
        force_threads(n)
        assert bnfast.get_num_threads() == n
        bnfast.batch_norm_train(X)
        assert _core._last_run()[1] == n


def test_small_work_stays_on_the_calling_thread():
    bnfast.set_num_threads(4)
    try:
        bnfast.batch_norm_train(X[:8])
        assert _core._last_run()[1] == 1
    finally:
        bnfast.set_num_threads(None)


@linux
def test_the_default_is_the_affinity():
    code = """
        import os
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(allowed)})
        import bnfast
        info = bnfast.build_info()
        print(bnfast.get_num_threads(), info["default_threads"], info["threads_reason"])
    """
    number, default, reason = run_python(code).split(maxsplit=2)
    assert (number, default) == ("1", "1")
    assert "affinity" in reason
    assert 1 <= int(run_python("import bnfast; print(bnfast.get_num_threads())")) <= len(os.sched_getaffinity(0))


@linux
def test_the_default_comes_back_and_an_explicit_number_may_exceed_it():
    code = """
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        import bnfast
        bnfast.set_num_threads(3)
        print(bnfast.get_num_threads())
        bnfast.set_num_threads(None)
        print(bnfast.get_num_threads())
    """
    assert run_python(code).split() == ["3", "1"]


@linux
def test_many_host_threads_get_equal_results_and_no_threads_of_their_own(force_threads):
    """Host threads call one by one (each could start a team), then all at once, and stay alive to be counted."""
    force_threads(4)
    expected = [a.tobytes() for a in bnfast.batch_norm_train(X)]
    _core._set_full_team(False)
    before, hosts = os_threads(), 12
    turn, together = threading.Lock(), threading.Barrier(hosts + 1)
    wrong = []

    def host():
        def call():
            if [a.tobytes() for a in bnfast.batch_norm_train(X)] != expected:
                wrong.append(threading.get_ident())

        with turn:
            call()
        together.wait(60)
        for _ in range(40):
            call()
        together.wait(60)  # the threads are counted between these two waits
        together.wait(60)

    threads = [threading.Thread(target=host, daemon=True) for _ in range(hosts)]
    for thread in threads:
        thread.start()
    together.wait(60)
    together.wait(60)
    count = os_threads()
    together.wait(60)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []
    assert count <= before + hosts + 1


@linux
@pytest.mark.parametrize("used_before", [True, False])
def test_alive_after_fork(used_before):
    code = f"""
        import os, signal
        import bnfast
        import numpy as np
        from bnfast import _core
        _core._set_serial_bytes(0)
        bnfast.set_num_threads(3)
        x = np.random.default_rng(0).standard_normal((500, 40)).astype("float32")
        if {used_before}:
            here = bnfast.batch_norm_train(x)
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # a hang ends by signal
            y = [bnfast.batch_norm_train(x) for _ in range(5)][-1]
            grandchild = os.fork()
            if grandchild == 0:
                signal.alarm(20)
                bnfast.batch_norm_train(x)
                os._exit(0)
            ended = os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
            equal = not {used_before} or all(np.array_equal(a, b) for a, b in zip(y, here))
            os._exit(ended or (0 if equal else 3))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        _core._set_full_team(True)
        bnfast.batch_norm_train(x)
        print(_core._last_run()[1])
    """
    assert run_python(code).split() == ["0", "3"]


def test_the_gil_is_released():
    """Another Python thread records the time while the core works, which it can only do if the GIL is released."""
    x = np.zeros((1 << 22, 8), np.float32)  # 128 MiB: tens of milliseconds
    bnfast.set_num_threads(1)
    stop, inside = threading.Event(), []
    notes = []

    def note():
        while not stop.is_set():
            notes.append(time.perf_counter())
            time.sleep(0.0002)

    thread = threading.Thread(target=note)
    thread.start()
    try:
        for _ in range(3):
            begin = time.perf_counter()
            bnfast.moments(x)
            end = time.perf_counter()
            margin = (end - begin) / 4
            inside.append((begin + margin, end - margin))
    finally:
        stop.set()
        thread.join()
        bnfast.set_num_threads(None)
    assert sum(begin < t < end for t in notes for begin, end in inside) >= 3


@x86
@pytest.mark.parametrize("mode", [0x8040, 0x2000, 0x6000, 0x8040 | 0x4000])
def test_the_callers_floating_point_mode_comes_back(mode, force_threads, force_fp_mode):
    """Flush to zero and the rounding directions. A change would also show in NumPy's operations in between."""
    for threads in (1, 3):
        force_threads(threads)
        expected = bnfast.batch_norm_train(X)
        usual = _core._fp_mode()
        force_fp_mode(mode)
        wanted = _core._fp_mode() & 0xFFC0
        try:
            result = bnfast.batch_norm_train(X)
            grad = bnfast.batch_norm_grad(X, X, result.mean, result.invstd)
            after = _core._fp_mode() & 0xFFC0
        finally:
            _core._set_fp_mode(usual)
        assert wanted == (usual & 0xFFC0) | mode
        assert after == wanted
        assert all(np.array_equal(a, b) for a, b in zip(result, expected, strict=True))
        assert np.isfinite(grad.dx).all()


@x86
def test_an_error_leaves_the_mode_too(force_fp_mode):
    force_fp_mode(0x8040)
    before = _core._fp_mode() & 0xFFC0
    with pytest.raises(FloatingPointError):
        bnfast.batch_norm_train(np.full((4, 2), np.nan, np.float32), nan_policy="raise")
    assert _core._fp_mode() & 0xFFC0 == before


FIRST_CALLS = """
import sys, threading
import numpy as np
import bnfast
sys.setswitchinterval(1e-6)
x, barrier = np.ones((8, 4), np.float32), threading.Barrier(8)
def call():
    barrier.wait()
    bnfast.moments(x)
threads = [threading.Thread(target=call) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_the_first_calls_of_a_process_may_come_from_many_threads():
    """Two of three such processes hung when a C++ static was initialized by a call that releases the GIL."""
    for _ in range(4):
        run_python(FIRST_CALLS)
