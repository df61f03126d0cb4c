"""bnfast.distributed.mpi: 2 and 4 ranks, started with mpirun, against one process. The ranks run mpi_ranks.py."""

import importlib
import inspect
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import bnfast
import mpi_ranks
import numpy as np
import pytest
from needs import absent

pytestmark = pytest.mark.serial  # starts four processes

PROGRAM = Path(mpi_ranks.__file__)
SAME_EVERYWHERE = [
    "moments.count",
    "moments.mean",
    "moments.variance",
    "train.mean",
    "train.variance",
    "train.invstd",
    "grad.dgamma",
    "grad.dbeta",
    "frozen.dgamma",
    "frozen.dbeta",
    "moving_mean",
    "moving_variance",
]
SHARDED = ["train.y", "grad.dx", "grad.dresidual", "frozen.dx", "frozen.dresidual"]


@pytest.fixture(scope="module", params=[2, 4])
def world(request, need, tmp_path_factory):
    """The results of each rank, in rank order."""
    need("mpi4py")
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        absent("mpirun", "is not on PATH")
    size, folder = request.param, tmp_path_factory.mktemp("ranks")
    command = [mpirun, "-n", str(size)]
    if "Open MPI" in subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=True).stdout:
        command += ["--allow-run-as-root", "--oversubscribe"]
    command += [sys.executable, str(PROGRAM), str(size), str(folder)]
    # Where a test before imported mpi4py, MPI has put variables of its own into the C environment, which os.environ
    # doesn't show, and with which mpirun ends at once.
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(size)]


def equal(a, b):
    return np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f")


def check(name, actual, expected):
    """Equal to 1e-6 of the largest value, plus one unit in the last place for half types.

    Non-finite values need only be non-finite in both, because the last bit of a mean decides whether a sum with
    infinities is NaN.
    """
    assert actual.dtype == expected.dtype, name
    assert actual.shape == expected.shape, name
    assert equal(np.isfinite(actual), np.isfinite(expected)), name
    half, finite = expected.dtype == np.float16, np.isfinite(expected)
    actual, expected = actual[finite].astype(np.float64), expected[finite].astype(np.float64)
    largest = np.max(np.abs(expected), initial=0)
    np.testing.assert_allclose(actual, expected, rtol=1e-3 if half else 0, atol=1e-6 * largest, err_msg=name)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", mpi_ranks.CASES)
def test_equals_one_process(world, name, uneven):
    results = [rank[name, uneven] for rank in world]
    expected = mpi_ranks.run(bnfast, mpi_ranks.whole(name))
    for key in SAME_EVERYWHERE:
        assert all(equal(result[key], results[0][key]) for result in results), key
        check(key, np.asarray(results[0][key]), np.asarray(expected[key]))
    for key in SHARDED:
        if expected[key] is None:
            assert all(result[key] is None for result in results)
        else:
            check(key, np.concatenate([result[key] for result in results]), expected[key])


@pytest.mark.parametrize("name", mpi_ranks.CASES)
def test_one_rank_gives_the_bits_of_bnfast(world, name):
    expected = mpi_ranks.run(bnfast, mpi_ranks.whole(name))
    for key, value in world[0][name, "self"].items():
        assert equal(value, expected[key]) if value is not None else expected[key] is None, key


def test_an_empty_batch_changes_nothing(world):
    for rank in world:
        for key, before in zip(("moving_mean", "moving_variance"), mpi_ranks.whole("empty")["moving"], strict=True):
            assert equal(rank["empty", True][key], before)


def test_halves_of_the_world(world):
    case = mpi_ranks.whole("channels_last")
    places = mpi_ranks.cuts(len(case["x"]), len(world), False)
    for parity in (0, 1):
        members = range(parity, len(world), 2)
        rows = np.concatenate([np.arange(*places[rank]) for rank in members])
        expected = mpi_ranks.run(
            bnfast, mpi_ranks.shard({**case, "x": case["x"][rows], "dy": case["dy"][rows]}, 0, None)
        )
        check("y", np.concatenate([world[rank]["halves"]["train.y"] for rank in members]), expected["train.y"])
        check("dx", np.concatenate([world[rank]["halves"]["grad.dx"] for rank in members]), expected["grad.dx"])


def test_in_place(world):
    case = mpi_ranks.whole("channels_last")
    train = bnfast.batch_norm_train(case["x"])
    grad = bnfast.batch_norm_grad(case["dy"], case["x"], train.mean, train.invstd)
    results = [rank["in_place"] for rank in world]
    assert all(result["same"] for result in results)
    check("y", np.concatenate([result["y"] for result in results]), train.y)
    check("dx", np.concatenate([result["dx"] for result in results]), grad.dx)
    check("dgamma", results[-1]["dgamma"], grad.dgamma)


def test_an_error_on_one_rank_is_an_error_on_all(world):
    first, *others = [rank["errors"] for rank in world]
    size = len(world)
    assert first["gamma"] == "ValueError: gamma must have shape (3,) to match axis -1 of x. Received: (2,)"
    assert first["grad"] == "ValueError: axis must be in [-2, 2) for x of shape (4, 3). Received: 2"
    received = [3] + [2] * (size - 1)
    for other in others:
        assert other["gamma"] == f"RuntimeError: rank 0 of {size} failed: {first['gamma']}"
        assert other["grad"] == f"RuntimeError: rank 0 of {size} failed: {first['grad']}"
    for rank in (first, *others):
        assert rank["channels"] == (
            f"ValueError: x must have the same number of channels on every rank. Received, by rank: {received}"
        )
        assert rank["extents"].endswith(f"Received, by rank: {[(3, 4)] + [(3, 1)] * (size - 1)}")
        text = "x has non-finite batch statistics in channels 0, 1, 2"
        assert rank["nan_policy"] == f"FloatingPointError: {text}"
        assert rank["comm"] == "TypeError: comm must be an mpi4py intracommunicator or None. Received: int"
        assert equal(rank["moving"], [[0, 0, 0], [1, 1, 1]])
        assert rank["count after"] == 4 * size


def test_the_arguments_are_those_of_bnfast(need):
    need("mpi4py")
    from bnfast.distributed import mpi

    alone = {"dmean", "dvariance", "out_dresidual"}
    for name in mpi.__all__:
        parameters = (inspect.signature(getattr(package, name)).parameters for package in (mpi, bnfast))
        ours, theirs = ([str(p) for p in each.values() if p.name not in alone] for each in parameters)
        assert ours == [*theirs, "comm: 'Any' = None"], name


def test_without_mpi4py_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "bnfast.distributed.mpi", raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match=r'pip install "bnfast\[mpi\]", and an MPI library'):
        importlib.import_module("bnfast.distributed.mpi")
