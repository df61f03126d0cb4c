"""Threads, memory settings, build information, and what importing bnfast imports."""

import json
import os
import subprocess
import sys
from importlib import metadata

import bnfast
import numpy as np
import pytest
from bnfast.__main__ import _leave_working_directory

pytestmark = pytest.mark.serial  # measures the time of an import


def test_threads_round_trip():
    default = bnfast.get_num_threads()
    assert default == bnfast.build_info()["default_threads"]
    try:
        for n in (1, np.int64(3), 8):
            bnfast.set_num_threads(n)
            assert bnfast.get_num_threads() == n
            assert bnfast.build_info()["threads"] == n
    finally:
        bnfast.set_num_threads(None)
    assert bnfast.get_num_threads() == default


@pytest.mark.parametrize(
    ("n", "error", "text"),
    [
        (0, ValueError, r"n must be in \[1, 4096\]. Received: 0"),
        (-1, ValueError, "Received: -1"),
        (10**9, ValueError, "Received: 1000000000"),
        (1.0, TypeError, "n must be an integer or None. Received: 1.0"),
        (True, TypeError, "n must be an integer or None. Received: True"),
    ],
)
def test_bad_thread_count(n, error, text):
    before = bnfast.get_num_threads()
    with pytest.raises(error, match=text):
        bnfast.set_num_threads(n)
    assert bnfast.get_num_threads() == before


def test_build_info():
    info = bnfast.build_info()
    assert info["isa"] in info["isas"]
    assert "baseline" in info["isas"]
    for name in ("isa_reason", "threads_reason", "compiler", "flags", "threading"):
        assert info[name]
        assert isinstance(info[name], str)
    assert 0 < info["l1d_bytes"] <= info["l2_bytes"]
    assert info["l3_bytes"] >= 0


@pytest.fixture
def memory():
    """An empty pool of output memory; its limit is restored afterwards."""
    limit = bnfast.memory_statistics()["limit_bytes"]
    bnfast.clear_memory()
    yield
    bnfast.set_memory_limit(limit)
    bnfast.clear_memory()


def test_output_memory_is_kept_counted_and_given_back(memory):
    x, statistics = np.zeros((4096, 256), "float32"), np.ones((2, 256), "float32")
    before = bnfast.memory_statistics()
    assert before == bnfast.build_info()["memory"]
    assert before["held_bytes"] == 0
    y = bnfast.batch_norm_infer(x, *statistics)
    assert bnfast.memory_statistics()["in_use_bytes"] >= before["in_use_bytes"] + x.nbytes
    address = y.ctypes.data
    del y
    held = bnfast.memory_statistics()
    assert held["held_bytes"] >= x.nbytes
    assert held["in_use_bytes"] == before["in_use_bytes"]
    y = bnfast.batch_norm_infer(x, *statistics)
    assert y.ctypes.data == address
    assert bnfast.memory_statistics()["reused"] == held["reused"] + 1
    del y
    bnfast.clear_memory()
    assert bnfast.memory_statistics()["held_bytes"] == 0


def test_memory_limit(memory):
    x, statistics = np.zeros((4096, 256), "float32"), np.ones((2, 256), "float32")
    bnfast.batch_norm_infer(x, *statistics)
    bnfast.set_memory_limit(np.int64(1000))
    after = bnfast.memory_statistics()
    assert after["limit_bytes"] == 1000
    assert after["held_bytes"] <= 1000, "a lower limit holds at once"
    y = bnfast.batch_norm_infer(x, *statistics)
    assert (y == bnfast.batch_norm_infer(x, *statistics)).all(), "a limit makes no call fail"
    bnfast.set_memory_limit(0)
    del y
    assert bnfast.memory_statistics()["held_bytes"] == 0


def test_memory_limit_says_what_it_wants(memory):
    for wrong in (1.5, "many", None, True):
        with pytest.raises(TypeError, match=r"limit_bytes must be an integer\. Received: "):
            bnfast.set_memory_limit(wrong)
    for wrong in (-1, 2**63):
        with pytest.raises(ValueError, match=rf"limit_bytes must be in \[0, 2\*\*63\)\. Received: {wrong}"):
            bnfast.set_memory_limit(wrong)


def test_version():
    assert bnfast.__version__ == bnfast.build_info()["version"]
    with pytest.raises(AttributeError, match=r"module 'bnfast' has no attribute 'nonsense'"):
        bnfast.nonsense  # noqa: B018
    try:
        installed = metadata.version("bnfast")
    except metadata.PackageNotFoundError:
        pytest.skip("bnfast is not installed: it runs from the source tree")
    assert bnfast.__version__ == installed


def test_dir_names_what_is_imported_later():
    names = dir(bnfast)
    assert names == sorted({*names})
    assert {*bnfast.__all__, "BatchNormalization", "layers", "keras", "torch", "jax", "cuda"} <= {*names}


def test_the_command_leaves_the_working_directory_alone(tmp_path, monkeypatch):
    """`python -m` puts it first; whatever else is first stays, as with `python -P` or in a deleted directory."""
    own = os.path.dirname(sys.executable)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    for path, wanted in (([str(gone), "b"], [own, "b"]), (["a", str(gone)], ["a", str(gone)]), ([], [])):
        monkeypatch.setattr(sys, "path", path)
        _leave_working_directory()
        assert path == wanted
    gone.rmdir()
    monkeypatch.setattr(sys, "path", path := [str(gone)])
    _leave_working_directory()
    assert path == [str(gone)]


def test_import_brings_numpy_and_nothing_heavier():
    code = "import sys, numpy; before = set(sys.modules); import bnfast; print(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"keras", "tensorflow", "torch", "ml_dtypes", "sklearn", "matplotlib", "importlib.metadata", "argparse"}
    assert not heavy & {name for name in run.stdout.split()}
    assert "bnfast._core" in run.stdout


@pytest.mark.parametrize("name", ["nonsense", "AVX2", "", "a\nb\033"])
def test_unknown_isa_in_the_environment(name):
    """One line on stderr, the best instruction set, and `bnfast info` says why; an empty value counts as not set."""
    shown = name.replace("\n", "?").replace("\033", "?")
    command = [sys.executable, "-m", "bnfast", "info", "--json"]
    environment = os.environ | {"BNFAST_ISA": name}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    info = json.loads(done.stdout)
    assert info["isa"] == info["isas"][0]
    if not name:
        assert done.stderr == ""
        assert info["isa_reason"] == "best of this processor"
        return
    assert done.stderr == (
        f"bnfast: BNFAST_ISA must be one of {', '.join(info['isas'])} on this processor. Received: '{shown}'. "
        f"{info['isa']} is used.\n"
    )
    assert info["isa_reason"] == f"best of this processor; BNFAST_ISA={shown} can't be used"


def test_namespaces_are_imported_when_they_are_used():
    code = (
        "import sys, types, bnfast; assert 'bnfast.torch' not in sys.modules; sys.modules['torch'] = None\n"
        "try: bnfast.torch\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == 'bnfast.torch needs PyTorch, which is not installed: pip install "bnfast[torch]"\n'
    if sys.platform == "linux":
        code = "import sys, bnfast; bnfast.cuda.status; assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)
