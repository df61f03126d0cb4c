"""The fixtures of the tests of bnfast.cuda: a driver without a GPU, and arrays of each library."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("bnfast.cuda is built on Linux alone", allow_module_level=True)

from bnfast import _cuda
from fake_cuda import Driver, Namespace, library

NAMESPACES = ["torch", "cupy", "interface", "dlpack", "numba"]


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


@pytest.fixture(params=NAMESPACES)
def xp(request: pytest.FixtureRequest, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """Each library's arrays in turn."""
    if request.param == "torch":
        pytest.importorskip("torch")
    return Namespace(str(request.param), monkeypatch, driver)


@pytest.fixture
def interface(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """One library, where the choice doesn't matter."""
    return Namespace("interface", monkeypatch, driver)
