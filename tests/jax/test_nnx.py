"""bnfast.jax.nnx.BatchNorm against flax.nnx.BatchNorm: Flax's tests of its linen and nnx batch norm, restated."""

import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bnfast.jax.nnx import BatchNorm
from flax import nnx

BOTH = (nnx.BatchNorm, BatchNorm)


def pair(features, **kwargs):
    return [one(features, rngs=nnx.Rngs(0), **kwargs) for one in BOTH]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 2 + 1)


def close(ours, theirs, tolerance=1e-5):
    ours, theirs = (jax.tree.leaves(one) for one in (ours, theirs))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(a, np.float64) for a in (one, other))
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def test_the_result_has_mean_0_and_variance_1_and_statistics_are_averaged():
    x, layer = normal(4, 3, 2), BatchNorm(2, momentum=0.9, epsilon=1e-5, rngs=nnx.Rngs(0))
    y = layer(x)
    close(y.mean((0, 1)), jnp.zeros(2), 1e-4)
    close(y.var((0, 1)), jnp.ones(2), 1e-4)
    close(layer.mean[...], 0.1 * x.mean((0, 1)))
    close(layer.var[...], 0.9 + 0.1 * x.var((0, 1)))
    before = nnx.state(layer)
    layer(x, use_running_average=True)
    close(nnx.state(layer), before, 0)


CASES = list(
    itertools.product([jnp.float32, jnp.float16, jnp.bfloat16, None], [jnp.float32, jnp.float16], [0, 1, 2, 3])
)


@pytest.mark.parametrize(("dtype", "param_dtype", "affine"), CASES, ids=str)
def test_equals_flax(dtype, param_dtype, affine):
    kwargs = {"dtype": dtype, "param_dtype": param_dtype, "use_scale": bool(affine & 1), "use_bias": bool(affine & 2)}
    theirs, ours = pair(5, momentum=0.9, **kwargs)
    x = normal(6, 4, 5)
    half = 3e-2 if jnp.bfloat16 in (dtype, param_dtype) else 4e-3 if jnp.float16 in (dtype, param_dtype) else 2e-5
    for training in (True, True, False):
        close(ours(x, not training), theirs(x, not training), half)
    close(nnx.state(ours), nnx.state(theirs), 2e-5)


def test_variables_have_flaxs_names_types_and_values():
    theirs, ours = pair(5)
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(theirs))
    theirs(normal(8, 5))
    nnx.update(ours, nnx.state(theirs))
    theirs.eval(), ours.eval()
    close(ours(normal(8, 5)), theirs(normal(8, 5)))
    assert isinstance(ours, nnx.BatchNorm)


@pytest.mark.parametrize("axis", [-1, 1, (1, 2), (1, -1)], ids=str)
def test_axes(axis):
    x = normal(6, 4, 4)
    if isinstance(axis, int):
        theirs, ours = pair(4, axis=axis)
        close(ours(x), theirs(x))
        return
    # Flax's variables have shape (num_features,), whatever the axes are, and don't broadcast to several
    for layer in pair(4, axis=axis):
        with pytest.raises(Exception):  # noqa: B017
            layer(x)


def test_a_mask_hides_values():
    x = normal(4, 3, 2)
    mask = jnp.array([True, True, False, True]).reshape(4, 1, 1)
    theirs, ours = pair(2)
    results = [layer(x, mask=mask) for layer in (theirs, ours)]
    close(results[1], results[0])
    close(nnx.state(ours), nnx.state(theirs))
    other = BatchNorm(2, rngs=nnx.Rngs(0))
    y = other(jnp.where(mask, x, 1e6), mask=mask)
    close(nnx.state(other), nnx.state(ours))
    close(jnp.where(mask, y, 0), jnp.where(mask, results[1], 0))


def test_modes():
    x, layer = normal(8, 3), BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="No `use_running_average` argument was provided to BatchNorm"):
        layer(x)
    trained = layer(x, use_running_average=False)
    layer.train()
    close(layer(x), trained)
    layer.eval()
    assert not np.allclose(layer(x), trained)
    close(layer(x, use_running_average=False), trained)


def test_gradients_under_jit_equal_flaxs():
    x = normal(16, 3)
    results = []
    for layer in pair(3, momentum=0.8):
        step = nnx.jit(nnx.value_and_grad(lambda layer, x: (jnp.sin(layer(x)) * x).sum()))
        results.append((*step(layer, x), nnx.state(layer)))
    close(results[1], results[0], 1e-4)


def test_activation_and_residual():
    x, residual = normal(16, 3), normal(16, 3, seed=1)
    theirs = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    ours = BatchNorm(3, activation="relu6", rngs=nnx.Rngs(0))
    close(ours(x, residual=residual), jax.nn.relu6(theirs(x) + residual))
    ours.eval(), theirs.eval()
    close(ours(x, residual=residual), jax.nn.relu6(theirs(x) + residual))
    with pytest.raises(ValueError, match=r"residual must have the shape of x, \(16, 3\)"):
        ours(x, residual=residual[:2])
    with pytest.raises(ValueError, match="activation must be one of"):
        BatchNorm(3, activation="no", rngs=nnx.Rngs(0))


@pytest.mark.filterwarnings("ignore:.*omplex")  # Flax's variables are real
def test_what_flax_computes_is_told(caplog):
    x = normal(16, 3)
    theirs, ours = pair(3)
    with caplog.at_level(logging.WARNING, "bnfast.jax"):
        mask = jnp.asarray(np.random.default_rng(1).uniform(size=(16, 3)) > 0.3)
        close(ours(x, mask=mask), theirs(x, mask=mask))
        close(ours(x + 1j), theirs(x + 1j))
        parts = [nnx.split(layer) for layer in pair(3, axis_name="devices")]
        run = [lambda x, part=part: nnx.merge(*part, copy=True)(x) for part in parts]
        mapped = [jax.vmap(one, axis_name="devices")(x.reshape(2, 8, 3)) for one in run]
        close(mapped[1], mapped[0])
    for reason in ("a mask that differs between channels", "dtype complex64", "over devices (axis_name)"):
        assert reason in caplog.text
