"""bnfast.weight_norm and its gradient, against the formulas and PyTorch."""

import numpy as np
import numpy_reference
import pytest
import sample_data
import tolerances
from bnfast.functional.weight_norm import weight_norm, weight_norm_grad

SHAPES = [((7,), 0), ((5, 3), -1), ((3, 4, 6), -1), ((3, 3, 4, 6), 3), ((3, 3, 4, 6), -2), ((6, 4, 3, 3), 0)]
SHAPES += [((3, 3, 4, 2), (-2, -1)), ((3, 2, 4), (2, 0)), ((2, 3, 4), (0, 1, 2))]


def arrays(shape, axis, dtype, seed=0):
    """dw, v, g, g in a shape that broadcasts against v, and the axes of |v|."""
    rng = np.random.default_rng(seed)
    kept = {a % len(shape) for a in np.atleast_1d(axis)}
    over = tuple(a for a in range(len(shape)) if a not in kept)
    dw, v = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    g = rng.uniform(-2, 2, [shape[a] for a in sorted(kept)]).astype("float64" if dtype == "float64" else "float32")
    return dw, v, g, np.expand_dims(g, over), over


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_agrees_with_reference(shape, axis, dtype):
    dw, v, g, wide_g, over = arrays(shape, axis, sample_data.dtype_of(dtype))
    w, (dv, dg) = weight_norm(v, g, axis), weight_norm_grad(dw, v, g, axis)
    expected = numpy_reference.weight_norm(v, wide_g, over)
    expected_dv, expected_dg = numpy_reference.weight_norm_grad(dw, v, wide_g, over)
    assert (w.dtype, dv.dtype, dg.dtype) == (v.dtype, v.dtype, g.dtype)
    eps = 16 * np.finfo(np.float64).eps
    tolerances.close(w, expected, 1 + np.abs(expected), eps, v.dtype, "w")
    tolerances.close(dv, expected_dv, 30, eps, v.dtype, "dv")
    tolerances.close(dg, np.squeeze(expected_dg, over), 30, eps, g.dtype, "dg")


@pytest.mark.parametrize("shape", [(5, 3), (6, 4, 3, 3)])
def test_torch(need, shape):
    torch = need("torch")
    dw, v, g, wide_g, _ = arrays(shape, 0, "float64")
    layer = torch.nn.Linear(3, 5, bias=False) if len(shape) == 2 else torch.nn.Conv2d(4, 6, 3, bias=False)
    layer = torch.nn.utils.parametrizations.weight_norm(layer.double())
    length, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    with torch.no_grad():
        length.copy_(torch.from_numpy(wide_g))
        direction.copy_(torch.from_numpy(v))
    layer.weight.backward(torch.from_numpy(dw))
    dv, dg = weight_norm_grad(dw, v, g, axis=0)
    np.testing.assert_allclose(weight_norm(v, g, axis=0), layer.weight.detach(), rtol=1e-13)
    np.testing.assert_allclose(dv, direction.grad, rtol=0, atol=1e-13)
    np.testing.assert_allclose(dg, length.grad.flatten(), rtol=0, atol=1e-13)


def test_zeros_stay_zeros():
    dw, v, g, *_ = arrays((5, 3), -1, "float32")
    v[:, 1] = 0
    w, (dv, dg) = weight_norm(v, g), weight_norm_grad(dw, v, g)
    for a in (w, dv):
        assert np.isfinite(a).all()
        assert not a[:, 1].any()
        assert a[:, [0, 2]].all()
    assert dg[1] == 0


def test_long_and_short_vectors():
    """The squares are out of float32's range."""
    for size in (1e30, 1e-30):
        v = np.full((4, 2), size, np.float32)
        np.testing.assert_allclose(weight_norm(v, np.ones(2, np.float32)), 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"v": [1.0]}, TypeError, "v must be a NumPy array or have the buffer protocol"),
        ({"v": np.ones((5, 3), int)}, TypeError, "v must have dtype float32, float64, float16 or bfloat16"),
        ({"g": np.ones(5)}, ValueError, r"g must have shape \(3,\) to match axis -1 of v. Received: \(5,\)"),
        (
            {"g": np.ones(3, int)},
            TypeError,
            "g must have dtype float32 or float64 in the machine's byte order. Received: int",
        ),
        ({"axis": 2}, ValueError, r"axis must be one or more different axes in \[-2, 2\).*Received: 2"),
        ({"axis": (1, -1)}, ValueError, r"axis must be one or more different axes.*Received: \(1, -1\)"),
        ({"axis": ()}, ValueError, r"axis must be one or more different axes.*Received: \(\)"),
        ({"axis": 1.0}, TypeError, "axis must be an integer"),
        ({"dw": np.ones((3, 5))}, ValueError, r"dw must have the shape of v, \(5, 3\). Received: \(3, 5\)"),
        ({"dw": np.ones((5, 3), np.float32)}, TypeError, "dw must have the dtype of v, float64"),
        ({"dw": None}, TypeError, "dw must be an array. Received: None"),
    ],
)
def test_bad_arguments(changes, error, text):
    kwargs = {"dw": np.ones((5, 3)), "v": np.ones((5, 3)), "g": np.ones(3), "axis": -1, **changes}
    with pytest.raises(error, match=text):
        weight_norm_grad(**kwargs)
    if "dw" not in changes:
        with pytest.raises(error, match=text):
            weight_norm(kwargs["v"], kwargs["g"], kwargs["axis"])
