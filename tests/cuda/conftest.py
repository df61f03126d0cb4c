"""The fixtures of the tests of bnfast.cuda: a driver without a GPU, and arrays of each library."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("bnfast.cuda is built on Linux alone", allow_module_level=True)

from bnfast import _cuda
from fake_cuda import Driver, Namespace, RealNamespace, library

ON_DEVICE = bool(os.environ.get("BNFAST_CUDA_DEVICE"))  # a GPU in place of the fake: what needs the fake is skipped
NAMESPACES = ["torch", "cupy", "interface", "dlpack", *([] if ON_DEVICE else ["numba"])]


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if ON_DEVICE:
        pytest.skip("needs the driver of the tests")
    path = library(tmp_path_factory.getbasetemp().parent / "bnfast_fake_cuda")
    if path is None:
        pytest.skip("no C++ compiler for the driver of the tests")
    return path


@pytest.fixture(scope="session")
def loaded_driver(fake_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """The fake is this process's driver. Files that pass for fatbins stand in for a compiler."""
    _cuda._set_driver_library(os.fspath(fake_library))
    images = tmp_path_factory.mktemp("images")
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        (images / f"bnfast_cuda_{dtype}.fatbin").write_bytes(b"an image")
    _cuda.set_image_folder(os.fspath(images))
    return Driver(fake_library)


@pytest.fixture
def driver(loaded_driver: Driver) -> Iterator[Driver]:
    yield loaded_driver
    assert loaded_driver.context == 0, "every device that was made current was left again"


def namespace(name: str, request: pytest.FixtureRequest) -> Any:
    if name == "torch":
        pytest.importorskip("torch")
    if ON_DEVICE:
        return RealNamespace(name)
    return Namespace(name, request.getfixturevalue("monkeypatch"), request.getfixturevalue("driver"))


@pytest.fixture(params=NAMESPACES)
def xp(request: pytest.FixtureRequest) -> Any:
    """Each library's arrays in turn."""
    return namespace(str(request.param), request)


@pytest.fixture
def interface(request: pytest.FixtureRequest) -> Any:
    """One library, where the choice doesn't matter."""
    return namespace("interface", request)


@pytest.fixture
def dlpack(request: pytest.FixtureRequest) -> Any:
    """One that has bfloat16."""
    return namespace("dlpack", request)
