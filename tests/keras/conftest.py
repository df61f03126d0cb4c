"""Makes the fixtures of the tests that need TensorFlow visible in this folder."""

import pytest
from tensorflow_fixtures import channels_first_convolutions, each_bridge, float64, gpu, rng

__all__ = ["channels_first_convolutions", "each_bridge", "float64", "gpu", "rng"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "requires_trainable_backend: used in Keras's own test suite")
