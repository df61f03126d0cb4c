"""Makes the fixtures of the tests that need TensorFlow visible in this folder."""

from tensorflow_fixtures import each_bridge, rng

__all__ = ["each_bridge", "rng"]
