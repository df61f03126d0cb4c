"""Optional frameworks and instruction sets. A test that needs an absent one is skipped, or fails if the environment
variable BNFAST_REQUIRE names it (a comma-separated list: avx2, avx512, torch, tf_keras, onnx, ...)."""

import importlib
import os
from types import ModuleType

import pytest

ISAS = ("baseline", "avx2", "avx512", "neon")
PACKAGES = {"torch", "tf_keras", "keras", "tensorflow", "onnx", "ml_dtypes", "jax", "sklearn", "tf2onnx", "mpi4py"}
PACKAGES |= {"flax", "matplotlib", "rich", "mkdocs", "mkdocstrings", "material"}
KNOWN = {*ISAS, *PACKAGES, "mpirun"}
KNOWN |= {"threadpoolctl", "unshare", "channels_first"}
REQUIRED = {name for name in os.environ.get("BNFAST_REQUIRE", "").replace(" ", "").split(",") if name}


def absent(name: str, why: str) -> None:
    if name in REQUIRED:
        pytest.fail(f"{name} is in BNFAST_REQUIRE, but {why}")
    pytest.skip(f"{name}: {why}")


def need_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        absent(name, f"can't be imported: {error}")
        raise
