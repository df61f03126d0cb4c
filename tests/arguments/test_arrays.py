"""Every kind of CPU array is read without a copy, strided arrays with one copy, and the results have the same bits."""

import array
import ctypes
import sys

import bnfast
import numpy as np
import pytest
import sample_data
from bnfast import _core
from bnfast.functional import batch_norm
from hostile import Liar, capsule, exporter


@pytest.fixture
def seen(monkeypatch):
    """(name, arguments) of each call that _core accepted."""
    calls = []

    class Recorder:
        def __getattr__(self, name):
            def call(*args):
                result = getattr(_core, name)(*args)
                if result is not None:
                    calls.append((name, args))
                return result

            return call

    monkeypatch.setattr(batch_norm, "_core", Recorder())
    return calls


def address(a):
    return a.__array_interface__["data"][0]


def same(a, b):
    for mine, other in zip(a, b, strict=True):
        if mine is not None:
            assert mine.dtype == other.dtype
            assert np.asarray(mine).tobytes() == np.asarray(other).tobytes()


class Producer:
    """A tensor whose only protocol is DLPack, as JAX's are."""

    def __init__(self, data):
        self.data = data

    def __dlpack__(self, **options):
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.data.__dlpack_device__()


def jax_like(data):
    """A tensor with DLPack; bfloat16, which NumPy's DLPack cannot read, also has __array__ without a copy."""
    tensor = Producer(data)
    if data.dtype.name == "bfloat16":

        class WithArray(Producer):
            dtype = data.dtype

            def __array__(self, dtype=None, copy=None):
                return self.data

        tensor = WithArray(data)
    return tensor


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
def test_numpy_is_read_in_place(seen, dtype):
    x = sample_data.batch((6, 5), 1, sample_data.dtype_of(dtype), np.random.default_rng(1))
    gamma, beta, mean, variance = sample_data.vectors(5, np.random.default_rng(1))
    result = bnfast.batch_norm_train(x, gamma, beta, mean, variance, residual=x)
    bnfast.batch_norm_grad(x, x, result.mean, result.invstd, gamma, beta)
    (_, train), (_, grad) = seen
    for mine, given in ((train[0], x), (train[1], gamma), (train[2], beta), (train[3], mean), (train[4], variance)):
        assert mine is given
    assert grad[0] is grad[1] is x
    assert grad[2] is result.mean


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
def test_torch_is_read_in_place(need, seen, dtype):
    torch = need("torch")
    x = torch.randn(6, 5).to(getattr(torch, dtype))
    parameters = [torch.rand(5) + 0.5 for _ in range(4)]
    dy = torch.randn(6, 5).to(x.dtype)
    mean, variance = (p.numpy() for p in parameters[2:])
    result = bnfast.batch_norm_train(x, *parameters[:2], mean, variance, residual=dy, mask=torch.ones(6))
    assert result.y.dtype == sample_data.dtype_of(dtype)
    grad = bnfast.batch_norm_grad(dy, x, torch.from_numpy(result.mean), result.invstd, *parameters[:2])
    y = bnfast.batch_norm_infer(x, parameters[2], parameters[3])
    moments = bnfast.moments(x)
    (_, a), (_, b), (_, c), (_, d) = seen
    tensors = (a[0], x), (a[1], parameters[0]), (a[2], parameters[1]), (a[11], dy), (a[8], None)
    tensors += (b[0], dy), (b[1], x), (c[0], x), (c[1], parameters[2]), (d[0], x)
    for mine, tensor in tensors:
        assert tensor is None or address(mine) == tensor.data_ptr()
    x, dy = (np.array(a[0]), np.array(a[11]))
    gamma, beta, mean, variance = (p.numpy() for p in parameters)
    expected = bnfast.batch_norm_train(x, gamma, beta, residual=dy)
    same(result, expected)
    same(grad, bnfast.batch_norm_grad(dy, x, expected.mean, expected.invstd, gamma, beta))
    same([y], [bnfast.batch_norm_infer(x, mean, variance)])
    same(moments[1:], bnfast.moments(x)[1:])


def test_torch_that_needs_gradients_or_is_strided(need):
    torch = need("torch")
    x = torch.randn(6, 5)
    same(bnfast.batch_norm_train(x.T, axis=0), bnfast.batch_norm_train(x.numpy().T.copy(), axis=0))
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(TypeError, match=r"x must be detached.*Received: requires_grad=True"):
            bnfast.batch_norm_train(x.to(dtype).requires_grad_())
    same(bnfast.batch_norm_train(x.requires_grad_().detach()), bnfast.batch_norm_train(x.detach().numpy()))


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
def test_dlpack_is_read_in_place(seen, dtype):
    data = sample_data.batch((6, 5), 1, sample_data.dtype_of(dtype), np.random.default_rng(2))
    result = bnfast.batch_norm_train(jax_like(data))
    assert address(seen[0][1][0]) == address(data)
    same(result, bnfast.batch_norm_train(data))


def test_real_jax(need, seen):
    jax = need("jax")
    for dtype in ("float32", "bfloat16"):
        x = jax.numpy.arange(30, dtype=dtype).reshape(6, 5)
        same(bnfast.batch_norm_train(x), bnfast.batch_norm_train(np.array(x)))
        assert address(seen[0][1][0]) == x.unsafe_buffer_pointer()
        seen.clear()


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
def test_tensorflow_is_read_in_place(need, seen, dtype):
    tf = need("tensorflow")
    x = tf.cast(tf.random.normal((6, 5)), dtype)
    result = bnfast.batch_norm_train(x)
    buffer = np.asarray(x) if dtype == "bfloat16" else np.asarray(memoryview(x))
    assert address(seen[0][1][0]) == address(buffer)
    same(result, bnfast.batch_norm_train(buffer.copy()))


def test_buffers_are_read_in_place(seen):
    numbers = array.array("f", range(10))
    result = bnfast.batch_norm_train(numbers)
    assert address(seen[0][1][0]) == numbers.buffer_info()[0]
    table = (ctypes.c_double * 5 * 6)(*[(1, 2, 3, 4, 5)] * 6)
    bnfast.batch_norm_train(table)
    assert address(seen[1][1][0]) == ctypes.addressof(table)
    view = memoryview(numbers).cast("B").cast("f", (2, 5))
    same(bnfast.batch_norm_train(view), bnfast.batch_norm_train(np.arange(10, dtype=np.float32).reshape(2, 5)))
    assert result.y.shape == (10,)


def test_subclasses_and_read_only_arrays(seen, tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(6, 5))
    x[:] = np.arange(30).reshape(6, 5)
    result = bnfast.batch_norm_train(x)
    assert type(result.y) is np.ndarray
    assert address(seen[0][1][0]) == address(x)
    plain = np.array(x)
    plain.flags.writeable = False
    same(result, bnfast.batch_norm_train(plain))
    same(bnfast.batch_norm_grad(plain, plain, result.mean, result.invstd), bnfast.batch_norm_grad(
        x, x, result.mean, result.invstd))  # fmt: skip


def layouts(a):
    """The values of a in other memory layouts."""
    yield "fortran", np.asfortranarray(a)
    wide = np.empty((*a.shape[:-1], 3 * a.shape[-1]), a.dtype)
    wide[..., ::3] = a
    yield "every third", wide[..., ::3]
    yield "backwards", np.flip(np.flip(a).copy())
    tall = np.empty((2 * a.shape[0], *a.shape[1:]), a.dtype)
    tall[1::2] = a
    yield "every second row", tall[1::2]
    raw = np.empty(a.nbytes + 1, np.uint8)
    moved = raw[1:].view(a.dtype).reshape(a.shape)
    moved[...] = a
    yield "misaligned", moved
    off = np.empty(a.size + 3, a.dtype)[3:].reshape(a.shape)  # aligned for its dtype, but not to 64 bytes
    off[...] = a
    yield "odd start", off
    yield "transposed", np.ascontiguousarray(a.T).T


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"), [((37, 23), 1), ((3, 23, 7, 7), 1), ((2, 5, 7, 3), -1), ((4, 3, 5), 0), ((9,), 0)]
)
def test_strided_views_give_the_same_bits(shape, axis, dtype):
    rng = np.random.default_rng(3)
    x, dy, residual = (sample_data.batch(shape, axis, sample_data.dtype_of(dtype), rng) for _ in range(3))
    gamma, beta, mean, variance = sample_data.vectors(shape[axis], rng)
    mask = rng.integers(0, 3, [1 if i == axis % x.ndim else e for i, e in enumerate(shape)]).astype(np.float32)
    vectors = dict(zip(["gamma", "beta"], [gamma, beta], strict=True))
    wanted = bnfast.batch_norm_train(x, gamma, beta, axis=axis, mask=mask, residual=residual, activation="relu")
    backward = {"axis": axis, "mask": mask, "activation": "relu"}
    grad = bnfast.batch_norm_grad(dy, x, wanted.mean, wanted.invstd, gamma, beta, residual=residual, **backward)
    infer = bnfast.batch_norm_infer(x, mean, variance, gamma, beta, axis=axis)
    for (name, xs), (_, ds), (_, rs), (_, ms) in zip(*map(layouts, (x, dy, residual, mask)), strict=True):
        before = xs.tobytes()
        views = {k: dict(layouts(v))[name] for k, v in vectors.items()}
        same(bnfast.batch_norm_train(xs, **views, axis=axis, mask=ms, residual=rs, activation="relu"), wanted)
        backward["mask"] = ms
        same(bnfast.batch_norm_grad(ds, xs, wanted.mean, wanted.invstd, **views, residual=rs, **backward), grad)
        same([bnfast.batch_norm_infer(xs, mean, variance, **views, axis=axis)], [infer])
        same(bnfast.moments(xs, axis=axis)[1:], bnfast.moments(x, axis=axis)[1:])
        assert xs.tobytes() == before


def test_broadcast_views():
    x = np.broadcast_to(np.arange(5, dtype=np.float32), (6, 5))
    same(bnfast.batch_norm_train(x), bnfast.batch_norm_train(x.copy()))


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [*sample_data.SHAPES, *sample_data.EMPTY])
def test_outputs_are_aligned_to_64_bytes(shape, axis, dtype):
    x = np.zeros(shape, sample_data.dtype_of(dtype))
    result = bnfast.batch_norm_train(x, axis=axis)
    grad = bnfast.batch_norm_grad(x, x, result.mean, result.invstd, axis=axis, residual=x, activation="relu")
    infer = bnfast.batch_norm_infer(x, result.mean, result.variance, axis=axis)
    for a in (result.y, grad.dx, grad.dresidual, infer):
        assert address(a) % 64 == 0
        assert a.flags.c_contiguous
        assert a.flags.writeable
        assert not np.shares_memory(a, x)


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((37, 23), 1), ((3, 23, 7, 7), 1), ((300, 100), 1), ((0, 4), 1)])
def test_out(shape, axis, dtype):
    rng = np.random.default_rng(4)
    x, dy = (sample_data.batch(shape, axis, sample_data.dtype_of(dtype), rng) for _ in range(2))
    gamma, beta, mean, variance = sample_data.vectors(shape[axis], rng)
    wanted = bnfast.batch_norm_train(x, gamma, beta, axis=axis)
    given = {"gamma": gamma, "beta": beta, "axis": axis}
    calls = {
        "train": (lambda x, dy, out: bnfast.batch_norm_train(x, **given, out=out).y, ("x",)),
        "infer": (lambda x, dy, out: bnfast.batch_norm_infer(x, mean, variance, **given, out=out), ("x",)),
        "grad": (
            lambda x, dy, out: bnfast.batch_norm_grad(dy, x, wanted.mean, wanted.invstd, **given, out=out).dx,
            ("x", "dy"),
        ),
    }
    for call, places in calls.values():
        expected = call(x, dy, None)
        apart = np.empty_like(x)
        assert call(x, dy, apart) is apart
        same([apart], [expected])
        for place in places:
            copies = {"x": x.copy(), "dy": dy.copy()}
            result = call(**copies, out=copies[place])
            assert result is copies[place]
            same([result], [expected])
        once = x.copy()
        call(once, dy, once[...])  # another ndarray over the same elements
        same([once], [call(x, dy, None)])


def test_gradient_of_x_with_itself_in_place():
    x = sample_data.batch((30, 7), 1, np.float32, np.random.default_rng(5))
    _, mean, _, invstd = bnfast.batch_norm_train(x)
    wanted = bnfast.batch_norm_grad(x, x, mean, invstd).dx
    both = x.copy()
    same([bnfast.batch_norm_grad(both, both, mean, invstd, out=both).dx], [wanted])


def test_a_dlpack_tensor_of_our_own_is_read():
    values = np.arange(12, dtype="float32").reshape(4, 3)
    given = Liar(data=values.ctypes.data)
    same(bnfast.batch_norm_train(given), bnfast.batch_norm_train(values))


@pytest.mark.parametrize(("fields", "said"), [({"ndim": -1}, "-1"), ({"shape": None, "ndim": 2}, "2 and no shape")])
def test_a_tensor_without_axes_or_shape_is_an_error(fields, said):
    """_cuda reads capsules itself, and believed both."""
    from bnfast import _cuda

    with pytest.raises(TypeError, match=f"a tensor with ndim >= 0 and a shape. Received: ndim = {said}$"):
        _cuda.read_dlpack(capsule(**fields))


def test_a_null_pointer_is_an_error():
    """NumPy allocates memory for it, and the result would be what lay there."""
    with pytest.raises(TypeError, match=r"x must have memory of its own. Received: a null pointer for shape \(4, 3\)"):
        bnfast.batch_norm_train(Liar())
    assert bnfast.batch_norm_train(Liar(shape=(0, 3))).y.shape == (0, 3)


@pytest.mark.parametrize("device", [None, 1, (), {}, ("cpu", 0), (1,), (1.0, 0), RuntimeError("no")], ids=repr)
def test_a_device_that_is_none_is_an_error(device):
    with pytest.raises(TypeError, match=r"x.__dlpack_device__\(\) must return two integers. Received: "):
        bnfast.batch_norm_train(Liar(device))


@pytest.mark.parametrize("fields", [{"bits": 24}, {"shape": (-1, 3), "data": 64}], ids=str)
def test_a_dlpack_tensor_that_cannot_be_is_an_error(fields):
    with pytest.raises((TypeError, ValueError), match="x"):
        bnfast.batch_norm_train(Liar(**{"data": np.zeros(99).ctypes.data, **fields}))


def test_a_producer_that_raises_is_an_error_with_the_name():
    class Raises(Liar):
        def __dlpack__(self, **_):
            raise KeyError("gone")

    with pytest.raises(TypeError, match=r"x could not be read through DLPack \(Raises\): 'gone'"):
        bnfast.batch_norm_train(Raises())


class SaysBfloat16:
    """TensorFlow 2.18's tensors: no DLPack, and a buffer that has no format for bfloat16."""

    dtype = "bfloat16"

    def __init__(self, data):
        self.data = data

    def __array__(self, dtype=None, copy=None):
        if isinstance(self.data, Exception):
            raise self.data
        return self.data


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (np.ones((2, 3), np.float32), "x must be readable as bfloat16. Received: SaysBfloat16 read as float32"),
        (RuntimeError("deleted"), r"x could not be read as bfloat16 \(SaysBfloat16\): deleted"),
        ([1.0], r"x could not be read as bfloat16 \(SaysBfloat16\): .* not producing an array"),
    ],
    ids=["float32", "raises", "a list"],
)
def test_what_says_bfloat16_and_is_not_is_an_error(bfloat16, data, said):
    with pytest.raises(TypeError, match=f"^{said}$"):
        bnfast.batch_norm_train(SaysBfloat16(data))
    right = np.arange(6).reshape(3, 2).astype(bfloat16)
    same(bnfast.batch_norm_train(SaysBfloat16(right)), bnfast.batch_norm_train(right))


@pytest.mark.parametrize(("dtype", "axis"), [("float32", 1), ("bfloat16", 0)])
def test_a_negated_view_of_torch_is_an_error(need, dtype, axis):
    """NumPy reads its memory, which holds the opposite."""
    torch = need("torch")
    x = torch._neg_view(torch.randn(6, 5).to(getattr(torch, dtype)))
    with pytest.raises(TypeError, match=r"^x must hold its values, .* Received: is_neg\(\); use resolve_neg\(\)$"):
        bnfast.batch_norm_train(x, axis=axis)
    z = torch.randn(6, 5, dtype=torch.complex64)
    same(bnfast.batch_norm_train(z.conj().imag.resolve_neg()), bnfast.batch_norm_train(-z.numpy().imag))


def test_a_sparse_tensor_is_an_error_with_the_name(need):
    torch = need("torch")
    for dtype in (torch.bfloat16, torch.float32):
        with pytest.raises(TypeError, match=r"^x could not be read (as bfloat16|through DLPack) \(Tensor\): "):
            bnfast.batch_norm_train(torch.eye(3, dtype=dtype).to_sparse())


def test_bfloat16_without_ml_dtypes_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(
        TypeError, match=r"^x has dtype bfloat16, for which NumPy needs ml_dtypes: pip install ml_dtypes$"
    ):
        bnfast.batch_norm_train(SaysBfloat16(None))


def test_what_numpy_cannot_tell_apart_counts_as_overlapping(monkeypatch):
    def shares_memory(*_, **__):
        raise np.exceptions.TooHardError

    monkeypatch.setattr(np, "shares_memory", shares_memory)
    x, out = np.ones((6, 5), np.float32), np.zeros((6, 5), np.float32)
    with pytest.raises(ValueError, match="out must not overlap x"):
        bnfast.batch_norm_train(memoryview(x), out=out)
    assert not out.any()


def test_a_buffer_of_our_own_is_read():
    same(bnfast.batch_norm_train(exporter()), bnfast.batch_norm_train(np.arange(12, dtype="float32").reshape(4, 3)))
    bnfast.batch_norm_train(exporter(shape=None, ndim=1))  # what PyBUF_SIMPLE allows: its length is that of the bytes


@pytest.mark.parametrize(
    ("fields", "received"),
    [
        ({"shape": None}, "no shape for 2 axes"),
        ({"shape": (400_000, 300)}, "48 bytes for a shape of 480000000"),
        ({"shape": (1,) * 65, "ndim": 65}, "65 axes"),
        ({"ndim": -1}, "-1 axes"),
        ({"shape": (-4, -3)}, "the extent -4"),
        ({"shape": (1 << 60, 1 << 60)}, "a shape of more than"),
        ({"len": 47}, "47 bytes for a shape of 48"),
        ({"itemsize": 0, "shape": None, "ndim": 1}, "items of 0 bytes"),
        ({"itemsize": -4}, "items of -4 bytes"),
        ({"len": -1, "shape": None, "ndim": 1}, "-1 bytes"),
    ],
    ids=str,
)
def test_a_buffer_that_contradicts_itself_is_an_error(fields, received):
    """memoryview and NumPy crash on some of these."""
    with pytest.raises(TypeError, match=rf"x must have a buffer whose shape and size agree. Received: {received}"):
        bnfast.batch_norm_train(exporter(**fields))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"format": b"d"}, "x must have items of 8 bytes, as its format 'd' says. Received: 4"),
        ({"format": b"&f"}, "x has a buffer that NumPy can't read: '&f' is not a valid PEP 3118 buffer format string"),
        ({"format": b"Zf", "itemsize": 8, "len": 96}, r"x must have dtype float32, .* Received: complex64"),
        ({"buf": 0}, r"x must have memory of its own. Received: a null pointer for shape \(4, 3\)"),
    ],
    ids=str,
)
def test_a_buffer_of_another_format_is_an_error(fields, said):
    with pytest.raises(TypeError, match=f"^{said}$"):
        bnfast.batch_norm_train(exporter(**fields))
