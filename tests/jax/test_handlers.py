"""The handlers on call frames that are made here, without JAX: what XLA may send, and what it mustn't.

The structs repeat the layout of csrc/jax/ffi_api.h in ctypes.
"""

import ctypes
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    addressof,
    byref,
    c_char_p,
    c_int,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
)

import bnfast
import numpy as np
import pytest
from bnfast import _core


class Base(Structure):
    _fields_ = [("bytes", c_size_t), ("extensions", c_void_p)]

    def __init__(self, **values):
        super().__init__(bytes=values.pop("bytes", ctypes.sizeof(self)), **values)


class Version(Base):
    _fields_ = [("major", c_int), ("minor", c_int)]


class Metadata(Structure):
    _fields_ = [("bytes", c_size_t), ("version", Version), ("traits", c_uint32)]


class MetadataExtension(Structure):
    _fields_ = [("bytes", c_size_t), ("type", c_int), ("next", c_void_p), ("metadata", POINTER(Metadata))]


class NewError(Base):
    _fields_ = [("message", c_char_p), ("code", c_int)]


NewErrorFunction = CFUNCTYPE(c_void_p, POINTER(NewError))


class Api(Base):
    _fields_ = [("version", Version), ("internal", c_void_p), ("new_error", NewErrorFunction)]


class Buffer(Base):
    _fields_ = [("type", c_int), ("data", c_void_p), ("rank", c_int64), ("dims", POINTER(c_int64))]


class Buffers(Base):
    _fields_ = [("count", c_int64), ("types", POINTER(c_int)), ("items", POINTER(c_void_p))]


class Text(Structure):
    _fields_ = [("data", c_char_p), ("length", c_size_t)]


class Scalar(Structure):
    _fields_ = [("type", c_int), ("value", c_void_p)]


class Attributes(Base):
    _fields_ = [
        *[("count", c_int64), ("types", POINTER(c_int)), ("names", POINTER(POINTER(Text)))],
        ("items", POINTER(c_void_p)),
    ]


class Frame(Base):
    _fields_ = [
        *[("api", POINTER(Api)), ("context", c_void_p), ("stage", c_int)],
        *[("arguments", Buffers), ("results", Buffers), ("attributes", Attributes)],
    ]


TYPES = {"float32": 11, "float64": 12, "float16": 10, "uint32": 8, "int64": 5}
capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
capsule_pointer.restype, capsule_pointer.argtypes = c_void_p, [ctypes.py_object, c_char_p]
HANDLERS = {
    name: CFUNCTYPE(c_void_p, POINTER(Frame))(capsule_pointer(capsule, None))
    for name, capsule in _core._jax_handlers().items()
}


class Call:
    """One frame, with all that it points to."""

    def __init__(self, arguments=(), results=(), attributes=None, major=0, minor=3):
        self.kept, self.error = [], None
        self.api = Api(version=Version(major=major, minor=minor), new_error=NewErrorFunction(self.new_error))
        self.frame = Frame(api=ctypes.pointer(self.api), stage=3)
        self.frame.arguments, self.frame.results = self.buffers(arguments), self.buffers(results)
        self.frame.attributes = self.attributes(attributes or {})

    def new_error(self, error):
        assert error.contents.bytes == 28, "what XLA's own header says"
        self.error = error.contents.code, error.contents.message.decode()
        return 1

    def keep(self, value):
        self.kept.append(value)
        return value

    def buffers(self, arrays):
        made = []
        for a in arrays:
            dims = (c_int64 * a.ndim)(*a.shape)
            made.append(Buffer(type=TYPES[str(a.dtype)], data=a.ctypes.data, rank=a.ndim, dims=dims))
            self.keep(made[-1])
        items = self.keep((c_void_p * len(made))(*map(addressof, made)))
        return Buffers(count=len(made), types=self.keep((c_int * len(made))(*[1] * len(made))), items=items)

    def attributes(self, named):
        names, types, items = [], [], []
        for name, value in sorted(named.items()):
            names.append(self.keep(Text(name.encode(), len(name))))
            types.append(4 if isinstance(value, str) else 3)
            if isinstance(value, str):
                items.append(self.keep(Text(value.encode(), len(value))))
            else:
                number = self.keep(np.asarray(value))
                items.append(self.keep(Scalar(TYPES[str(number.dtype)], number.ctypes.data)))
        n = len(names)
        return Attributes(
            count=n,
            types=self.keep((c_int * n)(*types)),
            names=self.keep((POINTER(Text) * n)(*map(ctypes.pointer, names))),
            items=self.keep((c_void_p * n)(*map(addressof, items))),
        )

    def run(self, name="bnfast_infer"):
        assert bool(HANDLERS[name](byref(self.frame))) is (self.error is not None)
        return self.error


def inference(**changes):
    rng = np.random.default_rng(0)
    x, mean, variance = rng.standard_normal((6, 4)), rng.standard_normal(4), rng.uniform(1, 2, 4)
    y = np.empty_like(x)
    attributes = {"inputs": "x moving_mean moving_variance", "rank": 2, "axis": -1, "activation": 1, "epsilon": 1e-3}
    attributes = {**attributes, "negative_slope": 0.2, **changes}
    call = Call((x, mean, variance), (y,), {name: one for name, one in attributes.items() if one is not None})
    call.arrays = x, mean, variance, y
    return call


@pytest.fixture(autouse=True)
def registered():
    """The handlers answer bad frames through the table of functions that registration brought."""
    ask(Call())


def ask(call, metadata_bytes=36, with_api=True):
    metadata = Metadata(bytes=metadata_bytes)
    extension = MetadataExtension(32, 1, None, ctypes.pointer(metadata))
    call.keep((metadata, extension))
    frame = call.keep(Frame(api=ctypes.pointer(call.api) if with_api else None))
    frame.extensions = addressof(extension)
    assert HANDLERS["bnfast_train"](byref(frame)) is None
    KEPT.append(call)  # the table must live on
    return (metadata.version.major, metadata.version.minor), _core._jax_query()


KEPT = []


def test_metadata_is_the_version_of_the_table():
    assert ask(Call(minor=3)) == ((0, 3), (True, 0, 3, ""))
    assert ask(Call(minor=7)) == ((0, 7), (True, 0, 7, ""))


def test_a_query_without_a_table_is_that_of_version_0_1():
    assert ask(Call(), with_api=False) == ((0, 1), (True, 0, 1, ""))


def test_an_unknown_major_version_gets_no_answer_and_a_reason():
    answer, (asked, major, minor, reason) = ask(Call(major=1, minor=0))
    assert (answer, asked, major, minor) == ((0, 0), True, 1, 0)
    assert reason == "XLA's API for foreign functions has version 1.0, and only 0.x is known"


def test_short_metadata_gets_no_answer_and_a_reason():
    answer, (*_, reason) = ask(Call(), metadata_bytes=16)
    assert (answer, reason) == ((0, 0), "XLA's metadata must have 36 bytes or more. Received: 16")


def test_a_call_writes_the_results_in_place():
    call = inference()
    assert call.run() is None
    x, mean, variance, y = call.arrays
    assert np.array_equal(y, bnfast.batch_norm_infer(x, mean, variance, activation="relu"))


def short(part, size):
    def change(call):
        target = call.frame if part == "frame" else getattr(call.frame, part)
        target.bytes = size

    return change


def set_stage(call):
    call.frame.stage = 0


def set_major(call):
    call.api.version.major = 1


def short_version(call):
    call.api.version.bytes = 16


def short_table(call):
    call.api.bytes = 40


def short_buffer(call):
    call.kept[0].bytes = 32


FRAMES = [
    (short("frame", 160), "XLA's call frame must have 168 bytes or more. Received: 160"),
    (short("frame", 8), "XLA's call frame must have 32 bytes or more. Received: 8"),
    (short("arguments", 24), "XLA's list of arguments must have 40 bytes or more. Received: 24"),
    (short("results", 24), "XLA's list of results must have 40 bytes or more. Received: 24"),
    (short("attributes", 24), "XLA's list of attributes must have 48 bytes or more. Received: 24"),
    (set_stage, "the handler must be called in the stage of execution. Received: stage 0"),
    (set_major, "XLA's API for foreign functions has version 1.3, and only 0.x is known"),
    (short_version, "XLA's API version must have 24 bytes or more. Received: 16"),
    (short_table, "XLA's table of functions must have 56 bytes or more. Received: 40"),
    (short_buffer, "XLA's buffer must have 48 bytes or more. Received: 32"),
]


@pytest.mark.parametrize(("change", "text"), FRAMES, ids=[text[:40] for _, text in FRAMES])
def test_a_frame_that_cant_be_read_is_an_error_and_writes_nothing(change, text):
    call = inference()
    call.arrays[-1].fill(7)
    change(call)
    bool(HANDLERS["bnfast_infer"](byref(call.frame)))
    error = call.error or KEPT[-1].error  # a bad table: the registered one takes the error
    assert error == (9, text)
    assert (call.arrays[-1] == 7).all()


ATTRIBUTES = [
    ({"inputs": "x moving_mean"}, "the attribute inputs names 2 operands. Received: 3"),
    ({"inputs": "y moving_mean moving_variance"}, "the attribute inputs must name x"),
    ({"inputs": None}, "the attribute inputs is missing"),
    ({"inputs": 3}, "the attribute inputs has another kind of value"),
    ({"epsilon": 1}, "the attribute epsilon must have XLA's type 12. Received: 5"),
    ({"axis": 0}, "axis must be in [-2, 0). Received: 0"),
    ({"axis": -3}, "axis must be in [-2, 0). Received: -3"),
    ({"axis": -2}, "moving_mean must have shape (6,). Received: (4,)"),
    ({"rank": 3}, "y must have 3 axes after those of vmap. Received: (6, 4), where y is (6, 4)"),
    ({"activation": 99}, "activation must be in [0, 15). Received: 99"),
]


@pytest.mark.parametrize(("change", "text"), ATTRIBUTES, ids=[text[:50] for _, text in ATTRIBUTES])
def test_bad_attributes_are_errors_and_write_nothing(change, text):
    call = inference(**change)
    call.arrays[-1].fill(7)
    assert call.run() == (3, text)
    assert (call.arrays[-1] == 7).all()


def test_bad_weights_are_an_error():
    x, weights = np.ones((2, 3)), np.array([1.0, np.nan])
    attributes = {"inputs": "x mask", "rank": 2, "axis": -1}
    call = Call((x, weights), (np.empty((2, 3)),), attributes)
    assert call.run("bnfast_moments") == (3, "mask must hold finite weights of at least 0. Received: nan")
