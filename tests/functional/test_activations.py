"""Every activation of every norm: values and gradients against the reference, bits, words, and what is refused."""

import bnfast
import numpy as np
import numpy_reference
import pytest
import sample_data
from bnfast import _core
from bnfast._arguments import checks

WORDS = [word for word in checks.ACTIVATIONS if word]
NORMS = {  # name: shape, axis of the channels (layer norm: the normalized axes), groups
    "batch": ((3, 23, 7, 7), 1, None),
    "batch columns": ((65, 23), 1, None),
    "group": ((3, 12, 5, 5), 1, 4),
    "group columns": ((4, 9, 12), 2, 3),
    "group rows": ((7, 24), 1, 4),
    "group transposed": ((3, 4, 8, 5), 2, 2),
    "instance": ((2, 5, 31), 1, 5),
    "layer": ((3, 5, 70), -1, None),
    "layer axes": ((4, 6, 9), (1, 2), None),
}


def arguments_of(norm, dtype, residual):
    shape, axis, groups = NORMS[norm]
    rng = np.random.default_rng(5)
    axes = tuple(a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,)))
    vector = tuple(shape[a] for a in axes)
    parameter = np.float64 if dtype == np.float64 else np.float32
    x, dy, added = ((rng.standard_normal(shape) * 1.5).astype(dtype) for _ in range(3))
    gamma, beta = rng.uniform(0.5, 2, vector).astype(parameter), rng.normal(size=vector).astype(parameter)
    return x, dy, gamma, beta, added if residual else None, axis, groups


def run(norm, x, dy, gamma, beta, residual, axis, groups, **options):
    """y, dx, dgamma, dbeta, dresidual."""
    kwargs = {"axis": axis, "residual": residual, **options}
    if norm.startswith("batch"):
        forward = bnfast.batch_norm_train(x, gamma, beta, **kwargs)
        gradient = bnfast.batch_norm_grad(dy, x, forward.mean, forward.invstd, gamma, beta, **kwargs)
        return forward.y, *gradient
    if norm.startswith("layer"):
        forward = bnfast.layer_norm(x, gamma, beta, **kwargs)
        gradient = bnfast.layer_norm_grad(dy, x, forward.mean, forward.invstd, gamma, beta, **kwargs)
    elif norm == "instance":
        forward = bnfast.instance_norm(x, gamma, beta, **kwargs)
        gradient = bnfast.instance_norm_grad(dy, x, forward.mean, forward.invstd, gamma, beta, **kwargs)
    else:
        forward = bnfast.group_norm(x, groups, gamma, beta, **kwargs)
        gradient = bnfast.group_norm_grad(dy, x, forward.mean, forward.invstd, groups, gamma, beta, **kwargs)
    return forward.y, *gradient, gradient.dresidual


def expected(norm, x, dy, gamma, beta, residual, axis, groups, activation):
    """The same from the reference of the plain norm, in the wide dtype."""
    wide = numpy_reference.wide_dtype(x)
    dy = dy.astype(wide)
    if norm.startswith("batch"):
        forward = numpy_reference.train(x, gamma, beta, axis=axis)
        z = forward.y
    elif norm.startswith("layer"):
        axes = axis if isinstance(axis, tuple) else (axis,)
        z = numpy_reference.layer_norm(x, gamma, beta, axes=axes)[0]
    else:
        z = numpy_reference.group_norm(x, groups, gamma, beta, axis=axis)[0]
    if residual is not None:
        z = z + residual.astype(wide)
    dz = dy * numpy_reference.activation_slope(z, activation, 0.2)
    if norm.startswith("batch"):
        gradient = numpy_reference.grad(dz, x, forward.mean, forward.invstd, gamma, beta, axis=axis)[:3]
    elif norm.startswith("layer"):
        gradient = numpy_reference.layer_norm(x, gamma, beta, axes=axes, dy=dz)[3:]
    else:
        gradient = numpy_reference.group_norm(x, groups, gamma, beta, axis=axis, dy=dz)[3:]
    return numpy_reference.activate(z, activation, 0.2), *gradient, None if residual is None else dz


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", WORDS)
@pytest.mark.parametrize("norm", NORMS)
def test_agrees_with_the_reference(norm, activation, residual, dtype):
    dtype = sample_data.dtype_of(dtype)
    call = arguments_of(norm, dtype, residual)
    results = run(norm, *call, activation=activation)
    wanted = expected(norm, *call, activation)
    half = dtype.itemsize == 2
    eps = 2.0**-8 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)
    for name, mine, other in zip(("y", "dx", "dgamma", "dbeta", "dresidual"), results, wanted, strict=True):
        if other is None:
            assert mine is None
            continue
        tolerance = eps if half and name in ("y", "dx", "dresidual") else 60 * (2.0**-23 if half else eps)
        scale = np.abs(other).max()
        off = np.abs(mine.astype(other.dtype) - other) > 1.01 * tolerance * scale
        if activation in ("relu", "relu6", "leaky_relu", "hard_silu", "hard_sigmoid"):
            assert off.sum() <= 1, name  # a value at a kink may fall on either side
        else:
            assert not off.any(), name


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_on_every_instruction_set_and_team(norm, dtype):
    call = arguments_of(norm, sample_data.dtype_of(dtype), True)
    before = bnfast.get_num_threads()
    for activation in WORDS:
        results = []
        for isa in ("baseline", "avx2", "avx512"):
            for threads in (1, 2, 3):
                try:
                    _core._set_isa(isa)
                except (RuntimeError, ValueError):
                    continue  # this processor lacks it
                try:
                    bnfast.set_num_threads(threads)
                    _core._set_serial_bytes(0)
                    results.append([a.tobytes() for a in run(norm, *call, activation=activation)])
                finally:
                    _core._set_isa(None)
                    _core._set_serial_bytes(None)
                    bnfast.set_num_threads(before)
        assert all(r == results[0] for r in results[1:]), activation


@pytest.mark.parametrize("activation", WORDS)
def test_infer_is_train_with_the_batch_statistics(activation):
    x, _, gamma, beta, residual, axis, _ = arguments_of("batch", np.float32, True)
    kwargs = {"axis": axis, "residual": residual, "activation": activation}
    y, mean, variance, _ = bnfast.batch_norm_train(x, gamma, beta, **kwargs)
    np.testing.assert_array_equal(bnfast.batch_norm_infer(x, mean, variance, gamma, beta, **kwargs), y)


@pytest.mark.parametrize("norm", ["group", "group rows", "instance", "layer", "group transposed"])
def test_outputs_given(norm):
    x, dy, gamma, beta, residual, axis, groups = arguments_of(norm, np.float32, True)
    wanted = run(norm, x, dy, gamma, beta, residual, axis, groups, activation="silu")
    forward = bnfast.group_norm if groups else bnfast.layer_norm
    backward = bnfast.group_norm_grad if groups else bnfast.layer_norm_grad
    count = (groups,) if groups else ()
    result = forward(x, *count, gamma, beta, axis=axis)
    kwargs = {"axis": axis, "activation": "silu", "residual": residual}
    arguments = (x, result.mean, result.invstd, *count, gamma, beta)
    dx, other = dy.copy(), np.empty_like(x)
    mine = backward(dx, *arguments, **kwargs, out=dx, out_dresidual=other)
    assert mine.dx is dx
    assert mine.dresidual is other
    np.testing.assert_array_equal(mine.dx, wanted[1])
    np.testing.assert_array_equal(mine.dresidual, wanted[4])
    assert backward(dy, *arguments, axis=axis, residual=residual).dresidual is dy
    assert backward(dy, *arguments, axis=axis).dresidual is None
    with pytest.raises(ValueError, match="out_dresidual must be None without an activation"):
        backward(dy, *arguments, axis=axis, residual=residual, out_dresidual=other)
    with pytest.raises(ValueError, match="out must not overlap residual"):
        backward(dy, *arguments, **kwargs, out=residual)


@pytest.mark.parametrize(("alias", "word"), [("swish", "silu"), ("hard_swish", "hard_silu")])
def test_aliases(alias, word):
    for norm in NORMS:
        call = arguments_of(norm, np.float32, True)
        for mine, other in zip(run(norm, *call, activation=alias), run(norm, *call, activation=word), strict=True):
            np.testing.assert_array_equal(mine, other)
    assert bnfast.BatchNormalization(activation=alias).activation == word


def test_an_unknown_word_names_the_known_ones():
    for norm in NORMS:
        with pytest.raises(ValueError, match=r"activation must be one of .*'silu'.*'mish'\).* Received: 'glu'"):
            run(norm, *arguments_of(norm, np.float32, False), activation="glu")


def test_y_takes_the_place_of_the_residual_only_for_the_relus():
    x, dy, gamma, beta, residual, axis, _ = arguments_of("batch", np.float32, True)
    for activation in WORDS:
        kwargs = {"axis": axis, "activation": activation}
        y, mean, _, invstd = bnfast.batch_norm_train(x, gamma, beta, residual=residual, **kwargs)
        if activation in checks.PIECEWISE_LINEAR:
            bnfast.batch_norm_grad(dy, x, mean, invstd, gamma, beta, y=y, **kwargs)
            continue
        with pytest.raises(ValueError, match=f"y must be None with activation='{activation}'"):
            bnfast.batch_norm_grad(dy, x, mean, invstd, gamma, beta, y=y, **kwargs)


def test_the_second_derivative_is_refused_by_name():
    x, dy, gamma, beta, _, axis, _ = arguments_of("batch", np.float32, False)
    _, mean, _, invstd = bnfast.batch_norm_train(x, axis=axis)
    with pytest.raises(ValueError, match=r"activation must be one of \(None, 'relu'.*Received: 'gelu'"):
        bnfast.batch_norm_grad_grad(dy, dy, x, mean, invstd, gamma, beta, axis=axis, activation="gelu")


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize("activation", WORDS)
def test_nan_passes(activation, dtype):
    x = np.ones((4, 3, 2), sample_data.dtype_of(dtype))
    x[1, 2] = np.nan
    y = bnfast.batch_norm_infer(x, np.zeros(3), np.ones(3), axis=1, activation=activation)
    np.testing.assert_array_equal(np.isnan(y.astype(np.float32)), np.isnan(x.astype(np.float32)))
    y = bnfast.layer_norm(x, activation=activation).y
    np.testing.assert_array_equal(np.isnan(y.astype(np.float32)), np.isnan(x.astype(np.float32)))


@pytest.mark.parametrize("activation", WORDS)
def test_the_layer_and_its_per_sample_parameters(activation):
    """The labels' gamma and beta run on NumPy around the kernels; with one class they are those of the layer."""
    x, dy, _, _, residual, axis, _ = arguments_of("batch", np.float64, True)
    plain = bnfast.BatchNormalization(axis=axis, activation=activation)
    labelled = bnfast.ConditionalBatchNormalization(1, axis=axis, activation=activation)
    y = plain(x, training=True, residual=residual)
    other = labelled(x, np.zeros(len(x), int), training=True, residual=residual)
    np.testing.assert_allclose(other, y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(labelled.backward(dy), plain.backward(dy), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", WORDS)
def test_the_callback_passes_the_word_on(activation):
    x, dy, gamma, beta, residual, axis, _ = arguments_of("batch", np.float32, True)
    wanted = run("batch", x, dy, gamma, beta, residual, axis, None, activation=activation)

    def fallback(*arrays):
        raise AssertionError("declined")

    constants = {
        "axis": axis, "momentum": 0.9, "epsilon": 1e-3, "activation": activation, "negative_slope": 0.2,
        "correction": 0, "nan_policy": "propagate",
    }  # fmt: skip
    train = _core.Callback("train", ["x", "gamma", "beta", "residual"], constants, fallback)
    y, mean, invstd, _ = train(x, gamma, beta, residual)
    np.testing.assert_array_equal(y, wanted[0])
    constants = {"axis": axis, "activation": activation, "negative_slope": 0.2, "training": True}
    grad = _core.Callback("grad", ["dy", "x", "mean", "invstd", "gamma", "beta", "residual"], constants, fallback)
    for mine, other in zip(grad(dy, x, mean, invstd, gamma, beta, residual), wanted[1:], strict=True):
        np.testing.assert_array_equal(mine, other)
