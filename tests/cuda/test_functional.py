"""bnfast.cuda's functions, end to end on the driver of the tests, against bnfast's on the CPU."""

from typing import Any

import bnfast
import numpy as np
import pytest
from bnfast import cuda
from fake_cuda import Driver, Namespace, numpy_dtype

TOLERANCE = {"float32": 3e-6, "float64": 1e-12, "float16": 2e-3, "bfloat16": 1.6e-2}
SHAPES: list[tuple[tuple[int, ...], Any]] = [
    ((70, 33), -1),
    ((5, 4, 3, 6), -1),
    ((3, 7, 4, 5), 1),
    ((6, 5, 3, 4), (1, 2)),
    ((4, 1, 9), 1),
    ((300,), 0),
    ((1, 3), -1),
    ((0, 3), -1),
    ((3, 0, 4), 0),
]


def close(actual: np.ndarray, desired: np.ndarray, dtype: str) -> None:
    assert actual.shape == desired.shape
    assert actual.dtype == desired.dtype
    a, b = actual.astype("float64"), desired.astype("float64")
    limit = TOLERANCE[dtype]
    scale = max(1.0, float(np.abs(b[np.isfinite(b)]).max(initial=0)))
    np.testing.assert_allclose(a, b, rtol=limit, atol=limit * scale)


def sample(shape: tuple[int, ...], axis: Any, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    """x, dy, residual and vectors on the CPU."""
    rng = np.random.default_rng(seed)
    axes = axis if isinstance(axis, tuple) else (axis,)
    channels = tuple(shape[i] for i in sorted(i % len(shape) for i in axes))
    tensors = {name: rng.normal(0.5, 2, shape).astype(numpy_dtype(dtype)) for name in ("x", "dy", "residual")}
    wide = "float64" if dtype == "float64" else "float32"
    vectors = {name: rng.uniform(0.5, 2, channels).astype(wide) for name in ("gamma", "beta", "mean", "variance")}
    return tensors | vectors


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_training_inference_and_moments(xp: Namespace, shape: tuple[int, ...], axis: Any, dtype: str) -> None:
    if not xp.supports(dtype):
        pytest.skip(f"{xp.name} has no {dtype}")
    given = sample(shape, axis, dtype)
    kwargs: dict[str, Any] = {"axis": axis, "activation": "relu", "epsilon": 1e-2}
    moving = given["mean"].copy(), given["variance"].copy()
    wanted = bnfast.batch_norm_train(
        given["x"],
        given["gamma"],
        given["beta"],
        *moving,
        residual=given["residual"],
        momentum=0.75,
        correction=1,
        **kwargs,
    )
    on = {name: xp.to(array) for name, array in given.items()}
    result = cuda.batch_norm_train(
        on["x"], on["gamma"], on["beta"], on["mean"], on["variance"], residual=on["residual"], momentum=0.75,
        correction=1, **kwargs,
    )  # fmt: skip
    xp.check_launch()
    assert type(result) is bnfast.functional.TrainResult
    for name, a, b in zip(result._fields, result, wanted, strict=True):
        close(xp.host(a), b, dtype if name == "y" else "float32" if dtype != "float64" else dtype)
    for name, array in zip(("mean", "variance"), moving, strict=True):
        close(xp.host(on[name]), array, "float32" if dtype != "float64" else dtype)
    np.testing.assert_array_equal(xp.host(on["x"]), given["x"])  # never written
    y = cuda.batch_norm_infer(on["x"], on["mean"], on["variance"], on["gamma"], on["beta"], **kwargs)
    close(xp.host(y), bnfast.batch_norm_infer(given["x"], *moving, given["gamma"], given["beta"], **kwargs), dtype)
    count, mean, variance = cuda.moments(on["x"], axis=axis)
    expected = bnfast.moments(given["x"], axis=axis)
    assert count == expected.count
    close(xp.host(mean), expected.mean, "float32" if dtype != "float64" else dtype)
    close(xp.host(variance), expected.variance, "float32" if dtype != "float64" else dtype)


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("gate", ["", "residual", "y"])
@pytest.mark.parametrize("training", [True, False], ids=["", "frozen"])
@pytest.mark.parametrize(("shape", "axis"), [((70, 33), -1), ((3, 7, 4, 5), 1)], ids=str)
def test_gradients(
    xp: Namespace, shape: tuple[int, ...], axis: Any, training: bool, gate: str, activation: str | None
) -> None:
    given = sample(shape, axis, "float32")
    kwargs: dict[str, Any] = {"axis": axis, "activation": activation, "negative_slope": 0.3}
    residual = {"residual": given["residual"]} if gate else {}
    forward = bnfast.batch_norm_train(given["x"], given["gamma"], given["beta"], **residual, **kwargs)
    gates = {"": {}, "residual": residual, "y": {"y": forward.y}}[gate]
    statistics = forward.mean, forward.invstd
    vectors = {"dmean": given["mean"], "dvariance": given["variance"]}
    wanted = bnfast.batch_norm_grad(
        given["dy"],
        given["x"],
        *statistics,
        given["gamma"],
        given["beta"],
        training=training,
        **gates,
        **vectors,
        **kwargs,
    )
    on = {name: xp.to(array) for name, array in {**given, **gates}.items()}
    result = cuda.batch_norm_grad(
        on["dy"], on["x"], *map(xp.to, statistics), on["gamma"], on["beta"], training=training,
        **{name: on[name] for name in gates}, dmean=on["mean"], dvariance=on["variance"], **kwargs,
    )  # fmt: skip
    for a, b in zip(result, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(xp.host(a), b, "float32")
    if gate and activation is None:
        assert result.dresidual is on["dy"]


def test_results_are_arrays_of_the_callers_library(xp: Namespace) -> None:
    result = cuda.batch_norm_train(xp.to(np.ones((4, 3), "float32")))
    wanted = cuda.DeviceArray if xp.name in ("interface", "dlpack") else type(xp.to(np.ones(1)))
    assert {type(array) for array in result} == {wanted}


def test_vectors_may_be_absent_and_of_either_dtype(interface: Namespace) -> None:
    given = sample((70, 33), -1, "float16")
    wide = {name: array.astype("float64") for name, array in given.items() if array.ndim == 1}
    for gamma, beta in ((None, None), (wide["gamma"], None), (None, given["beta"]), (wide["gamma"], given["beta"])):
        vectors = [None if vector is None else interface.to(vector) for vector in (gamma, beta)]
        result = cuda.batch_norm_train(interface.to(given["x"]), *vectors)
        wanted = bnfast.batch_norm_train(given["x"], gamma, beta)
        close(interface.host(result.y), wanted.y, "float16")
        gradient = cuda.batch_norm_grad(
            interface.to(given["dy"]), interface.to(given["x"]), result.mean, result.invstd, *vectors
        )
        expected = bnfast.batch_norm_grad(given["dy"], given["x"], wanted.mean, wanted.invstd, gamma, beta)
        assert gradient.dgamma.dtype == expected.dgamma.dtype.name
        close(interface.host(gradient.dx), expected.dx, "float16")


@pytest.mark.parametrize("name", ["torch", "cupy"])
def test_any_order_of_axes_is_read_in_place(name: str, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's channels_last format: y and dx have the order of x, and the bits of the permuted array."""
    if name == "torch":
        pytest.importorskip("torch")
    xp = Namespace(name, monkeypatch, driver)
    given = sample((4, 5, 6, 7), 3, "float32")
    x, dy = (xp.to(given[each].transpose(0, 3, 1, 2)) for each in ("x", "dy"))
    plain, dplain = xp.to(given["x"]), xp.to(given["dy"])
    assert not xp.host(x).flags.c_contiguous
    result, wanted = cuda.batch_norm_train(x, axis=1), cuda.batch_norm_train(plain, axis=-1)
    np.testing.assert_array_equal(xp.host(result.y).transpose(0, 2, 3, 1), xp.host(wanted.y))
    assert xp.host(result.y).strides == xp.host(x).strides
    gradient = cuda.batch_norm_grad(dy, x, result.mean, result.invstd, axis=1)
    expected = cuda.batch_norm_grad(dplain, plain, wanted.mean, wanted.invstd)
    np.testing.assert_array_equal(xp.host(gradient.dx).transpose(0, 2, 3, 1), xp.host(expected.dx))
    other = xp.to(np.ascontiguousarray(given["dy"].transpose(0, 3, 1, 2)))
    with pytest.raises(ValueError, match="dy must lie in memory as x"):
        cuda.batch_norm_grad(other, x, result.mean, result.invstd, axis=1)


def test_out_may_be_x_or_an_array_of_its_own(xp: Namespace) -> None:
    given = sample((70, 33), -1, "float32")
    x, out = xp.to(given["x"]), xp.to(np.zeros((70, 33), "float32"))
    wanted = xp.host(cuda.batch_norm_train(x).y)
    result = cuda.batch_norm_train(x, out=out)
    assert result.y is out
    np.testing.assert_array_equal(xp.host(out), wanted)
    assert cuda.batch_norm_train(x, out=x).y is x
    np.testing.assert_array_equal(xp.host(x), wanted)
    x, dy = xp.to(given["x"]), xp.to(given["dy"])
    dx = xp.host(cuda.batch_norm_grad(dy, x, result.mean, result.invstd).dx)
    assert cuda.batch_norm_grad(dy, x, result.mean, result.invstd, out=dy).dx is dy
    np.testing.assert_array_equal(xp.host(dy), dx)


def test_dresidual_may_be_written_into_x(interface: Namespace) -> None:
    given = sample((70, 33), -1, "float32")
    on = {name: interface.to(array) for name, array in given.items()}
    vectors = on["mean"], on["variance"]
    kwargs: dict[str, Any] = {"activation": "relu", "residual": on["residual"]}
    wanted = cuda.batch_norm_grad(on["dy"], on["x"], *vectors, **kwargs)
    wanted_dx, wanted_dr = interface.host(wanted.dx), interface.host(wanted.dresidual)
    result = cuda.batch_norm_grad(on["dy"], on["x"], *vectors, out=on["dy"], out_dresidual=on["x"], **kwargs)
    np.testing.assert_array_equal(interface.host(result.dx), wanted_dx)
    np.testing.assert_array_equal(interface.host(result.dresidual), wanted_dr)


def test_non_finite_values(interface: Namespace) -> None:
    x = sample((70, 33), -1, "float32")["x"]
    x[5, 2] = np.nan
    x[6, 30] = np.inf
    for policy in ("propagate", "skip_update"):
        moving = [np.full(33, value, "float32") for value in (1.0, 2.0)]
        on = [interface.to(array) for array in moving]
        with np.errstate(invalid="ignore"):
            wanted = bnfast.batch_norm_train(x, None, None, *moving, nan_policy=policy)
        y = cuda.batch_norm_train(interface.to(x), None, None, *on, nan_policy=policy).y
        np.testing.assert_array_equal(np.isnan(interface.host(y)), np.isnan(wanted.y))
        for actual, desired in zip(on, moving, strict=True):
            a = interface.host(actual)
            np.testing.assert_array_equal(np.isfinite(a), np.isfinite(desired))  # inf on the CPU may be NaN here
            np.testing.assert_allclose(a[np.isfinite(a)], desired[np.isfinite(a)], rtol=1e-6)
    on = [interface.to(np.full(33, value, "float32")) for value in (1.0, 2.0)]
    out = interface.to(np.zeros((70, 33), "float32"))
    with pytest.raises(FloatingPointError, match=r"x has non-finite batch statistics in channels 2, 30$"):
        cuda.batch_norm_train(interface.to(x), None, None, *on, nan_policy="raise", out=out)
    for array, value in zip([*on, out], (1, 2, 0), strict=True):
        np.testing.assert_array_equal(interface.host(array), value)
    finite = interface.to(np.nan_to_num(x, posinf=0))
    a = cuda.batch_norm_train(finite, nan_policy="raise")
    b = cuda.batch_norm_train(finite)
    np.testing.assert_array_equal(interface.host(a.y), interface.host(b.y))


def test_an_empty_batch_changes_no_state(xp: Namespace) -> None:
    on = [xp.to(np.full(3, value, "float32")) for value in (1.0, 2.0)]
    result = cuda.batch_norm_train(xp.to(np.zeros((0, 3), "float32")), None, None, *on)
    assert xp.host(result.y).shape == (0, 3)
    for array, value in zip([*on, result.mean, result.variance], (1, 2, 0, 0), strict=True):
        np.testing.assert_array_equal(xp.host(array), value)


def test_large_offsets_keep_the_variance(interface: Namespace) -> None:
    rng = np.random.default_rng(3)
    for offset, limit in ((1e4, 1e-6), (1e6, 1e-5)):
        x = (offset + rng.normal(size=(2003, 33))).astype("float32")
        variance = interface.host(cuda.moments(interface.to(x)).variance)
        np.testing.assert_allclose(variance, x.astype("float64").var(0), rtol=limit)


def test_the_same_bits_for_every_library_device_and_alignment(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    given = sample((70, 33), -1, "float32")["x"]
    results = set()
    for name in ("torch", "cupy", "interface", "dlpack", "numba"):
        if name == "torch":
            pytest.importorskip("torch")
        xp = Namespace(name, monkeypatch, driver)
        results |= {xp.host(cuda.batch_norm_train(xp.to(given)).y).tobytes() for _ in range(2)}
    xp = Namespace("cupy", monkeypatch, driver)
    results.add(xp.host(cuda.batch_norm_train(xp.to(given, device=1)).y).tobytes())
    assert driver.device == 1
    shifted = np.empty(given.size + 1, "float32")[1:].reshape(given.shape)
    shifted[...] = given
    results.add(xp.host(cuda.batch_norm_train(xp.kind(shifted)).y).tobytes())
    assert len(results) == 1


def test_jax_arrays_are_not_written() -> None:
    """Its arrays on the CPU stand for the type: they are immutable."""
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match=r"x must be on a CUDA device\. Received: ArrayImpl on DLPack device type 1"):
        cuda.batch_norm_train(jax.numpy.ones((4, 3)))


def test_device_arrays_go_on(interface: Namespace, driver: Driver) -> None:
    """They are inputs of the next call, show both protocols, and free their memory."""
    before = driver.allocations
    first = cuda.batch_norm_train(interface.to(sample((70, 33), -1, "float32")["x"]))
    assert driver.allocations > before
    second = cuda.batch_norm_train(first.y, out=first.y)
    assert second.y is first.y
    assert first.y.__dlpack_device__() == (2, 0)
    facts = first.y.__cuda_array_interface__
    assert (facts["shape"], facts["typestr"], facts["data"][0]) == ((70, 33), "<f4", first.y.address)
    capsule = first.y.__dlpack__()
    del first, second
    assert driver.allocations > before
    del capsule
    assert driver.allocations == before


def test_signatures_are_those_on_the_cpu() -> None:
    import inspect

    for name in ("batch_norm_train", "batch_norm_infer", "batch_norm_grad", "moments"):
        own, cpu = (inspect.signature(getattr(module, name)) for module in (cuda, bnfast))
        assert [(p.name, p.kind, p.default) for p in own.parameters.values()] == [
            (p.name, p.kind, p.default) for p in cpu.parameters.values()
        ]
