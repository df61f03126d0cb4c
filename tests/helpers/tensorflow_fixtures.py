"""Fixtures of the tests that need TensorFlow.

Without TensorFlow each test module is skipped. If BNFAST_REQUIRE contains "tensorflow", its absence is an error.
"""

import importlib
import os
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from needs import absent

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

if "tensorflow" in os.environ.get("BNFAST_REQUIRE", ""):
    importlib.import_module("tensorflow")  # raises ImportError instead of skipping


@pytest.fixture(scope="session")
def channels_first_convolutions() -> None:
    """TensorFlow has them on processors that oneDNN serves by default, those with AVX-512 among them."""
    import tensorflow as tf

    try:
        tf.nn.conv2d(tf.ones([1, 1, 2, 2]), tf.ones([1, 1, 1, 1]), 1, "VALID", data_format="NCHW")
    except tf.errors.UnimplementedError as error:
        absent("channels_first", f"TensorFlow can't convolve: {str(error).splitlines()[0]}")


@pytest.fixture(params=["numpy_function", "op"])
def each_bridge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test once per bridge from TensorFlow to the kernels; the value is its name. Linux always has the op."""
    from bnfast.tensorflow import op

    name = str(request.param)
    available, reason = op.status()
    if name == "op" and not available:
        (pytest.fail if sys.platform == "linux" else pytest.skip)(f"op: {reason}")
    monkeypatch.setenv("BNFAST_BRIDGE", name)
    return name


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow says that it sees a GPU. Its ops still run on the CPU."""
    import tensorflow as tf
    from bnfast.tensorflow import op

    own = tf.config.get_visible_devices
    device = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind=None: [device] if kind == "GPU" else own(kind))
    monkeypatch.setattr(op, "_logged", False)
    monkeypatch.delenv("BNFAST_BRIDGE", raising=False)


@pytest.fixture
def float64() -> Iterator[None]:
    """Keras layers and inputs are float64 in this test."""
    import keras

    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2026)
