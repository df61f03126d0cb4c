"""Shapes, dtypes and random inputs that the tests of the NumPy API share."""

import math

import numpy as np
from needs import need_module

SHAPES = [  # (shape, axis)
    ((257,), 0),
    ((1, 23), -1),
    ((64, 1), 1),
    ((64, 23), -1),
    ((23, 64), 0),
    ((3000, 100), -1),
    ((100, 3000), 0),
    ((2, 3, 49), 1),
    ((5, 49, 3), -1),
    ((1, 257, 1), 1),
    ((3, 5, 20011), 1),
    ((3, 7, 7, 23), 3),
    ((3, 23, 7, 7), 1),
    ((5, 100, 7, 7), -3),
    ((2, 5, 257, 3), 2),
    ((1, 1, 1, 1), 0),
    ((2, 3, 7, 5, 23), 4),
    ((2, 23, 3, 7, 5), 1),
    ((4, 3, 2, 7, 5), 0),
]
EMPTY = [((0,), 0), ((0, 3), 1), ((4, 0), 1), ((0, 0), 0), ((2, 3, 0), 1), ((0, 3, 5, 5), 1), ((2, 0, 3), -1)]
DTYPES = ["float32", "float64", "float16", "bfloat16"]
ACTIVATIONS = [None, "relu", "relu6", "leaky_relu"]


def dtype_of(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    return np.dtype(need_module("ml_dtypes").bfloat16)


def batch(shape, axis, dtype, rng, offset=0.0):
    """Random values. The channels differ in mean and standard deviation."""
    channels = [1] * len(shape)
    channels[axis] = shape[axis]
    deviation = rng.uniform(0.3, 3, channels)
    return (rng.standard_normal(shape) * deviation + rng.uniform(-2, 2, channels) + offset).astype(dtype)


def vectors(channels, rng, dtype="float32"):
    """gamma (of both signs), beta, moving_mean, moving_variance."""
    gamma = rng.uniform(0.5, 2, channels) * rng.choice([-1, 1], channels)
    arrays = gamma, rng.uniform(-1, 1, channels), rng.uniform(-1, 1, channels), rng.uniform(0.5, 2, channels)
    return tuple(a.astype(dtype) for a in arrays)


def in_center_sample(shape, axis):
    """Which values the kernels take a block's center from, in the shape of x without the channel axis: every fourth row
    of columns or short rows, every fourth group of 64 values of longer rows."""
    axis = axis % len(shape)
    rest = (*shape[:axis], *shape[axis + 1 :])
    inner, place = math.prod(shape[axis + 1 :]), np.arange(math.prod(rest)).reshape(rest)
    return (place // inner if inner <= 64 else place % inner // 64) % 4 == 0
