"""Same bits over instruction set, threads, alignment, in-place output, floating-point mode and process.

A configuration is a call drawn from its number alone. Its reference is the smallest instruction set on one thread with
aligned arrays. `python same_bits.py COUNT` prints the hash of the first COUNT results, for the comparison of processes.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import bnfast
import numpy as np
from bnfast import _core

SHAPES = [((64, 3), -1), ((700, 24), -1), ((1, 23), -1), ((33, 257), -1), ((5, 23, 7, 7), 1), ((5, 7, 3, 67), 3)]
SHAPES += [((3, 5, 901), 1), ((90, 3, 2), 1), ((2, 130, 40), 1), ((2001, 2), -1)]
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "silu", "hard_silu", "sigmoid", "tanh", "gelu", "elu", "mish")
MODES = [(rounding << 13) | flush for rounding in range(4) for flush in (0, 0x40, 0x8000, 0x8040)]  # MXCSR, masked
IEEE = 0x1F80


def call_of(number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    shape, axis = SHAPES[rng.integers(len(SHAPES))]
    dtype = ("float32", "float64", "float16")[rng.integers(3)]
    parameter = np.float64 if dtype == "float64" else np.float32
    x, dy, residual = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    channels = shape[axis]
    mask = rng.integers(0, 4, np.moveaxis(x, axis, -1).shape[:-1]) / 2
    return {
        "x": x + np.array(rng.choice([0, 1, 100]), dtype),
        "dy": dy,
        "axis": axis,
        "gamma": rng.standard_normal(channels).astype(parameter),
        "beta": rng.standard_normal(channels).astype(parameter),
        "activation": ACTIVATIONS[rng.integers(len(ACTIVATIONS))],
        "residual": residual if rng.integers(2) else None,
        "mask": mask if rng.integers(3) == 0 else None,
        "groups": int(rng.choice([1, channels])) if rng.integers(4) == 0 else None,
    }


def placed(a: np.ndarray | None, shift: int) -> np.ndarray | None:
    """A copy that starts `shift` values after a 64-byte line."""
    if a is None:
        return None
    room = np.empty(a.nbytes + 64 + 64 * a.itemsize, np.uint8)
    start = -room.ctypes.data % 64 + shift * a.itemsize
    copy = room[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


def results(call: dict[str, Any], shift: int = 0, in_place: bool = False) -> list[Any]:
    x, dy, residual = (placed(call[name], shift) for name in ("x", "dy", "residual"))
    words = {"axis": call["axis"], "activation": call["activation"], "residual": residual}
    if call["groups"] is not None:
        y, mean, invstd = bnfast.group_norm(x, call["groups"], call["gamma"], call["beta"], **words)
        grad = bnfast.group_norm_grad(dy, x, mean, invstd, call["groups"], call["gamma"], call["beta"], **words)
        return [y, mean, invstd, *grad]
    affine = call["gamma"], call["beta"]
    moving = [np.zeros(len(affine[0])), np.ones(len(affine[0]))]
    own = placed(call["x"], shift)
    y, mean, variance, invstd = bnfast.batch_norm_train(
        own, *affine, *moving, mask=call["mask"], out=own if in_place else None, **words
    )
    mask = call["mask"]
    grad = bnfast.batch_norm_grad(dy, x, mean, invstd, *affine, mask=mask, out=dy if in_place else None, **words)
    return [y, mean, variance, invstd, *moving, *grad]


def digest(values: list[Any]) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    for value in values:
        if value is not None:
            array = np.ascontiguousarray(value)
            state.update(np.where(np.isnan(array), np.array(np.nan, array.dtype), array).tobytes())
    return state.digest()


def reference(number: int) -> bytes:
    _core._set_isa(bnfast.build_info()["isas"][-1])
    bnfast.set_num_threads(1)
    return digest(results(call_of(number)))


def hash_of(count: int) -> str:
    state = hashlib.blake2b(digest_size=16)
    for number in range(count):
        state.update(reference(number))
    return state.hexdigest()


def measure(count: int) -> dict[str, Any]:
    isas, different = bnfast.build_info()["isas"], []
    state = hashlib.blake2b(digest_size=16)
    _core._set_serial_bytes(0)
    _core._set_full_team(True)
    try:
        for number in range(count):
            call, rng = call_of(number), np.random.default_rng(number + 1_000_000_000)
            wanted = reference(number)
            state.update(wanted)
            _core._set_isa(str(rng.choice(isas)))
            bnfast.set_num_threads(int(rng.integers(1, 9)))
            mode = IEEE | int(rng.choice(MODES))
            _core._set_fp_mode(mode)
            found = results(call, int(rng.integers(16)), bool(rng.integers(2)))
            kept = _core._fp_mode() & ~0x3F == mode  # the caller's mode, but for the flags of exceptions
            _core._set_fp_mode(IEEE)
            if digest(found) != wanted or not kept:
                different.append(number)
    finally:
        _core._set_fp_mode(IEEE)
        _core._set_isa(None)
        _core._set_serial_bytes(None)
        _core._set_full_team(False)
        bnfast.set_num_threads(None)
    few = max(1, count // 20)
    wanted, command = hash_of(few), [sys.executable, str(Path(__file__)), str(few)]
    _core._set_isa(None)
    bnfast.set_num_threads(None)
    fresh = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for _ in range(2)]
    return {
        "configurations": count,
        "different": different,
        "hash": state.hexdigest(),
        "processes": len(fresh),
        "processes_different": sum(each != wanted for each in fresh),
    }


if __name__ == "__main__":
    print(hash_of(int(sys.argv[1])))
