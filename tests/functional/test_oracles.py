"""Other implementations: PyTorch's forward, backward and running statistics, and ONNX's node tests."""

import warnings

import bnfast
import numpy as np
import pytest
import sample_data

TORCH_SHAPES = [(64, 23), (3000, 100), (5, 3, 49), (2, 257, 7), (3, 23, 7, 7), (2, 64, 14, 14), (2, 3, 4, 7, 7)]
ACTIVATIONS = {None: lambda f, z: z, "relu": lambda f, z: f.relu(z), "relu6": lambda f, z: f.relu6(z)}
ACTIVATIONS["leaky_relu"] = lambda f, z: f.leaky_relu(z, 0.2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", TORCH_SHAPES)
def test_torch_batch_norm(need, shape, activation, training, dtype):
    torch = need("torch")
    rng = np.random.default_rng(1)
    x, dy, residual = (sample_data.batch(shape, 1, dtype, rng) for _ in range(3))
    gamma, beta, mean, variance = sample_data.vectors(shape[1], rng, dtype)
    tx, tg, tb, tr = (torch.from_numpy(a.copy()).requires_grad_() for a in (x, gamma, beta, residual))
    tm, tv = torch.from_numpy(mean.copy()), torch.from_numpy(variance.copy())
    z = torch.nn.functional.batch_norm(tx, tm, tv, tg, tb, training, momentum=0.3, eps=1e-5) + tr
    near = ((z.abs() < 1e-3) | ((z - 6).abs() < 1e-3)).numpy()  # rounding decides the side of a kink
    dy[near] = 0
    ty = ACTIVATIONS[activation](torch.nn.functional, z)
    ty.backward(torch.from_numpy(dy))

    fused = {"axis": 1, "activation": activation, "residual": residual}
    if training:
        forward = {"momentum": 0.7, "epsilon": 1e-5, "correction": 1, **fused}
        y, batch_mean, _, invstd = bnfast.batch_norm_train(x, gamma, beta, mean, variance, **forward)
    else:
        y = bnfast.batch_norm_infer(x, mean, variance, gamma, beta, epsilon=1e-5, **fused)
        batch_mean, invstd = mean.astype(np.float64), 1 / np.sqrt(variance.astype(np.float64) + 1e-5)
    grad = bnfast.batch_norm_grad(dy, x, batch_mean, invstd, gamma, beta, training=training, **fused)

    eps = np.finfo(dtype).eps
    count = x.size / shape[1]
    for mine, other, scale in (
        (y, ty, 10),
        (mean, tm, 10),
        (variance, tv, 10),
        (grad.dx, tx.grad, 30),
        (grad.dresidual, tr.grad, 2),
        (grad.dgamma, tg.grad, 10 * count),
        (grad.dbeta, tb.grad, 10 * count),
    ):
        other = other.detach().numpy()
        # PyTorch adds (3000, 100) row by row, so its mean is off by about 100 eps
        np.testing.assert_allclose(mine, other, rtol=100 * eps, atol=scale * (4 + count / 100) * eps)


@pytest.fixture(scope="module")
def onnx_cases(need):
    need("onnx")
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the cases of other operators, which are created too
        cases = {case.name: case for case in load_model_tests(kind="node")}
    return {name: case for name, case in cases.items() if name.startswith("test_batchnorm_")}


def test_onnx_names(onnx_cases):
    assert sorted(onnx_cases) == sorted(ONNX)


ONNX = [f"test_batchnorm_{kind}{mode}" for kind in ("example", "epsilon") for mode in ("", "_training_mode")]


@pytest.mark.parametrize("name", ONNX)
def test_onnx_node(onnx_cases, name):
    """ONNX's momentum is the weight of the old value, as here, and its running variance is a population variance."""
    case = onnx_cases[name]
    attributes = {a.name: a.f or a.i for a in case.model.graph.node[0].attribute}
    epsilon = attributes.get("epsilon", 1e-5)
    for inputs, outputs in case.data_sets:
        x, gamma, beta, mean, variance = (np.array(a) for a in inputs)
        if attributes.get("training_mode"):
            options = {"axis": 1, "epsilon": epsilon, "momentum": attributes.get("momentum", 0.9)}
            y = bnfast.batch_norm_train(x, gamma, beta, mean, variance, **options).y
            actual = [y, mean, variance]
        else:
            actual = [bnfast.batch_norm_infer(x, mean, variance, gamma, beta, axis=1, epsilon=epsilon)]
        for mine, other in zip(actual, outputs, strict=True):
            assert mine.dtype == other.dtype
            np.testing.assert_allclose(mine, other, rtol=case.rtol, atol=case.atol)
