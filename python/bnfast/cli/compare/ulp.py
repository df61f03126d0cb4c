"""Moves one weight by 1 ulp, the distance to the next number of the dtype that the script computes in, which may be
narrower than the weight's (mixed precision): the least change that its computation sees.

What becomes of it after some steps is the yardstick: no implementation that rounds differently can stay closer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np


class Mover:
    """Moves one weight of every set of variables that an optimizer trains, before its first step."""

    def __init__(self) -> None:
        self.moved: list[str] = []
        self._covered: dict[int, Any] = {}  # variables of sets in which one was moved; held, so that ids stay theirs

    def move(self, variables: Sequence[Any]) -> None:
        """Without effect if one of them belongs to a set that was handled before."""
        if not variables or any(id(each) in self._covered for each in variables):
            return
        self._covered.update((id(each), each) for each in variables)
        for variable in _candidates(variables):
            with _outside_of_graphs():
                if _move(variable):
                    self.moved.append(getattr(variable, "path", variable.name))
                    return


def _candidates(variables: Sequence[Any]) -> list[Any]:
    """The gamma of a batch norm first, since it changes a whole channel of what bnfast computes; then kernels, from
    the last on, whose inputs are less often constant 0 than a first layer's pixels."""
    gammas = [each for each in variables if each.name == "gamma"]
    kernels = [each for each in reversed(variables) if len(each.shape) > 1]
    return [*gammas, *kernels, *variables]


def _move(variable: Any) -> bool:
    """Moves the largest entry, if it isn't 0. 1 ulp is least in proportion to a large entry, and always seen."""
    import keras

    values = np.array(keras.ops.convert_to_numpy(variable))
    if not values.size or not keras.backend.is_float_dtype(variable.dtype):
        return False
    index = np.unravel_index(np.argmax(np.abs(values)), values.shape)
    if not np.isfinite(values[index]) or values[index] == 0:
        return False
    dtype = min(values.dtype, compute_dtype(), key=lambda each: each.itemsize)
    values[index] = np.nextafter(values[index].astype(dtype), dtype.type(np.inf))
    variable.assign(values)
    return True


def compute_dtype() -> np.dtype[Any]:
    """Of Keras's global policy."""
    import keras
    import ml_dtypes  # which Keras needs, too

    name = keras.config.dtype_policy().compute_dtype
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    return dtype


def epsilon(dtype: np.dtype[Any]) -> float:
    """The distance from 1 to the next number."""
    return float(np.nextafter(dtype.type(1), dtype.type(2))) - 1.0


@contextlib.contextmanager
def _outside_of_graphs() -> Any:
    """Where variables have values, also while TensorFlow traces a function."""
    import keras

    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    with tf.init_scope():
        yield
