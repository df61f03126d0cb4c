"""The host's wishes: threadpoolctl's limits, CPU masks set while a team exists, and other interpreters."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest
from bnfast import _thread_pools

pytestmark = pytest.mark.serial

CONTROL = """
import os
assert "bnfast" in {row["user_api"] for row in threadpoolctl.threadpool_info()}
[row] = [row for row in threadpoolctl.threadpool_info() if row["user_api"] == "bnfast"]
assert row["num_threads"] == bnfast.get_num_threads() and row["version"] == bnfast.__version__
assert os.path.samefile(row["filepath"], bnfast._core.__file__)
bnfast.set_num_threads(7)
for arguments in ({"limits": 1}, {"limits": 1, "user_api": "bnfast"}, {"limits": {"bnfast": 1}}):
    with threadpoolctl.threadpool_limits(**arguments):
        assert bnfast.get_num_threads() == 1
    assert bnfast.get_num_threads() == 7
with threadpoolctl.threadpool_limits(1, user_api="blas"):
    assert bnfast.get_num_threads() == 7
assert threadpoolctl.__spec__.loader is threadpoolctl.__loader__
assert type(threadpoolctl.__loader__).__name__ == "SourceFileLoader"
assert not any("bnfast" in type(finder).__module__ for finder in sys.meta_path)
print("right")
"""


def run(code: str, **environment: str) -> str:
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


@pytest.mark.parametrize(
    "imports",
    [
        "import threadpoolctl, bnfast",
        "import bnfast, threadpoolctl",
        "import bnfast; threadpoolctl = __import__('threadpoolctl'); import importlib; importlib.reload(bnfast)",
        "import bnfast, importlib.util; assert importlib.util.find_spec('threadpoolctl').origin; import threadpoolctl",
    ],
)
def test_threadpoolctl_lists_and_limits_bnfast(imports, need):
    need("threadpoolctl")
    assert run(f"import sys\n{imports}\n{CONTROL}") == "right\n"


def test_without_threadpoolctl_its_import_fails_as_ever():
    code = """
        import sys
        import bnfast
        sys.path = [entry for entry in sys.path if "site-packages" not in entry]
        for _ in range(2):
            try:
                import threadpoolctl
            except ModuleNotFoundError as error:
                print(error)
    """
    assert run(code) == "No module named 'threadpoolctl'\n" * 2


@pytest.fixture
def fresh(monkeypatch):
    """sys.meta_path and sys.modules as before any import of threadpoolctl."""
    finders = [one for one in sys.meta_path if not isinstance(one, _thread_pools._Finder)]
    monkeypatch.setattr(sys, "meta_path", finders)
    monkeypatch.delitem(sys.modules, "threadpoolctl", raising=False)
    return finders


def test_one_finder_watches(fresh):
    before = [*fresh]
    for _ in range(2):
        _thread_pools.watch()
    assert type(fresh[0]) is _thread_pools._Finder
    assert fresh[1:] == before


@pytest.mark.parametrize(
    ("source", "registers"),
    [
        ("", False),  # older than 3.2
        ("_ALL_USER_APIS = ['bnfast']\ndef register(controller): raise AssertionError('twice')", False),
        ("made = []\nregister = made.append\nclass LibController: pass", True),
    ],
    ids=["old", "done", "new"],
)
def test_the_controller_is_registered_once_and_where_there_are_controllers(
    fresh, tmp_path, monkeypatch, source, registers
):
    (tmp_path / "threadpoolctl.py").write_text(source)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    _thread_pools.watch()
    watching = fresh[0]
    spec = importlib.util.find_spec("threadpoolctl")
    assert spec.loader.get_source("threadpoolctl") == source, "as the loader that it stands for"
    fresh.remove(watching)  # somebody else took it away in the meantime
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert [one.user_api for one in getattr(module, "made", [])] == ["bnfast"] * registers
    monkeypatch.setitem(sys.modules, "threadpoolctl", module)
    _thread_pools.watch()
    assert len(getattr(module, "made", [])) == 2 * registers, "a loaded module is asked at once"


def test_a_folder_named_threadpoolctl_is_imported_as_ever(fresh, tmp_path, monkeypatch):
    """A namespace package has no loader before it is imported."""
    (tmp_path / "threadpoolctl").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    wanted = importlib.util.find_spec("threadpoolctl")
    _thread_pools.watch()
    found = importlib.util.find_spec("threadpoolctl")
    assert (found.name, found.loader, [*found.submodule_search_locations]) == (
        wanted.name,
        wanted.loader,
        [*wanted.submodule_search_locations],
    )


def test_a_subinterpreter_is_an_import_error_and_no_hang():
    code = """
        try:
            import _interpreters as interpreters
        except ImportError:
            import _xxsubinterpreters as interpreters
        number = interpreters.create()
        try:
            failed = interpreters.run_string(number, "import bnfast._core")
            print(failed)
        except Exception as error:
            print(error)
    """
    try:
        output = run(code)
    except AssertionError as error:
        if "No module named" in str(error):
            pytest.skip("this Python has no subinterpreters")
        raise
    assert "ImportError" in output
    assert "subinterpreter" in output


TEAM = """
import os
import numpy as np
import bnfast
from bnfast import _core
_core._set_serial_bytes(0)
_core._set_full_team(True)
bnfast.set_num_threads(3)
x = np.random.default_rng(0).standard_normal((500, 40)).astype("float32")
expected = [a.tobytes() for a in bnfast.batch_norm_train(x)]
every = os.sched_getaffinity(0)
main = os.getpid()
tasks = lambda: [int(task) for task in os.listdir("/proc/self/task")]

def work():
    import time
    for _ in range(40):
        time.sleep(0.001)  # the workers fall asleep, so that the next call wakes and places them
        assert [a.tobytes() for a in bnfast.batch_norm_train(x)] == expected
        assert _core._last_run()[1] == 3
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two processors"
)
@pytest.mark.parametrize("first", [True, False])
def test_a_changed_mask_is_honoured(first):
    """`taskset -ap`: all threads; the team that exists before keeps to it, and to the wider one given back later."""
    code = f"""
        {"work()" if first else "pass"}
        one = min(every)
        for cpus in ({{one}}, {{max(every)}}, every, {{one}}):
            for task in tasks():
                os.sched_setaffinity(task, cpus)
            work()
            masks = [os.sched_getaffinity(task) for task in tasks()]
            assert all(mask <= cpus for mask in masks), (cpus, masks)
            assert os.sched_getaffinity(main) == cpus
        print("right")
    """
    assert run(TEAM + textwrap.dedent(code)) == "right\n"


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two processors"
)
def test_the_workers_follow_the_process():
    """os.sched_setaffinity(0, ...) restricts the main thread alone, and means the process."""
    code = """
        work()
        for cpus in ({min(every)}, {max(every)}, every):
            os.sched_setaffinity(0, cpus)
            work()
            masks = [os.sched_getaffinity(task) for task in tasks()]
            names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in tasks()]
            mine = [mask for mask, name in zip(masks, names) if name == "bnfast"]
            assert all(mask <= cpus for mask in mine), (cpus, mine)
        worker = tasks()[-1]
        os.sched_setaffinity(worker, {max(every)})  # one worker's alone
        work()
        assert os.sched_getaffinity(worker) == {max(every)}
        print("right")
    """
    assert run(TEAM + textwrap.dedent(code)) == "right\n"
