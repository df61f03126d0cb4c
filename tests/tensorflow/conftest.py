"""The fixtures of tests that need TensorFlow."""

from tensorflow_fixtures import each_bridge, rng

__all__ = ["each_bridge", "rng"]
