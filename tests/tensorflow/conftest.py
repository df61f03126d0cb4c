"""Makes the fixtures of the tests that need TensorFlow visible in this folder."""

from tensorflow_fixtures import each_bridge, gpu, rng

__all__ = ["each_bridge", "gpu", "rng"]
