"""batch_norm_grad_grad against PyTorch's double backward and finite differences; shapes, dtypes, bad arguments."""

import bnfast
import numpy as np
import pytest
import sample_data
import tolerances
from numpy_reference import central_differences

EPSILON = 1e-3
SHAPES = [((64, 23), 1), ((3, 23, 7, 7), 1), ((5, 9, 7, 3), 3)]
TORCH = {None: lambda f, z: z, "relu": lambda f, z: f.relu(z), "relu6": lambda f, z: f.relu6(z)}
TORCH["leaky_relu"] = lambda f, z: f.leaky_relu(z, 0.3)


def inputs(shape, axis, dtype, seed=1):
    """Arrays x, dy, ddx, residual, ddresidual; vectors gamma, beta, ddgamma, ddbeta, moving mean, moving variance."""
    rng = np.random.default_rng(seed)
    tensors = [sample_data.batch(shape, axis, dtype, rng) for _ in range(5)]
    gamma, beta, mean, variance = sample_data.vectors(shape[axis], rng, "float64" if dtype == np.float64 else "float32")
    return tensors, (gamma, beta, gamma[::-1].copy(), beta * 2, mean, variance)


def statistics(x, axis, moving=None, mask=None):
    """mean and invstd of the batch, or from moving statistics."""
    if moving is not None:
        return moving[0].astype(np.float64), 1 / np.sqrt(moving[1].astype(np.float64) + EPSILON)
    _, mean, _, invstd = bnfast.batch_norm_train(x, axis=axis, mask=mask, epsilon=EPSILON)
    return mean, invstd


def check_close(ours, wanted, eps, what):
    scale = np.abs(wanted).max(initial=0) or 1
    assert np.abs(ours.astype(np.float64) - wanted).max(initial=0) <= eps * scale, what


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", TORCH)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_agrees_with_torch(need, shape, axis, activation, training, dtype):
    torch = need("torch")
    (x, dy, ddx, residual, ddresidual), (gamma, beta, ddgamma, ddbeta, *moving) = inputs(shape, axis, np.dtype(dtype))
    mean, invstd = statistics(x, axis, None if training else moving)
    dy = tolerances.zero_near_kinks(dy, x, mean, invstd, gamma, beta, axis, residual, activation)

    wide = [torch.from_numpy(a.astype(np.float64)).requires_grad_() for a in (x, dy, gamma, beta, residual)]
    tx, tdy, tgamma, tbeta, tresidual = wide
    stored = [torch.from_numpy(a.astype(np.float64)) for a in moving]
    kwargs = {"training": training, "eps": EPSILON}
    z = torch.nn.functional.batch_norm(tx.movedim(axis, 1), *stored, tgamma, tbeta, **kwargs).movedim(1, axis)
    y = TORCH[activation](torch.nn.functional, z + tresidual)
    first = torch.autograd.grad(y, [tx, tgamma, tbeta, tresidual], tdy, create_graph=True)
    given = [torch.from_numpy(a.astype(np.float64)) for a in (ddx, ddgamma, ddbeta, ddresidual)]
    wanted = torch.autograd.grad(first, [tdy, tx, tgamma], given)

    fused = {"activation": activation, "negative_slope": 0.3, "residual": residual, "ddresidual": ddresidual}
    ours = bnfast.batch_norm_grad_grad(
        *(ddx, dy, x, mean, invstd, gamma, beta),
        ddgamma=ddgamma,
        ddbeta=ddbeta,
        axis=axis,
        training=training,
        **fused,
    )
    eps = 50 * np.finfo(dtype).eps
    for name, mine, other in zip(ours._fields, ours, wanted, strict=True):
        assert mine.dtype == x.dtype
        assert mine.shape == (gamma if name == "dgamma" else x).shape
        other = other.numpy()
        if name == "ddy" and activation is not None:  # dy is 0 where rounding decides the side of a kink
            mine, other = (np.where(dy == 0, 0, a) for a in (mine, other))
        check_close(mine, other, eps, name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", sample_data.ACTIVATIONS)
@pytest.mark.parametrize(("shape", "axis"), [((6, 3), 1), ((2, 3, 5), 1)])
def test_agrees_with_finite_differences(shape, axis, activation, masked, training):
    (x, dy, ddx, residual, ddresidual), (gamma, beta, ddgamma, ddbeta, *moving) = inputs(shape, axis, np.float64)
    gamma *= 3
    mask = None
    if masked:
        mask = np.random.default_rng(2).integers(0, 3, [1 if i == axis else e for i, e in enumerate(shape)])
        assert 0 < np.count_nonzero(mask) < mask.size
    kwargs = {"axis": axis, "activation": activation, "residual": residual, "mask": mask, "training": training}

    def loss():
        mean, invstd = statistics(x, axis, None if training else moving, mask)
        dx, dgamma, dbeta, dresidual = bnfast.batch_norm_grad(dy, x, mean, invstd, gamma, beta, **kwargs)
        vectors = (ddgamma * dgamma).sum() + (ddbeta * dbeta).sum()
        return float((ddx * dx).sum() + vectors + (ddresidual * dresidual).sum())

    mean, invstd = statistics(x, axis, None if training else moving, mask)
    cotangents = {"ddgamma": ddgamma, "ddbeta": ddbeta, "ddresidual": ddresidual}
    ours = bnfast.batch_norm_grad_grad(ddx, dy, x, mean, invstd, gamma, beta, **cotangents, **kwargs)
    for name, mine, variable in zip(ours._fields, ours, (dy, x, gamma), strict=True):
        np.testing.assert_allclose(mine, central_differences(loss, variable), rtol=2e-6, atol=2e-7, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_half_types_are_computed_in_float32(activation, dtype):
    (x, dy, ddx, *_), (gamma, beta, ddgamma, ddbeta, *_) = inputs((3, 23, 7, 7), 1, sample_data.dtype_of(dtype))
    mean, invstd = statistics(x, 1)
    kwargs = {"ddgamma": ddgamma, "ddbeta": ddbeta, "axis": 1, "activation": activation}
    ours = bnfast.batch_norm_grad_grad(ddx, dy, x, mean, invstd, gamma, beta, **kwargs)
    wide = (a.astype(np.float32) for a in (ddx, dy, x))
    wanted = bnfast.batch_norm_grad_grad(*wide, mean, invstd, gamma, beta, **kwargs)
    for mine, other in zip(ours[:2], wanted[:2], strict=True):
        assert mine.dtype == x.dtype
        np.testing.assert_array_equal(mine, other.astype(x.dtype))
    np.testing.assert_array_equal(ours.dgamma, wanted.dgamma)


@pytest.mark.parametrize("activation", [None, "relu6"])
@pytest.mark.parametrize("axis", [(1, 2), (0, 2), (2, 1), (0, 1, 2)], ids=str)
def test_several_axes(axis, activation):
    axes = sorted(axis)
    (x, dy, ddx, residual, _), _ = inputs((4, 3, 5), 1, np.float32)
    extents = tuple(x.shape[i] for i in axes)
    channels = int(np.prod(extents))
    gamma, beta, ddgamma, ddbeta = (v.reshape(extents) for v in sample_data.vectors(channels, np.random.default_rng(3)))
    order = [*(i for i in range(3) if i not in axes), *axes]
    off = x.size // gamma.size
    flat = [np.ascontiguousarray(a.transpose(order)).reshape(off, gamma.size) for a in (ddx, dy, x, residual)]
    mask = np.random.default_rng(4).integers(1, 3, off)
    fused = {"activation": activation, "negative_slope": 0.2}
    mean, invstd = statistics(x, axis, mask=mask.reshape([x.shape[i] for i in range(3) if i not in axes]))
    ours = bnfast.batch_norm_grad_grad(
        *(ddx, dy, x, mean, invstd, gamma, beta),
        ddgamma=ddgamma,
        ddbeta=ddbeta,
        residual=residual,
        axis=axis,
        **fused,
        mask=mask.reshape([x.shape[i] for i in range(3) if i not in axes]),
    )
    wanted = bnfast.batch_norm_grad_grad(
        *flat[:3],
        *(v.ravel() for v in (mean, invstd, gamma, beta)),
        ddgamma=ddgamma.ravel(),
        ddbeta=ddbeta.ravel(),
        residual=flat[3],
        mask=mask,
        **fused,
    )
    assert ours.dgamma.shape == extents
    for mine, other in zip(ours[:2], wanted[:2], strict=True):
        assert mine.shape == x.shape
        np.testing.assert_allclose(mine.transpose(order).reshape(other.shape), other, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.dgamma.ravel(), wanted.dgamma, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), sample_data.EMPTY)
def test_empty_batch(shape, axis, dtype):
    (x, *_), (gamma, *_) = inputs(shape, axis, sample_data.dtype_of(dtype))
    result = bnfast.batch_norm_grad_grad(x, x, x, *statistics(x, axis), gamma, axis=axis)
    assert result.ddy.shape == result.dx.shape == shape
    assert not result.dgamma.any()


def test_one_value_per_channel_and_a_fully_masked_batch():
    (x, dy, ddx, *_), (gamma, _, ddgamma, ddbeta, *_) = inputs((1, 23), 1, np.float32)
    kwargs = {"ddgamma": ddgamma, "ddbeta": ddbeta}
    single = bnfast.batch_norm_grad_grad(ddx, dy, x, *statistics(x, 1), gamma, **kwargs)
    np.testing.assert_allclose(single.ddy[0], ddbeta, atol=2e-5)  # xhat is 0 and dx constantly 0
    assert not single.dx.any()
    assert not single.dgamma.any()
    nothing = np.zeros(1)
    masked = bnfast.batch_norm_grad_grad(ddx, dy, x, *statistics(x, 1, mask=nothing), gamma, mask=nothing, **kwargs)
    s = 1 / np.sqrt(EPSILON)  # the frozen gradient at mean and variance 0
    np.testing.assert_allclose(masked.dx, s * ddgamma * dy, rtol=1e-6)
    np.testing.assert_allclose(masked.dgamma, s * (ddx * dy)[0], rtol=1e-6)


def test_a_constant_channel_without_epsilon_and_values_of_weight_0():
    x = np.ones((4, 2), np.float32)
    result = bnfast.batch_norm_grad_grad(x, x, x, np.ones(2), np.zeros(2), ddbeta=np.full(2, 3.0))
    np.testing.assert_array_equal(result.ddy, np.full((4, 2), 3, np.float32))
    assert not result.dx.any()
    (x, dy, ddx, *_), _ = inputs((5, 3), 1, np.float32)
    mask = np.array([1, 1, 0, 1, 1])
    finite = bnfast.batch_norm_grad_grad(ddx, dy, x, *statistics(x, 1, mask=mask), mask=mask)
    ddx[2] = np.inf
    infinite = bnfast.batch_norm_grad_grad(ddx, dy, x, *statistics(x, 1, mask=mask), mask=mask)
    np.testing.assert_array_equal(finite.ddy[[0, 1, 3, 4]], infinite.ddy[[0, 1, 3, 4]])


def test_inputs_are_not_written():
    (x, dy, ddx, residual, ddresidual), vectors = inputs((3, 4, 5), 1, np.float32)
    mean, invstd = statistics(x, 1)
    given = [ddx, dy, x, mean, invstd, *vectors[:2], *vectors[2:4], residual, ddresidual]
    before = [a.tobytes() for a in given]
    for activation in (None, "relu"):
        bnfast.batch_norm_grad_grad(
            *given[:7], ddgamma=vectors[2], ddbeta=vectors[3], residual=residual, ddresidual=ddresidual, axis=1,
            activation=activation,
        )  # fmt: skip
    assert [a.tobytes() for a in given] == before


def test_dtype_of_dgamma():
    (x, dy, ddx, *_), (gamma, *_) = inputs((6, 3), 1, np.float32)
    stats = statistics(x, 1)
    for given, wanted in ((gamma, np.float32), (gamma.astype(np.float64), np.float64), (None, np.float32)):
        assert bnfast.batch_norm_grad_grad(ddx, dy, x, *stats, given).dgamma.dtype == wanted
    wide = (a.astype(np.float64) for a in (ddx, dy, x))
    assert bnfast.batch_norm_grad_grad(*wide, *stats).dgamma.dtype == np.float64


X = np.ones((6, 3), np.float32)
V = np.ones(3)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"ddx": X[:5]}, ValueError, r"ddx must have the shape of x, \(6, 3\). Received: \(5, 3\)"),
        ({"ddx": None}, TypeError, "ddx must be a NumPy array"),
        ({"dy": X.astype(np.float64)}, TypeError, "dy must have the dtype of x, float32. Received: float64"),
        ({"mean": None}, TypeError, r"mean must be an array of shape \(3,\). Received: None"),
        ({"invstd": V[:2]}, ValueError, r"invstd must have shape \(3,\) to match axis -1 of x. Received: \(2,\)"),
        ({"ddgamma": V[:2]}, ValueError, r"ddgamma must have shape \(3,\) to match axis -1 of x"),
        ({"ddbeta": V.astype(int)}, TypeError, "ddbeta must have dtype float32 or float64"),
        ({"ddresidual": X}, ValueError, "ddresidual must be None without a residual. Received: ndarray"),
        ({"ddresidual": X[1:], "residual": X}, ValueError, "ddresidual must have the shape of x"),
        ({"axis": 2}, ValueError, r"axis must be in \[-2, 2\)"),
        ({"mask": -np.ones(6)}, ValueError, "mask must hold finite weights of at least 0. Received: -1.0"),
        ({"activation": "tanh"}, ValueError, "activation must be one of"),
        ({"training": 1}, TypeError, "training must be True or False. Received: 1"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs, error, text):
    with pytest.raises(error, match=text):
        bnfast.batch_norm_grad_grad(**({"ddx": X, "dy": X, "x": X, "mean": V, "invstd": V} | kwargs))
