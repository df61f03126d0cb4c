"""Random calls: valid ones compute, invalid ones raise; neither changes an argument, neither crashes."""

from __future__ import annotations

from typing import Any

import bnfast
import numpy as np

ERRORS = (TypeError, ValueError, FloatingPointError)
NONSENSE: tuple[Any, ...] = (None, 5, -1.5, "no", (), [1, 2], {}, object(), np.zeros(0), np.zeros((2, 2, 2)), 1j)
NONSENSE += (np.array(["a"]), np.zeros(3, "int64"), np.zeros(3, "complex64"), float("nan"), 10**40, True, b"x")


def valid_call(rng: np.random.Generator) -> tuple[str, list[Any], dict[str, Any]]:
    shape = tuple(int(n) for n in rng.integers(1, 6, rng.integers(1, 5)))
    axis = int(rng.integers(-len(shape), len(shape)))
    dtype = ("float32", "float64", "float16")[rng.integers(3)]
    parameter = np.float64 if dtype == "float64" else np.float32
    C = shape[axis]
    x, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    gamma, beta, mean = (rng.standard_normal(C).astype(parameter) for _ in range(3))
    positive = rng.uniform(0.5, 2, C).astype(parameter)
    words: dict[str, Any] = {"axis": axis, "activation": (None, "relu", "silu", "gelu")[rng.integers(4)]}
    if rng.integers(2):
        words["residual"] = rng.standard_normal(shape).astype(dtype)
    groups = len(shape) > 1 and axis % len(shape) != 0
    match rng.integers(5 if groups else 4):
        case 0:
            return "batch_norm_train", [x, gamma, beta], words
        case 1:
            return "batch_norm_infer", [x, mean, positive, gamma, beta], words
        case 2:
            statistics = [mean.astype(np.float64), positive.astype(np.float64)]
            return "batch_norm_grad", [dy, x, *statistics, gamma, beta], words
        case 3:
            return "moments", [x], {"axis": axis}
        case _:
            return "group_norm", [x, int(rng.choice([1, C])), gamma, beta], words


def inputs(args: list[Any], words: dict[str, Any]) -> list[np.ndarray]:
    values = [*args, *(value for name, value in words.items() if name != "out")]
    return [value for value in values if isinstance(value, np.ndarray)]


def copies(args: list[Any], words: dict[str, Any]) -> list[Any]:
    return [value.copy() for value in inputs(args, words)]


def unchanged(args: list[Any], words: dict[str, Any], before: list[Any]) -> bool:
    pairs = zip(inputs(args, words), before, strict=True)
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs)


def measure(valid: int, invalid: int) -> dict[str, Any]:
    rng, failures = np.random.default_rng(3), []
    for _ in range(valid):
        name, args, words = valid_call(rng)
        before = copies(args, words)
        try:
            getattr(bnfast, name)(*args, **words)
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
        if not unchanged(args, words, before):
            failures.append(f"{name} changed an argument")
    accepted = 0
    for _ in range(invalid):
        name, args, words = valid_call(rng)
        value = NONSENSE[rng.integers(len(NONSENSE))]
        if rng.integers(2):
            args[rng.integers(len(args))] = value
        else:
            words[str(rng.choice([*words, "epsilon", "mask", "out", "unknown"]))] = value
        before = copies(args, words)
        try:
            getattr(bnfast, name)(*args, **words)
            accepted += 1  # None for gamma, say
        except ERRORS:
            pass
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
        if not unchanged(args, words, before):
            failures.append(f"{name} changed an argument")
    return {"valid": valid, "invalid": invalid, "accepted_of_invalid": accepted, "failures": failures[:20]}
