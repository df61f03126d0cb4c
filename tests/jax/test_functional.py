"""bnfast.jax's functions: the bits of the NumPy functions, and the gradients of the plain formula in JAX."""

import contextlib
import functools
import itertools

import bnfast
import bnfast.jax as bj
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bnfast._arguments.checks import ACTIVATIONS
from sample_data import DTYPES, EMPTY, SHAPES, batch, dtype_of, vectors

pytestmark = pytest.mark.usefixtures("x64")
FEW = [((64, 23), -1), ((3, 23, 7, 7), 1), ((3, 7, 7, 23), 3), ((2, 3, 7, 5, 23), 4)]


def test_the_kernels_run():
    available, reason = bj.status()
    assert available, reason


@pytest.fixture(autouse=True)
def no_fallback(caplog):
    """A call that runs on JAX's own ops would pass these tests without a kernel."""
    yield
    assert [record.message for record in caplog.records if record.name == "bnfast.jax"] == []


def equal(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[theirs.dtype.itemsize]
    assert np.array_equal(np.asarray(ours).view(bits), np.asarray(theirs).view(bits))


def sample(shape, axis, dtype="float32", parameters="float32", seed=0):
    rng = np.random.default_rng(seed)
    x, dy, residual = (batch(shape, axis, dtype_of(dtype), rng) for _ in range(3))
    return x, dy, residual, vectors(shape[axis], rng, parameters)


@functools.cache
def in_jit(name, **kwargs):
    return jax.jit(functools.partial(getattr(bj, name), **kwargs))


@pytest.mark.sample(40)  # 208 cases, which compile for half a second each
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES + EMPTY)
def test_same_bits_as_numpy(shape, axis, dtype, jit):
    parameters = "float64" if dtype == "float64" else "float32"
    x, _, residual, (gamma, beta, mean, variance) = sample(shape, axis, dtype, parameters)
    options = {"axis": axis, "activation": "relu", "momentum": 0.7, "correction": 1}
    moved = mean.copy(), variance.copy()
    wanted = bnfast.batch_norm_train(x, gamma, beta, *moved, residual=residual, **options)
    if jit:
        run = in_jit("batch_norm_train", **options)
        result = run(x, gamma, beta, mean, variance, residual=residual)
    else:
        result = bj.batch_norm_train(x, gamma, beta, mean, variance, residual=residual, **options)
    for ours, theirs in zip(result, (*wanted, *moved), strict=True):
        equal(ours, theirs)
    infer = bj.batch_norm_infer if not jit else in_jit("batch_norm_infer", axis=axis, activation="relu")
    options = {} if jit else {"axis": axis, "activation": "relu"}
    theirs = bnfast.batch_norm_infer(x, mean, variance, gamma, beta, axis=axis, activation="relu", residual=residual)
    equal(infer(x, mean, variance, gamma, beta, residual=residual, **options), theirs)
    for ours, theirs in zip(bj.moments(x, axis=axis), bnfast.moments(x, axis=axis)[1:], strict=True):
        equal(ours, theirs)


@pytest.mark.sample(30)  # of 240
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), FEW)
def test_gradients_have_the_bits_of_numpys(shape, axis, dtype, activation):
    parameters = "float64" if dtype == "float64" else "float32"
    x, dy, residual, (gamma, beta, mean, variance) = sample(shape, axis, dtype, parameters)
    options = {"axis": axis, "activation": activation}
    y, batch_mean, _, invstd = bnfast.batch_norm_train(x, gamma, beta, residual=residual, **options)
    kept = {"y": y} if activation in (None, "relu", "relu6", "leaky_relu") else {"residual": residual}
    wanted = bnfast.batch_norm_grad(dy, x, batch_mean, invstd, gamma, beta, **kept, **options)
    train = lambda x, g, b, r: bj.batch_norm_train(x, g, b, mean, variance, residual=r, **options).y  # noqa: E731
    for ours, theirs in zip(jax.vjp(train, x, gamma, beta, residual)[1](jnp.asarray(dy)), wanted, strict=True):
        equal(ours, theirs)
    ours = bj.batch_norm_grad(dy, x, batch_mean, invstd, gamma, beta, **kept, **options)
    for one, theirs in zip(ours, wanted, strict=True):
        equal(one, theirs)
    y = bnfast.batch_norm_infer(x, mean, variance, gamma, beta, residual=residual, **options)
    kept = {"y": y} if "y" in kept else kept
    frozen = 1 / np.sqrt(variance.astype(np.float64) + 1e-3)
    wanted = bnfast.batch_norm_grad(dy, x, mean, frozen, gamma, beta, training=False, **kept, **options)
    infer = lambda x, g, b, r: bj.batch_norm_infer(x, mean, variance, g, b, residual=r, **options)  # noqa: E731
    for ours, theirs in zip(jax.vjp(infer, x, gamma, beta, residual)[1](jnp.asarray(dy)), wanted, strict=True):
        equal(ours, theirs)


def test_statistics_stay_float64_between_forward_and_backward_without_x64():
    jax.config.update("jax_enable_x64", False)
    x, dy, _, (gamma, beta, *_) = sample((64, 23), -1)
    _, mean, _, invstd = bnfast.batch_norm_train(x, gamma, beta)
    result, pull = jax.vjp(lambda *a: bj.batch_norm_train(*a), x, gamma, beta)
    assert result.mean.dtype == jnp.float32
    equal(result.mean, mean.astype(np.float32))
    cotangent = jax.tree.map(jnp.zeros_like, result)._replace(y=jnp.asarray(dy))
    wanted = bnfast.batch_norm_grad(dy, x, mean, invstd, gamma, beta)
    for ours, theirs in zip(pull(cotangent), wanted[:3], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)  # dmean and dvariance of 0 are added
    grad = jax.grad(lambda x: (bj.batch_norm_train(x, gamma, beta).y * dy).sum())(x)
    equal(grad, wanted.dx)


# ---- derivatives -----------------------------------------------------------------------------------------------------


def plain(x, gamma, beta, mean, variance, residual, *, axis, activation, mask=None, correction=0, momentum=0.9):
    """The definition, in the simplest words of JAX."""
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    shape = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
    w = jnp.ones(x.shape) if mask is None else jnp.broadcast_to(jnp.expand_dims(mask, axis), x.shape)
    W = w.sum(axes)
    m = (x * w).sum(axes) / W
    v = (w * (x - m.reshape(shape)) ** 2).sum(axes) / W
    xhat = (x - m.reshape(shape)) / jnp.sqrt(v + 1e-3).reshape(shape)
    z = xhat * gamma.reshape(shape) + beta.reshape(shape) + residual
    functions = {None: lambda z: z, "relu": jax.nn.relu, "gelu": lambda z: jax.nn.gelu(z, approximate=False)}
    unbiased = v * W / (W - correction)
    moving = mean * momentum + m * (1 - momentum), variance * momentum + unbiased * (1 - momentum)
    return functions[activation](z), m, v, 1 / jnp.sqrt(v + 1e-3), *moving


def close(ours, theirs, rtol=1e-9):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol)


CASES = list(itertools.product([((6, 4), -1), ((3, 4, 2, 2), 1)], [None, "relu", "gelu"], [False, True], [0, 1]))


@pytest.mark.sample(8)  # of 24, which compile for seconds each
@pytest.mark.parametrize(("where", "activation", "masked", "correction"), CASES)
def test_all_results_and_derivatives_equal_the_plain_formula(where, activation, masked, correction):
    shape, axis = where
    x, _, residual, rest = sample(shape, axis, "float64", "float64")
    rng = np.random.default_rng(1)
    arrays = tuple(map(jnp.asarray, (x, *rest, residual)))
    mask = rng.uniform(0.5, 2, [n for i, n in enumerate(shape) if i != axis % len(shape)]) if masked else None
    options = {"axis": axis, "activation": activation, "mask": mask, "correction": correction, "momentum": 0.9}

    def ours(x, gamma, beta, mean, variance, residual):
        return tuple(bj.batch_norm_train(x, gamma, beta, mean, variance, residual=residual, **options))

    theirs = functools.partial(plain, **options)
    weights = [rng.standard_normal(np.shape(one)) for one in theirs(*arrays)]

    def loss(function, *arrays):
        return sum((w * jnp.sin(one)).sum() for w, one in zip(weights, function(*arrays), strict=True))

    close(ours(*arrays), theirs(*arrays))
    every = tuple(range(1, 7))
    close(jax.grad(loss, every)(ours, *arrays), jax.grad(loss, every)(theirs, *arrays))

    def of_gradient(function, *arrays):
        found = jax.grad(lambda *a: (jnp.sin(function(*a)[0]) * weights[0]).sum(), (0, 1, 2, 5))(*arrays)
        return sum((one**2).sum() for one in found)

    wanted = jax.jit(jax.grad(of_gradient, every), static_argnums=0)
    close(wanted(ours, *arrays), wanted(theirs, *arrays), 1e-8)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_inference_is_differentiable_twice(activation):
    x, dy, residual, rest = sample((5, 3, 2), 1, "float64", "float64")
    arrays = tuple(map(jnp.asarray, (x, *rest, residual)))

    def ours(x, gamma, beta, mean, variance, residual):
        return bj.batch_norm_infer(x, mean, variance, gamma, beta, residual=residual, axis=1, activation=activation)

    def theirs(x, gamma, beta, mean, variance, residual):
        m, v, g, b = (one.reshape(3, 1) for one in (mean, variance, gamma, beta))
        z = (x - m) / jnp.sqrt(v + 1e-3) * g + b + residual
        return {None: z, "relu": jax.nn.relu(z), "gelu": jax.nn.gelu(z, approximate=False)}[activation]

    loss = lambda f, *a: (jnp.sin(f(*a)) * dy).sum()  # noqa: E731
    every = tuple(range(1, 7))
    close(jax.grad(loss, every)(ours, *arrays), jax.grad(loss, every)(theirs, *arrays))
    twice = lambda f, *a: sum((one**2).sum() for one in jax.grad(loss, every)(f, *a))  # noqa: E731
    close(jax.grad(twice, every)(ours, *arrays), jax.grad(twice, every)(theirs, *arrays), 1e-8)


@pytest.mark.parametrize("own_ops", [False, True])
def test_a_variance_and_epsilon_of_0_have_no_gradient_in_inference(own_ops):
    """y is beta there, whatever x is. The second channel is an ordinary one."""
    x, variance, gamma = jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), jnp.asarray([0.0, 4.0]), jnp.ones(2)

    def y(x, mean, variance, gamma, beta):
        return bj.batch_norm_infer(x, mean, variance, gamma, beta, epsilon=0.0, axis=-1)

    with bj.own_ops() if own_ops else contextlib.nullcontext():
        assert np.array_equal(y(x, 0 * gamma, variance, gamma, 3 * gamma), [[3, 4], [3, 5]])
        found = jax.grad(lambda *a: y(*a).sum(), tuple(range(5)))(x, 0 * gamma, variance, gamma, 3 * gamma)
    wanted = [[[0, 0.5], [0, 0.5]], [0, -1], [0, -0.375], [0, 3], [2, 2]]
    for got, want in zip(found, wanted, strict=True):
        assert np.array_equal(got, want), (got, want)


def test_the_third_derivative():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2)))

    def thrice(function):
        third = jax.jacrev(jax.jacrev(jax.grad(lambda x: (function(x) ** 3).sum())))
        return third(x)

    theirs = lambda x: (x - x.mean(0)) / jnp.sqrt(((x - x.mean(0)) ** 2).mean(0) + 1e-3)  # noqa: E731
    close(thrice(lambda x: bj.batch_norm_train(x).y), thrice(theirs), 1e-8)


def test_forward_mode_is_refused_by_name_and_runs_on_jaxs_own_ops():
    x = jnp.ones((4, 3)).at[0].set(2.0)
    with pytest.raises(TypeError, match=r"forward-mode autodiff \(jvp\) to a custom_vjp"):
        jax.jvp(lambda x: bj.batch_norm_train(x).y, (x,), (x,))
    with bj.own_ops():
        _, tangent = jax.jvp(lambda x: bj.batch_norm_train(x).y, (x,), (x,))
    assert jnp.isfinite(tangent).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_grad_on_own_ops_equals_the_kernel(training, activation):
    x, dy, residual, (gamma, beta, mean, variance) = sample((5, 3, 2), 1, "float64", "float64")
    options = {"axis": 1, "activation": activation, "residual": residual, "training": training}
    options |= {"dmean": mean, "dvariance": beta, "mask": np.full((5, 2), 0.5)} if training else {}
    call = lambda: bj.batch_norm_grad(dy, x, mean, variance, gamma, beta, **options)  # noqa: E731
    kernel = call()
    with bj.own_ops():
        close(kernel, call())


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu"])
def test_grad_from_y_on_own_ops_equals_the_kernel(activation):
    x, dy, residual, (gamma, beta, *_) = sample((5, 3, 2), 1, "float64", "float64")
    options = {"axis": 1, "activation": activation}
    y, mean, _, invstd = bnfast.batch_norm_train(x, gamma, beta, residual=residual, **options)
    call = lambda: bj.batch_norm_grad(dy, x, mean, invstd, gamma, beta, y=y, **options)  # noqa: E731
    kernel = call()
    with bj.own_ops():
        close(kernel, call())


# ---- transformations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [(0, None, None), (0, 0, None), (None, 0, 0), (2, 1, None)], ids=str)
def test_vmap_has_the_bits_of_each_call(axes):
    x, _, _, (gamma, beta, mean, variance) = sample((6, 4, 5), 1)
    given = list(zip((x, gamma, beta), axes, strict=True))
    many = [one if at is None else np.stack([one, one * 2, one * 3], at) for one, at in given]
    run = lambda x, g, b: bj.batch_norm_train(x, g, b, mean, variance, axis=1, activation="gelu")  # noqa: E731
    mapped = jax.jit(jax.vmap(run, axes))(*many)
    gradient = jax.vmap(jax.grad(lambda *a: (run(*a).y ** 2).sum(), (0, 1, 2)), axes)(*many)
    for i in range(3):
        one = [a if at is None else jnp.take(jnp.asarray(a), i, at) for a, at in zip(many, axes, strict=True)]
        for ours, theirs in zip(mapped, run(*one), strict=True):
            equal(ours[i], theirs)
        for ours, theirs in zip(gradient, jax.grad(lambda *a: (run(*a).y ** 2).sum(), (0, 1, 2))(*one), strict=True):
            equal(ours[i], theirs)


def test_vmap_twice_with_masks():
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal((2, 3, 6, 4)), rng.uniform(0, 1, (3, 6))
    mapped = jax.vmap(jax.vmap(lambda x, m: bj.batch_norm_train(x, mask=m).y), (0, None))(x, mask)
    moments = jax.vmap(jax.vmap(lambda x, m: bj.moments(x, mask=m), (None, 0)), (0, None))(x[:, 0], mask)
    for i, j in itertools.product(range(2), range(3)):
        equal(mapped[i, j], bnfast.batch_norm_train(x[i, j], mask=mask[j]).y)
        for ours, theirs in zip(moments, bnfast.moments(x[i, 0], mask=mask[j])[1:], strict=True):
            equal(ours[i, j], theirs)


def test_the_forms_of_a_program():
    x = jnp.ones((4, 3))
    jaxpr = str(jax.make_jaxpr(lambda x: bj.batch_norm_train(x).y)(x))
    assert "bnfast_train" in jaxpr
    lowered = jax.jit(lambda x: bj.batch_norm_train(x).y).lower(x)
    assert "bnfast_train" in lowered.as_text()
    equal(lowered.compile()(x), bj.batch_norm_train(x).y)
    gradient = jax.jit(jax.grad(lambda x: (bj.batch_norm_train(x).y ** 2).sum())).lower(x).compile().as_text()
    assert "bnfast_grad" in gradient
    assert " copy(" not in lowered.compile().as_text() + gradient, "buffers are read and written where they are"
    shapes = jax.eval_shape(bj.batch_norm_train, x)
    assert (shapes.y.shape, shapes.mean.shape, shapes.moving_mean) == ((4, 3), (3,), None)
    with bj.own_ops():
        assert "bnfast" not in str(jax.make_jaxpr(lambda x: bj.batch_norm_train(x).y)(x))


def test_checkpoint_and_scan():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4)))
    layer = lambda x: bj.batch_norm_train(x, activation="relu").y * 1.5  # noqa: E731
    wanted = jax.grad(lambda x: (layer(layer(layer(x))) ** 2).sum())(x)

    def scanned(x):
        return (jax.lax.scan(lambda c, _: (jax.checkpoint(layer)(c), None), x, length=3)[0] ** 2).sum()

    close(jax.grad(scanned)(x), wanted)


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donated_buffers_give_the_same_bits():
    x, _, _, (gamma, beta, mean, variance) = sample((64, 23), -1)
    run = lambda x, m, v: bj.batch_norm_train(x, gamma, beta, m, v)  # noqa: E731
    wanted = jax.jit(run)(x, mean, variance)
    arrays = [jnp.array(one) for one in (x, mean, variance)]
    for ours, theirs in zip(jax.jit(run, donate_argnums=(0, 1, 2))(*arrays), wanted, strict=True):
        equal(ours, theirs)


@pytest.mark.parametrize("axis", [(1, 3), (1, 2), (2, 3)], ids=str)
def test_several_axes_are_merged_as_in_numpy(axis):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4, 5, 2))
    shape = tuple(x.shape[i] for i in axis)
    gamma, mean, variance = rng.uniform(1, 2, shape), np.zeros(shape), np.ones(shape)
    result = bj.batch_norm_train(x, gamma, None, mean, variance, axis=axis)
    moved = mean.copy(), variance.copy()
    wanted = bnfast.batch_norm_train(x, gamma, None, *moved, axis=axis)
    for ours, theirs in zip(result, (*wanted, *moved), strict=True):
        equal(ours, theirs)


def test_half_parameters_are_widened(bfloat16):
    x, _, _, (gamma, beta, mean, variance) = sample((64, 23), -1, "bfloat16")
    half = [one.astype(bfloat16) for one in (gamma, beta, mean, variance)]
    wide = [one.astype(np.float32) for one in half]
    result, wanted = bj.batch_norm_train(x, *half), bj.batch_norm_train(x, *wide)
    equal(result.y, wanted.y)
    equal(result.moving_mean, wanted.moving_mean.astype(bfloat16))
    assert jax.grad(lambda g: bj.batch_norm_train(x, g).y.sum())(jnp.asarray(half[0])).dtype == bfloat16


# ---- errors ----------------------------------------------------------------------------------------------------------

X = np.ones((4, 3), np.float32)
V = np.ones(3, np.float32)
ERRORS = [
    (dict(x=[[1.0]]), TypeError, "x must be a JAX or NumPy array. Received: list"),
    (dict(x=X.astype(int)), TypeError, "x must have dtype float32, float64, float16 or bfloat16. Received: int"),
    (dict(x=np.float32(1)), ValueError, r"x must have at least one axis. Received: shape \(\)"),
    (dict(axis=2), ValueError, r"axis must be in \[-2, 2\) for x of shape \(4, 3\). Received: 2"),
    (dict(axis=None), TypeError, "axis must be an integer. Received: None"),
    (dict(gamma=X), ValueError, r"gamma must have shape \(3,\) to match axis -1 of x. Received: \(4, 3\)"),
    (dict(beta=V.astype(int)), TypeError, "beta must have dtype"),
    (dict(moving_mean=V), ValueError, "must be given together. Received: moving_mean alone"),
    (dict(momentum=1.5), ValueError, r"momentum must be in \[0, 1\]. Received: 1.5"),
    (dict(epsilon=-1.0), ValueError, "epsilon must be finite and at least 0. Received: -1.0"),
    (dict(activation="no"), ValueError, "activation must be one of .*Received: 'no'"),
    (dict(residual=X[:2]), ValueError, r"residual must have the shape of x, \(4, 3\). Received: \(2, 3\)"),
    (dict(residual=X.astype(np.float16)), TypeError, "residual must have the dtype of x, float32. Received: float16"),
    (dict(mask=V), ValueError, r"mask must have shape \(4,\), or broadcast to \(4, 1\)"),
    (
        dict(mask=np.ones(4, complex)),
        TypeError,
        "mask must have a boolean, integer or floating dtype. Received: comple",
    ),
    (dict(correction=2), ValueError, "correction must be 0"),
    (dict(nan_policy="no"), ValueError, "nan_policy must be one of"),
    (dict(mask=-np.ones(4)), jax.errors.JaxRuntimeError, "mask must hold finite weights of at least 0. Received: -1"),
    (
        dict(x=np.full((4, 3), np.nan), nan_policy="raise"),
        jax.errors.JaxRuntimeError,
        r"INVALID_ARGUMENT: .*\[0, 1, 2\]|INVALID_ARGUMENT: .*channels",
    ),
]


@pytest.mark.parametrize(("bad", "error", "text"), ERRORS, ids=[str(list(e[0])[-1]) + e[2][:20] for e in ERRORS])
def test_bad_arguments(bad, error, text):
    with pytest.raises(error, match=text):
        jax.block_until_ready(bj.batch_norm_train(**({"x": X} | bad)))


GRADIENT_ERRORS = [
    (dict(invstd=None), TypeError, r"invstd must be an array of shape \(3,\). Received: None"),
    (dict(residual=X, y=X), ValueError, "y must be None if residual is given, as y replaces it. Received: both"),
    (dict(y=X, activation="gelu"), ValueError, "y must be None with activation='gelu', whose gradient needs the resid"),
    (dict(dmean=V), ValueError, "dmean and dvariance must be given together. Received: dmean alone"),
    (dict(dvariance=V), ValueError, "dmean and dvariance must be given together. Received: dvariance alone"),
]


@pytest.mark.parametrize(
    ("bad", "error", "text"), GRADIENT_ERRORS, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_bad_arguments_of_the_gradient(bad, error, text):
    with pytest.raises(error, match=text):
        bj.batch_norm_grad(**({"dy": X, "x": X, "mean": V, "invstd": V} | bad))


def test_a_traced_number_is_refused_by_name():
    with pytest.raises(TypeError, match="momentum must be a real number"):
        jax.jit(lambda m: bj.batch_norm_train(X, momentum=m).y)(0.5)


def test_skip_update():
    x = X.copy()
    x[0, 1] = np.nan
    moved = np.zeros(3, np.float32), V.copy()
    bnfast.batch_norm_train(x, None, None, *moved, nan_policy="skip_update")
    result = bj.batch_norm_train(x, None, None, np.zeros(3, np.float32), V, nan_policy="skip_update")
    equal(result.moving_mean, moved[0])
    equal(result.moving_variance, moved[1])
