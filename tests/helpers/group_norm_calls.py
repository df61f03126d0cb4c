"""Shapes and calls for the tests of group and layer norm."""

import bnfast
import numpy as np
import sample_data

GROUP_CASES = [  # (shape, channel axis, groups)
    ((5, 6), 1, 3),
    ((300, 64), -1, 2),
    ((4, 7, 1), 1, 7),
    ((4, 1, 9), 1, 1),
    ((3, 6, 35), 1, 2),
    ((3, 35, 6), 2, 6),
    ((2, 23, 7, 7), 1, 1),
    ((2, 7, 5, 24), -1, 8),
    ((5, 1, 1, 12), 3, 4),
    ((2, 3, 15, 4), 2, 5),
    ((1, 4, 3, 2, 70), 1, 2),
    ((2, 3, 2, 5, 21), 4, 7),
    ((1, 2, 200001), 1, 2),
    ((2, 60001, 3), 2, 1),
    ((131, 7, 12), 2, 4),
    ((150, 12, 5), 1, 4),
]
LAYER_CASES = [  # (shape, axes)
    ((7,), (0,)),
    ((5, 1), (1,)),
    ((300, 24), (-1,)),
    ((3, 5, 768), (-1,)),
    ((4, 3, 50), (1, 2)),
    ((2, 3, 4, 5), (1, 2, 3)),
    ((3, 17, 6), (1,)),
    ((3, 5, 4, 2), (3, 1)),
    ((6, 4), (0,)),
    ((4, 6), (0, 1)),
    ((2, 2, 3, 2, 5), (2, 3, 4)),
    ((2, 100003), (1,)),
]


def inputs(shape, vector, dtype, affine=True, offset=0.0, seed=0):
    """x, dy, gamma, beta."""
    rng = np.random.default_rng(seed + sum(shape))
    dtype = sample_data.dtype_of(dtype) if isinstance(dtype, str) else dtype
    parameter = np.float64 if dtype == np.float64 else np.float32
    x = (rng.standard_normal(shape) * 2 + 0.5 + offset).astype(dtype)
    dy = rng.standard_normal(shape).astype(dtype)
    gamma, beta = (rng.uniform(0.5, 2, vector) * rng.choice([-1, 1], vector)).astype(parameter), rng.normal(size=vector)
    return x, dy, gamma if affine else None, beta.astype(parameter) if affine else None


def group_call(x, dy, gamma, beta, axis, groups, **kwargs):
    forward = bnfast.group_norm(x, groups, gamma, beta, axis=axis, **kwargs)
    return forward, bnfast.group_norm_grad(dy, x, forward.mean, forward.invstd, groups, gamma, axis=axis)


def layer_call(x, dy, gamma, beta, axes, **kwargs):
    forward = bnfast.layer_norm(x, gamma, beta, axis=axes, **kwargs)
    return forward, bnfast.layer_norm_grad(dy, x, forward.mean, forward.invstd, gamma, axis=axes)
