"""Batches and trained NumPy layers for the tests of conversion."""

import numpy as np
import sample_data
from bnfast import BatchNormalization


def batches(n=5, rows=7, channels=4, dtype=np.float32, seed=1):
    rng = np.random.default_rng(seed)
    return [sample_data.batch((rows, channels), 1, dtype, rng, offset=2) for _ in range(n)]


def trained(**options):
    layer = BatchNormalization(**options)
    for x in batches():
        layer(x, training=True)
    rng = np.random.default_rng(2)
    gamma, beta, *_ = sample_data.vectors(4, rng)
    if layer.scale:
        layer.gamma[:] = gamma
    if layer.center:
        layer.beta[:] = beta
    return layer


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-6)
