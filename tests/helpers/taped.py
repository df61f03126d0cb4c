"""What the tests of single switches share: a built layer with weights of its own, and a call under a tape."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from bnfast.keras import BatchNormalization


def made(shape: Any, kind: Any = BatchNormalization, **words: Any) -> Any:
    layer = kind(**words)
    layer.build(shape)
    rng = np.random.default_rng(7)
    layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.weights])
    return layer


def gradients(call: Callable[[Any], Any], x: Any, dy: Any, variables: list[Any]) -> list[Any]:
    """y = call(x), dx, and those of the variables."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = call(x)
    return [y, *tape.gradient(y, [x, *variables], output_gradients=tf.cast(dy, y.dtype))]
