"""Hostile DLPack tensors, buffers, options, states and op calls, drawn at random: an error or a right result.

A tensor may contradict itself; it may not lie about memory that it has, which nobody can find out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bnfast
import numpy as np
from hostile import KEPT, Liar, exporter

from .calls import ERRORS, NONSENSE

VALUES = np.arange(12, dtype="float32").reshape(4, 3)
Rng = np.random.Generator


def one_of(rng: Rng, *values: Any) -> Any:
    return values[rng.integers(len(values))]


def mostly(rng: Rng, right: Any, *wrong: Any) -> Any:
    return right if rng.random() < 0.8 else one_of(rng, *wrong)


def dlpack(rng: Rng) -> None:
    fields = {
        "data": mostly(rng, VALUES.ctypes.data, 0),
        "shape": mostly(rng, (4, 3), (3, 4), (12,), (0, 3), (-4, 3), (-4, -3), (1 << 62, 1 << 62), (2, 3, 2), ()),
        "bits": mostly(rng, 32, 16, 8, 1, 0, 24, 255),
        "code": mostly(rng, 2, 0, 1, 3, 4, 5, 6, 255),
        "lanes": mostly(rng, 1, 0, 2, 65535),
    }
    device = mostly(rng, (1, 0), (2, 0), (1, -5), (99, 0), None, 1, (), ("cpu", 0), OSError("no"), (2**70, 0))
    result = bnfast.batch_norm_train(Liar(device, **fields))
    x = VALUES.view("float16") if fields["bits"] == 16 else VALUES
    wanted = bnfast.batch_norm_train(x.ravel()[: result.y.size].reshape(fields["shape"]))
    if result.y.tobytes() != wanted.y.tobytes():
        raise AssertionError(f"another result for {fields}")


def buffers(rng: Rng) -> None:
    fields: dict[str, Any] = {"shape": one_of(rng, (4, 3), None, (3, 4), (12,), (1 << 40, 3), (-4, -3), (4, 3, 1), ())}
    for name, values in (
        ("len", (48, 0, 47, -1, 1 << 60)),
        ("itemsize", (4, 0, 2, 8, -4)),
        ("ndim", (2, 1, 0, 3, 65, -1)),
        ("format", (b"f", b"d", b"Q", b"", None, b"T{f:a:}", b"f" * 40)),
    ):
        if rng.integers(3) == 0:
            fields[name] = one_of(rng, *values)
    if fields.get("ndim", 2) > len(fields["shape"] or (0,) * 65):
        return  # a lie about memory: the shape has fewer extents than it says
    bnfast.batch_norm_train(exporter(**fields))


def options(rng: Rng) -> None:
    names = ("axis", "momentum", "epsilon", "center", "scale", "renorm", "activation", "nan_policy", "correction")
    names += ("virtual_batch_size", "beta_constraint", "trainable", "unknown", "beta_initializer", "negative_slope")
    values = (*NONSENSE, 0, 1, 2, -1, 0.5, 1e300, 2**63, -(2**63), "relu", "skip_update")
    given = {str(rng.choice(names)): one_of(rng, *values) for _ in range(rng.integers(1, 3))}
    layer = bnfast.BatchNormalization(**given)
    layer(VALUES, training=True)


def states(rng: Rng) -> None:
    """What can't be loaded changes nothing; what is loaded can be computed with and saved."""
    layer = bnfast.BatchNormalization(renorm=bool(rng.integers(2)), momentum=one_of(rng, None, 0.9))
    layer.build(3)
    state = layer.state_dict()
    before = {name: np.array(value, copy=True) for name, value in state.items()}
    name = str(rng.choice([*state, "unknown"]))
    value = one_of(rng, *NONSENSE, np.full(3, np.nan), np.full(3, -1.0), np.zeros((3, 1)), 2**63, 10**30, -1)
    if rng.integers(4) == 0:
        state.pop(name, None)
    else:
        state[name] = value
    try:
        layer.load_state_dict(state)
    except BaseException:
        after = layer.state_dict()
        if any(not np.array_equal(after[key], old) for key, old in before.items()):
            raise AssertionError(f"{name}={value!r} was loaded by half") from None
        raise
    layer(VALUES, training=True)
    layer.state_dict()


def op_calls(rng: Rng) -> None:
    import tensorflow as tf
    from bnfast.tensorflow import op

    ops = op._load().ops
    vector = tf.constant(mostly(rng, [1.0, 2.0, 3.0], [1.0], [], [[1.0, 2.0, 3.0]], [np.nan] * 3), tf.float32)
    x = mostly(rng, VALUES, VALUES[None], VALUES[:0], VALUES[0], VALUES.astype("float64"), np.float32(1))
    arguments: dict[str, Any] = {
        "x": tf.constant(x),
        "gamma": mostly(rng, [vector], [], [vector, vector]),
        "beta": mostly(rng, [vector], [], [tf.constant(VALUES)]),
        "mask": mostly(rng, [], [tf.constant(VALUES[:, :1])], [tf.constant([-1.0])], [vector]),
        "residual": mostly(rng, [], [tf.constant(VALUES)], [vector]),
        "moving_mean": vector,
        "moving_variance": mostly(rng, vector, tf.constant([-1.0] * 3)),
        "momentum": mostly(rng, 0.9, 2.0, -1.0, float("nan")),
        "axis": mostly(rng, -1, 0, 1, 7, -9, 2**31 - 1, 2**32, -(2**63)),
        "epsilon": mostly(rng, 1e-3, -1.0, float("inf"), float("nan")),
        "activation": mostly(rng, "none", "relu", "no", ""),
        "negative_slope_bits": mostly(rng, 0, -1, 2**62),
    }
    try:
        ops.bnfast_train(**arguments)
    except tf.errors.OpError as error:
        raise ValueError(str(error)) from None


KINDS: dict[str, Callable[[Rng], None]] = {
    "DLPack": dlpack,
    "buffers": buffers,
    "options": options,
    "states": states,
    "op calls": op_calls,
}


def measure(count: int) -> dict[str, Any]:
    """`count` attempts of each kind. A failure is any other exception than those of bad input; a crash ends it all."""
    rng, failures, refused = np.random.default_rng(11), [], {}
    kinds = dict(KINDS)
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        del kinds["op calls"]
    for name, attempt in kinds.items():
        refused[name] = 0
        for _ in range(count):
            try:
                attempt(rng)
            except (*ERRORS, MemoryError, OverflowError):
                refused[name] += 1
            except Exception as error:
                failures.append(f"{name}: {type(error).__name__}: {error}")
            KEPT.clear()
    return {"attempts": count, "kinds": list(kinds), "refused": refused, "failures": failures[:20]}
