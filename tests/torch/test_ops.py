"""bnfast.torch.ops, which Keras's layers call: any axis and strides, masks, recorded calls, two derivatives."""

import bnfast
import numpy as np
import pytest
import torch
from bnfast.torch import ops
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_samples import DispatchedOps, close

BASE = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LAYOUTS = [
    ("channels_last", BASE.contiguous(memory_format=torch.channels_last), 1),
    ("moves to contiguous", BASE.movedim(1, -1), 3),
    ("moves to channels_last", BASE.movedim(1, 2).transpose(2, 3).contiguous().transpose(2, 3), 2),
    ("sliced", BASE[..., ::2], 1),
    ("sliced, last axis", BASE[..., ::2], -1),
    ("transposed", BASE[0, 0].t(), 1),
    ("a strided vector", BASE[0, 0, 0, ::2], 0),
]
MASK = torch.tensor([[[1.0, 0.5, 0.0, 2.0]], [[0.0, 1.0, 1.0, 0.25]]])[..., None].double()  # for axis 1 of BASE


def inputs(x, axis, residual=True):
    """x, gamma, beta and a residual as leaves, and the moving statistics."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    vectors = [torch.rand(x.shape[axis], dtype=torch.float64, generator=generator).to(wide) + 0.5 for _ in range(4)]
    added = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype)] if residual else []
    return [t.detach().requires_grad_() for t in (x, *vectors[:2], *added)], tuple(vectors[2:])


def step(leaves, moving, axis, activation=None, mask=None, epsilon=1e-3, **update):
    x, gamma, beta, residual = (*leaves, None, None, None)[:4]
    options = ops.Options(axis, epsilon, activation)
    return ops.train_step(x, gamma, beta, mask, residual, moving, options, ops.Update(0.75, **update))


def in_numpy(leaves, moving, dy, axis, activation, mask=None):
    """The same of the NumPy functions: y, the moving statistics, dx, dgamma, dbeta, dresidual."""
    (x, dy, residual), (gamma, beta) = (
        [bnfast._arguments.arrays.as_array("x", t.detach().contiguous()) for t in group]
        for group in ((leaves[0], dy, leaves[3]), leaves[1:3])
    )
    mean, variance = (t.numpy().copy() for t in moving)
    kwargs = {"axis": axis, "activation": activation, "residual": residual, "mask": mask}
    made = bnfast.batch_norm_train(x, gamma, beta, mean, variance, momentum=0.75, **kwargs)
    return [made.y, mean, variance, *bnfast.batch_norm_grad(dy, x, made.mean, made.invstd, gamma, beta, **kwargs)]


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(("name", "x", "axis"), LAYOUTS, ids=[name for name, *_ in LAYOUTS])
def test_any_axis_and_strides(name, x, axis, activation):
    leaves, moving = inputs(x, axis)
    before = [t.clone() for t in moving]
    made = step(leaves, moving, axis, activation)
    dy = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    found = [*made, *torch.autograd.grad(made[0], leaves, dy)]
    for ours, numpys in zip(found, in_numpy(leaves, moving, dy, axis, activation), strict=True):
        np.testing.assert_allclose(ours.detach(), numpys, rtol=1e-10, atol=1e-10)
    close([*moving], before)
    means = ops.moments(x, None, axis)
    assert [t.dtype for t in means] == [torch.float64] * 2
    over = [i for i in range(x.dim()) if i != axis % x.dim()]
    close(means[0], x.mean(over) if over else x.contiguous(), 1e-12)
    y = ops.infer(leaves[0], *leaves[1:], moving, ops.Options(axis, 1e-3, activation))
    given = [t.detach().numpy() for t in (*moving, *leaves[1:3])]
    residual = leaves[3].detach().numpy()
    wanted = bnfast.batch_norm_infer(
        x.contiguous().numpy(), *given, axis=axis, activation=activation, residual=residual
    )
    np.testing.assert_allclose(y.detach(), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "x", "axis"), LAYOUTS, ids=[name for name, *_ in LAYOUTS])
def test_second_derivatives_of_any_strides(name, x, axis):
    for activation in (None, "relu", "silu"):
        leaves, moving = inputs(x[..., :2] if x.dim() > 2 else x, axis)
        assert torch.autograd.gradgradcheck(lambda *t, m=moving, a=activation: step(t, m, axis, a)[0], leaves)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_a_mask_has_the_bits_of_the_numpy_functions(need, dtype, wide):
    need("ml_dtypes")
    mask = MASK.to(wide)
    leaves, moving = inputs(BASE.to(dtype), 1)
    dy = torch.randn(BASE.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)
    for activation in (None, "silu"):
        made = step(leaves, moving, 1, activation, mask)
        found = [*made, *torch.autograd.grad(made[0], leaves, dy)]
        for ours, numpys in zip(found, in_numpy(leaves, moving, dy, 1, activation, mask.numpy()), strict=True):
            assert ours.detach().contiguous().view(torch.uint8).numpy().tobytes() == np.asarray(numpys).tobytes()
    mean, variance = ops.moments(BASE.to(dtype), mask, 1)
    _, *wanted = bnfast.moments(BASE.to(dtype), axis=1, mask=mask.numpy())
    assert [mean.numpy().tobytes(), variance.numpy().tobytes()] == [array.tobytes() for array in wanted]


@pytest.mark.parametrize(
    ("mask", "epsilon", "residual"),
    [(MASK, 1e-3, True), (MASK, 1e-3, False), (None, 0.0, True)],
    ids=["mask and residual", "mask", "epsilon 0"],
)
def test_first_and_second_order_numerically(mask, epsilon, residual):
    """What runs on the NumPy functions: a mask, or an epsilon of 0."""
    for activation in (None, "silu"):
        leaves, moving = inputs(BASE[..., :2], 1, residual)

        def function(*t, moving=moving, activation=activation):
            return step(t, moving, 1, activation, mask, epsilon)[0]

        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize(("axis", "residual"), [(1, True), (-1, False)])
def test_recorded_calls_compute_the_same(axis, residual):
    leaves, moving = inputs(BASE, axis, residual)
    results = []
    for recorded in (False, True):
        with DispatchedOps() if recorded else torch.enable_grad() as mode:
            made = step(leaves, moving, axis, "silu", correction=1)
            found = ops.moments(BASE, None, axis)
        results.append([*made, *found, *torch.autograd.grad(made[0].square().sum(), leaves)])
    close(*results, 1e-12)
    assert mode.names.count("bnfast.batch_norm_train.default") == 2
    assert ops.why_not(BASE, MASK) is None
    with mode:
        assert ops.why_not(BASE) is None
        assert ops.why_not(BASE, MASK) == "a compiler records the call, and the recorded ops take no mask"
    with FakeTensorMode() as fake:
        y, mean, variance = step([fake.from_tensor(BASE)], tuple(map(fake.from_tensor, moving)), axis)
    assert (y.shape, mean.shape, variance.dtype) == (BASE.shape, moving[0].shape, torch.float64)


def test_skip_update_leaves_the_channels_that_are_not_finite():
    x = BASE.clone()
    x[0, 1, 0, 0] = torch.inf
    leaves, moving = inputs(x, 1)
    _, mean, variance = step(leaves, moving, 1, nan_policy="skip_update")
    assert (mean == moving[0]).tolist() == (variance == moving[1]).tolist() == [False, True, False]
    assert torch.isfinite(mean).all()


def test_group_norm_of_any_axis():
    gamma, beta = torch.rand(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    y = ops.group_norm(BASE, gamma, beta, (2,), 2, 1e-3)
    wanted = torch.nn.functional.group_norm(BASE.movedim(2, 1), 2, gamma, beta, 1e-3).movedim(1, 2)
    close(y.contiguous(), wanted.contiguous(), 1e-12)
    y = ops.group_norm(BASE, torch.ones(4, 6).double(), None, (2, 3), None, 1e-3)
    close(y, torch.nn.functional.layer_norm(BASE, (4, 6), eps=1e-3), 1e-12)
    for declined in ((BASE, (0,), 1), (BASE[:0], (1,), 1), (BASE, (1, 2), None), (BASE[:0], (2, 3), None)):
        x, axes, groups = declined
        assert ops.group_norm(x, None, None, axes, groups, 1e-3) is None
