"""Shared by the tests of single options: a built layer with random weights, and a call under a GradientTape."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from bnfast.keras import BatchNormalization


def made(shape: Any, kind: Any = BatchNormalization, **kwargs: Any) -> Any:
    """A layer of `kind`, built for `shape`, with random weights."""
    layer = kind(**kwargs)
    layer.build(shape)
    rng = np.random.default_rng(7)
    layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.weights])
    return layer


def gradients(call: Callable[[Any], Any], x: Any, dy: Any, variables: list[Any]) -> list[Any]:
    """y = call(x), dx, and the gradients of the variables, for the upstream gradient dy."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = call(x)
    return [y, *tape.gradient(y, [x, *variables], output_gradients=tf.cast(dy, y.dtype))]
