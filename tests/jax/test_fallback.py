"""Where the kernels don't run: JAX's own ops compute the same, and the reason is told once."""

import logging
import re
from types import SimpleNamespace

import bnfast.jax as bj
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bnfast.jax import support
from jax import export


@pytest.fixture
def reasons(caplog):
    """The reasons that have been told so far, in a function."""
    support.log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "bnfast.jax"):
        yield lambda: [one.message.partition(": ")[2] for one in caplog.records if one.name == "bnfast.jax"]
    support.log_once.cache_clear()


def run(x):
    return bj.batch_norm_train(x, activation="gelu").y


def fresh():
    """A function that no cache of JAX knows."""
    return lambda x: run(x)


X = jnp.asarray(np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32))
ASK = export.DisabledSafetyCheck.custom_call


def test_a_refused_registration_is_told_once(monkeypatch, reasons):
    wanted = run(X)
    monkeypatch.setattr(support, "status", lambda: (False, "XLA's API has version 1.0, and only 0.x is known"))
    jax.clear_caches()
    for _ in range(2):
        np.testing.assert_allclose(run(X), wanted, rtol=1e-4, atol=1e-5)
    assert reasons() == ["XLA's API has version 1.0, and only 0.x is known"]
    with pytest.raises(ValueError, match="nan_policy must be"):
        bj.batch_norm_train(X, nan_policy="raise")
    jax.clear_caches()


def test_status_gives_the_reason_of_the_handlers(monkeypatch):
    support.status.cache_clear()
    monkeypatch.setattr(support._core, "_jax_query", lambda: (True, 1, 0, "the reason"))
    assert support.status() == (False, "the reason")
    support.status.cache_clear()
    monkeypatch.setattr(support._core, "_jax_query", lambda: (False, 0, 0, ""))
    assert "has not asked" in support.status()[1]
    support.status.cache_clear()
    monkeypatch.undo()
    assert support.status()[0]


def test_whatever_a_registration_raises_is_a_reason(monkeypatch):
    def refuse(name, handler, platform):
        raise RuntimeError(f"no {name} on {platform}")

    support.status.cache_clear()
    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    available, reason = support.status()
    support.status.cache_clear()
    assert not available
    assert re.fullmatch("XLA refuses the handlers: no bnfast_[a-z]+ on cpu", reason)


@pytest.mark.skipif(jax.__version_info__ < (0, 6, 2), reason="JAX before 0.6.2 takes its own ops there")
def test_beside_another_device_the_platform_decides(monkeypatch, reasons):
    monkeypatch.setattr(support, "backends", lambda: {"cpu": None, "cuda": None})
    traced = jax.jit(jax.grad(lambda x: (run(x) ** 2).sum())).trace(X)
    assert "bnfast_grad" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "@bnfast" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    wanted = jax.grad(lambda x: (run(x) ** 2).sum())(X)  # eager, on an array of the CPU
    np.testing.assert_array_equal(traced.lower().compile()(X), wanted)
    moments = jax.jit(bj.moments).trace(X)
    assert "bnfast_moments" in moments.lower(lowering_platforms=("cpu",)).as_text()
    assert "@bnfast" not in moments.lower(lowering_platforms=("cuda",)).as_text()
    vmapped = jax.jit(jax.vmap(fresh()))(jnp.stack([X, 2 * X]))
    np.testing.assert_array_equal(vmapped[1], run(2 * X))
    assert reasons() == ["what is compiled for cuda: the kernels run on the CPU alone"]


def test_an_array_elsewhere_runs_on_jaxs_own_ops(reasons):
    array = SimpleNamespace(devices=lambda: [SimpleNamespace(platform=name) for name in ("cpu", "cuda")])
    assert support.way(array) == support.OWN_OPS
    assert reasons() == ["an array is on cuda, and the kernels run on the CPU alone"]


def test_before_jax_062_other_devices_take_jaxs_own_ops(monkeypatch, reasons):
    monkeypatch.setattr(support, "backends", lambda: {"cpu": None, "cuda": None})
    monkeypatch.setattr(jax, "__version__", "0.6.1")
    monkeypatch.setattr(jax, "__version_info__", (0, 6, 1))
    assert "bnfast" not in str(jax.make_jaxpr(fresh())(X))
    assert reasons() == ["JAX 0.6.1 has cuda beside the CPU, and can't tell what it compiles for"]


def test_own_ops_without_contexts_in_the_keys_of_traces(monkeypatch):
    """As before JAX 0.8."""
    monkeypatch.setattr(support, "_own_ops", None)
    function, jitted = lambda x: run(x), jax.jit(run)
    wanted = jitted(X)
    with bj.own_ops():
        with bj.own_ops():
            assert "bnfast" not in str(jax.make_jaxpr(function)(X))
        assert "bnfast" not in jitted.lower(X).as_text()
        np.testing.assert_allclose(jitted(X), wanted, rtol=1e-4, atol=1e-5)
    assert "bnfast_train" in jitted.lower(X).as_text()
    np.testing.assert_array_equal(jitted(X), wanted)


def test_export_refuses_our_calls_by_name_and_takes_jaxs_own_ops(reasons):
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    function = fresh()
    wanted = jax.jit(function)(X)
    with pytest.raises(ValueError, match=r"(?s)custom calls whose targets have no compatibility.*bnfast_train"):
        export.export(jax.jit(function))(shape)
    ours = export.export(jax.jit(function), disabled_checks=[ASK("bnfast_train")])(shape)
    np.testing.assert_array_equal(jax.jit(ours.call)(X), wanted)
    with bj.own_ops():  # the function was traced before, with the kernels
        portable = export.export(jax.jit(function), platforms=("cpu", "cuda"))(shape)
    assert "@bnfast" not in portable.mlir_module()
    np.testing.assert_allclose(jax.jit(portable.call)(X), wanted, rtol=1e-4, atol=1e-5)
    assert "bnfast_train" in jax.jit(function).lower(X).as_text()
    assert reasons() == []


@pytest.mark.parametrize("training", [True, False])
def test_own_ops_agree_in_all_dtypes(training, bfloat16):
    for dtype, tolerance in ((np.float32, 1e-4), (np.float16, 4e-3), (bfloat16, 3e-2)):
        x = X.astype(dtype)

        def loss(x, gamma, mean, variance):
            kwargs = {"activation": "leaky_relu", "residual": x}
            if training:
                result = bj.batch_norm_train(x, gamma, None, mean, variance, correction=1, **kwargs)
                return (result.y.astype(np.float32) ** 2).sum(), result
            y = bj.batch_norm_infer(x, mean, variance, gamma, **kwargs)
            return (y.astype(np.float32) ** 2).sum(), y

        arguments = x, jnp.ones(3) * 2, jnp.ones(3), jnp.ones(3) * 3
        gradient = jax.grad(loss, (0, 1, 2, 3), has_aux=True)
        ours = gradient(*arguments)
        with bj.own_ops():
            theirs = gradient(*arguments)
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert one.dtype == other.dtype
            one, other = (np.asarray(a, np.float64) for a in (one, other))
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * max(1, abs(one).max()))


@pytest.mark.parametrize("shape", [(16, 3), (0, 3)], ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_moments_on_own_ops_have_the_dtype_of_the_kernels(request, shape, wide):
    if wide:
        request.getfixturevalue("x64")
    x = X[: shape[0]]
    ours = bj.moments(x)
    with bj.own_ops():
        theirs = bj.moments(x)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype == (np.float64 if wide else np.float32)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_own_ops_skip_updates_as_the_kernels_do():
    x, moving = X.at[0, 1].set(jnp.nan), (jnp.zeros(3), jnp.ones(3))
    call = lambda: bj.batch_norm_train(x, None, None, *moving, nan_policy="skip_update")  # noqa: E731
    kernels = call()
    with bj.own_ops():
        own = call()
    assert own.moving_mean[1] == 0
    assert own.moving_variance[1] == 1
    for one, other in zip(kernels, own, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
