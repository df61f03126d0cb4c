"""The examples in the docstrings of bnfast.cuda run on the driver of the tests, with arrays of torch and JAX there."""

import importlib
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from docstrings import public, run_example
from fake_cuda import Driver, Namespace

NAMES = [(space, name) for space in ("bnfast.cuda", "bnfast.cuda.autograd") for name in public(space)]


@pytest.fixture
def arrays(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.tensor(device="cuda") and jax.numpy.ones make arrays that pass for the device's."""
    torch = pytest.importorskip("torch")
    from bnfast.cuda import libraries

    namespace, plain, own = Namespace("torch", monkeypatch, driver), torch.tensor, libraries.Torch.view
    on_device = namespace.classes[0]
    monkeypatch.setattr(torch, "tensor", lambda values, device: namespace.to(plain(values).numpy()))
    # torch's engine makes gradients as plain tensors
    monkeypatch.setattr(
        libraries.Torch, "view", lambda self, name, value: own(self, name, value.as_subclass(on_device))
    )
    jax, numpy = ModuleType("jax"), ModuleType("jax.numpy")
    other = Namespace("dlpack", monkeypatch, driver)
    numpy.ones = lambda shape: other.to(np.ones(shape, np.float32))  # type: ignore[attr-defined]
    jax.numpy = numpy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setitem(sys.modules, "jax.numpy", numpy)


@pytest.mark.parametrize(("space", "name"), NAMES, ids=[f"{space}.{name}" for space, name in NAMES])
def test_the_example_runs(arrays: Any, space: str, name: str) -> None:
    run_example(f"{space}.{name}", getattr(importlib.import_module(space), name))
