"""Bad arguments: the error names the argument, what was wanted and what was received, and nothing is changed."""

import bnfast
import numpy as np
import pytest

C = 5
X = np.random.default_rng(1).standard_normal((6, C)).astype(np.float32)
GOOD = np.ones(C, np.float32)


def strided(array):
    """The same values with a gap after each."""
    return np.repeat(array, 2, axis=-1)[..., ::2]


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def misaligned(array):
    raw = np.zeros(array.nbytes + 1, np.uint8)
    moved = raw[1:].view(array.dtype).reshape(array.shape)
    moved[...] = array
    return moved


class OnTheGpu:
    def __dlpack__(self, **_):
        raise AssertionError("must not be called")

    def __dlpack_device__(self):
        return (2, 0)


TENSOR = [  # for arguments that must have the shape and dtype of x
    (X.tolist(), TypeError, "must be a NumPy array or have the buffer protocol or __dlpack__. Received: list"),
    (np.ma.masked_array(X), TypeError, "must be a plain array, with weights in mask=. Received: MaskedArray"),
    (OnTheGpu(), TypeError, r"must be in the CPU's memory. Received: DLPack device \(2, 0\)"),
]
DTYPE = [
    (X.astype(np.int32), TypeError, "must have dtype float32, float64, float16 or bfloat16.*Received: int32"),
    (X.astype(">f4"), TypeError, "in the machine's byte order. Received: >f4"),
    (X.astype(np.complex64), TypeError, "Received: complex64"),
    (np.float32(1), ValueError, r"must have at least one axis. Received: shape \(\)"),
    (None, TypeError, "must be a NumPy array.*Received: NoneType"),
]
LIKE = [
    (X.astype(np.float64), TypeError, "must have the dtype of x, float32. Received: float64"),
    (X[:, :4], ValueError, r"must have the shape of x, \(6, 5\). Received: \(6, 4\)"),
    (X[None], ValueError, r"must have the shape of x, \(6, 5\). Received: \(1, 6, 5\)"),
]
VECTOR = [
    (GOOD[:4], ValueError, r"must have shape \(5,\) to match axis -1 of x. Received: \(4,\)"),
    (GOOD[None], ValueError, r"must have shape \(5,\).*Received: \(1, 5\)"),
    (np.float32(1), ValueError, r"must have shape \(5,\).*Received: \(\)"),
    (GOOD.astype(np.float16), TypeError, "must have dtype float32 or float64.*Received: float16"),
    (GOOD.astype(np.int64), TypeError, "must have dtype float32 or float64.*Received: int64"),
    (GOOD.astype(">f8"), TypeError, "in the machine's byte order. Received: >f8"),
]
GIVEN_AS_LIST = [([1.0] * C, TypeError, "must be a NumPy array.*Received: list")]
REQUIRED = [(None, TypeError, r"must be an array of shape \(5,\). Received: None")]
IN_PLACE = [
    (strided(GOOD), ValueError, "must be C-contiguous, as it is written in place. Received: shape"),
    (read_only(GOOD), ValueError, "must be writeable, as it is written in place. Received: shape"),
    (misaligned(GOOD), ValueError, "must be aligned, as it is written in place. Received: shape"),
]
NO_ARRAY = ([1.0] * C, TypeError, "must be a NumPy array, as it is updated in place. Received: list")
MOVING = [*VECTOR[:2], *VECTOR[3:], *IN_PLACE, NO_ARRAY]
AXIS = [
    (2, ValueError, r"must be in \[-2, 2\) for x of shape \(6, 5\). Received: 2"),
    (-3, ValueError, "Received: -3"),
    (10**30, ValueError, "Received: 1000"),
    (1.0, TypeError, "must be an integer. Received: 1.0"),
    (True, TypeError, "must be an integer. Received: True"),
    ("1", TypeError, "must be an integer. Received: '1'"),
    (None, TypeError, "must be an integer. Received: None"),
    ((0, -2), ValueError, r"must name each axis once. Received: \(0, -2\) for x of shape \(6, 5\)"),
    ((0, 2), ValueError, r"must be in \[-2, 2\) for x of shape \(6, 5\). Received: 2"),
    ([0, 1.0], TypeError, "must be an integer. Received: 1.0"),
    ([], ValueError, r"must name at least one axis. Received: \[\]"),
]
NOT_A_NUMBER = [
    ("0.5", TypeError, "must be a real number. Received: '0.5'"),
    (None, TypeError, "must be a real number. Received: None"),
    (True, TypeError, "must be a real number. Received: True"),
    (0.5j, TypeError, "must be a real number. Received: 0.5j"),
    (np.ones(1), TypeError, "must be a real number. Received: array"),
]
AT_LEAST_0 = [
    *NOT_A_NUMBER,
    (-1e-9, ValueError, "must be finite and at least 0. Received: -1e-09"),
    (np.nan, ValueError, "must be finite and at least 0. Received: nan"),
    (np.inf, ValueError, "must be finite and at least 0. Received: inf"),
]
MOMENTUM = [
    *NOT_A_NUMBER,
    (-0.1, ValueError, r"must be in \[0, 1\]. Received: -0.1"),
    (1.1, ValueError, r"must be in \[0, 1\]. Received: 1.1"),
    (np.float32(2), ValueError, r"must be in \[0, 1\]. Received: 2.0"),
    (np.nan, ValueError, r"must be in \[0, 1\]. Received: nan"),
]
MASK = [
    (np.ones(C), ValueError, r"must have shape \(6,\), or broadcast to \(6, 1\) with as many.*Received: \(5,\)"),
    (np.ones((6, 5)), ValueError, r"Received: \(6, 5\)"),
    (np.ones((2, 1)), ValueError, r"Received: \(2, 1\)"),
    (np.ones(()), ValueError, r"Received: \(\)"),
    (np.array([1, 1, 1, -0.5, 1, 1]), ValueError, "must hold finite weights of at least 0. Received: -0.5"),
    (np.array([1, 1, 1, np.nan, 1, 1]), ValueError, "must hold finite weights of at least 0. Received: nan"),
    (np.array([1, 1, 1, np.inf, 1, 1]), ValueError, "must hold finite weights of at least 0. Received: inf"),
    (np.array([1, 1, 1, 1e300, 1, 1]), ValueError, "must hold finite weights of at least 0. Received: inf"),
    (np.ones(6, complex), TypeError, "must have a boolean, integer or floating dtype. Received: complex128"),
    ([1] * 6, TypeError, "must be a NumPy array.*Received: list"),
]
ACTIVATION = [
    ("cosh", ValueError, "must be one of .*'relu6', 'leaky_relu'.*'mish'.*Received: 'cosh'"),
    (b"relu", TypeError, "must be one of .*Received: b'relu'"),
    (np.tanh, TypeError, "must be one of .*Received: "),
]
NAN_POLICY = [
    ("ignore", ValueError, r"must be one of \('propagate', 'skip_update', 'raise'\). Received: 'ignore'"),
    (None, ValueError, "Received: None"),
    (0, TypeError, "Received: 0"),
]
CORRECTION = [
    (2, ValueError, r"must be 0 \(population variance\) or 1 \(sample variance\). Received: 2"),
    (-1, ValueError, "Received: -1"),
    (0.5, TypeError, "must be an integer. Received: 0.5"),
    (1.0, TypeError, "must be an integer. Received: 1.0"),
    (True, TypeError, "must be an integer. Received: True"),
    (None, TypeError, "must be an integer. Received: None"),
]
TRAINING = [
    (1, TypeError, "must be True or False. Received: 1"),
    (None, TypeError, "must be True or False. Received: None"),
    ("yes", TypeError, "must be True or False. Received: 'yes'"),
]
OUT = [
    (X.tolist(), TypeError, "must be a NumPy array. Received: list"),
    (np.zeros((6, 4), np.float32), ValueError, r"must have the shape of (x|dy), \(6, 5\). Received: \(6, 4\)"),
    (np.zeros((6, 5)), TypeError, "must have the dtype of (x|dy), float32. Received: float64"),
    (strided(X), ValueError, r"must be C-contiguous.*Received: shape \(6, 5\), strides \(40, 8\)"),
    (np.asfortranarray(X), ValueError, "must be C-contiguous"),
    (read_only(X), ValueError, "must be writeable"),
    (misaligned(X), ValueError, "must be aligned"),
]

TRAIN = {
    "x": TENSOR + DTYPE,
    "gamma": VECTOR + GIVEN_AS_LIST,
    "beta": VECTOR + GIVEN_AS_LIST,
    "moving_mean": MOVING,
    "moving_variance": MOVING,
    "axis": AXIS,
    "momentum": MOMENTUM,
    "epsilon": AT_LEAST_0,
    "mask": MASK,
    "activation": ACTIVATION,
    "negative_slope": AT_LEAST_0,
    "residual": TENSOR + LIKE,
    "correction": CORRECTION,
    "nan_policy": NAN_POLICY,
    "out": OUT,
}
INFER = {
    "x": TENSOR + DTYPE,
    "moving_mean": VECTOR + GIVEN_AS_LIST + REQUIRED,
    "moving_variance": VECTOR + GIVEN_AS_LIST + REQUIRED,
    **{name: TRAIN[name] for name in ("gamma", "beta", "axis", "epsilon", "activation", "negative_slope")},
    "residual": TENSOR + LIKE,
    "out": OUT,
}
GRAD = {
    "dy": TENSOR + DTYPE + LIKE,
    "x": TENSOR + DTYPE,
    "mean": VECTOR + GIVEN_AS_LIST + REQUIRED,
    "invstd": VECTOR + GIVEN_AS_LIST + REQUIRED,
    **{name: TRAIN[name] for name in ("gamma", "beta", "axis", "mask", "activation", "negative_slope", "residual")},
    "y": TENSOR + LIKE,
    "training": TRAINING,
    "dmean": VECTOR + GIVEN_AS_LIST,
    "dvariance": VECTOR + GIVEN_AS_LIST,
    "out": OUT,
    "out_dresidual": OUT,
}
MOMENTS = {"x": TENSOR + DTYPE, "axis": AXIS, "mask": MASK}


def arguments(function):
    """Valid arguments, in new arrays."""
    tensor, vector = (lambda: X.copy()), (lambda: GOOD.copy())
    every = {
        **{name: tensor() for name in ("x", "dy", "residual", "out")},
        **{name: vector() for name in ("gamma", "beta", "moving_mean", "moving_variance", "dmean", "dvariance")},
        "mean": np.zeros(C),
        "invstd": np.ones(C),
        "mask": None,
        "axis": -1,
        "momentum": 0.9,
        "epsilon": 1e-3,
        "y": None,
        "out_dresidual": None,
        "activation": None,
        "negative_slope": 0.2,
        "correction": 0,
        "nan_policy": "propagate",
        "training": True,
    }
    return {name: every[name] for name in TABLES[function]}


TABLES = {
    bnfast.batch_norm_train: TRAIN,
    bnfast.batch_norm_infer: INFER,
    bnfast.batch_norm_grad: GRAD,
    bnfast.moments: MOMENTS,
}
CASES = [
    pytest.param(function, name, *case, id=f"{function.__name__}-{name}-{i}")
    for function, table in TABLES.items()
    for name, cases in table.items()
    for i, case in enumerate(cases)
]


def content(args):
    return {name: a.tobytes() for name, a in args.items() if isinstance(a, np.ndarray)}


@pytest.mark.parametrize("function", TABLES)
def test_every_argument_has_cases(function):
    names = function.__code__.co_varnames[: function.__code__.co_argcount + function.__code__.co_kwonlyargcount]
    assert sorted(TABLES[function]) == sorted(names)
    assert function(**arguments(function)) is not None


@pytest.mark.parametrize(("function", "name", "bad", "error", "text"), CASES)
def test_bad_argument(function, name, bad, error, text):
    args = arguments(function) | {name: bad}
    before = content(args)
    with pytest.raises(error, match=rf"(?s)^{name} .*{text}") as caught:
        function(**args)
    assert "Received: " in str(caught.value)
    assert caught.type is error
    assert content(args) == before
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("absent", ["moving_mean", "moving_variance"])
def test_moving_statistics_must_be_given_together(absent):
    args = arguments(bnfast.batch_norm_train) | {absent: None}
    before = content(args)
    with pytest.raises(ValueError, match=r"moving_mean and moving_variance must be given together. Received: moving_"):
        bnfast.batch_norm_train(**args)
    assert content(args) == before


def test_residual_and_y_exclude_each_other():
    args = arguments(bnfast.batch_norm_grad) | {"y": X.copy()}
    with pytest.raises(ValueError, match=r"^y must be None if residual is given, as y replaces it. Received: both$"):
        bnfast.batch_norm_grad(**args)


def test_the_message_names_the_axis():
    with pytest.raises(ValueError, match=r"gamma must have shape \(64,\) to match axis 1 of x. Received: \(32,\)"):
        bnfast.batch_norm_train(np.zeros((2, 64, 3), np.float32), np.ones(32, np.float32), axis=1)


@pytest.mark.parametrize("other", ["gamma", "beta", "moving_mean", "moving_variance", "mask", "residual", "x"])
def test_out_overlaps_an_input(other):
    block = np.zeros(64, np.float32)
    args = arguments(bnfast.batch_norm_train)
    args["out"] = block[:30].reshape(6, 5)
    places = {"mask": block[24:30], "residual": args["out"], "x": block[5:35].reshape(6, 5)}
    args[other] = places.get(other, block[29:34])
    before = content(args)
    with pytest.raises(ValueError, match=rf"^out must not overlap {other} \(or be exactly x\). Received: arrays"):
        bnfast.batch_norm_train(**args)
    assert content(args) == before


@pytest.mark.parametrize("other", ["mean", "invstd", "gamma", "dmean", "dvariance", "residual", "y", "x", "dy"])
def test_out_of_grad_overlaps_an_input(other):
    block = np.zeros(64)
    args = arguments(bnfast.batch_norm_grad)
    args.update({name: args[name].astype(np.float64) for name in ("x", "dy", "residual")})
    args["out"] = block[:30].reshape(6, 5)
    if other == "y":
        args["residual"] = None
    args[other] = block[5:35].reshape(6, 5) if other in ("x", "dy", "residual", "y") else block[29:34]
    before = content(args)
    with pytest.raises(ValueError, match=rf"^out must not overlap {other} \(or be exactly dy or x\). Received: "):
        bnfast.batch_norm_grad(**args)
    assert content(args) == before


@pytest.mark.parametrize("name", ["moving_mean", "moving_variance"])
@pytest.mark.parametrize("other", ["x", "gamma", "beta", "moving_variance", "mask", "residual"])
def test_moving_statistics_overlap_an_input(name, other):
    block = np.ones(64, np.float32)
    args = arguments(bnfast.batch_norm_train)
    if other == name:
        other = "moving_mean"
    args[name] = block[28:33]
    tensor = block[:30].reshape(6, 5)
    args[other] = {"mask": block[26:32], "x": tensor, "residual": tensor}.get(other, block[30:35])
    before = content(args)
    with pytest.raises(ValueError, match=r"^moving_\w+ must not overlap \w+. Received: arrays that share memory"):
        bnfast.batch_norm_train(**args)
    assert content(args) == before
