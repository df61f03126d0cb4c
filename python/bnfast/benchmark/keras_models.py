"""The variants of a keras.applications model that `bnfast bench --model` compares. Weights are the same in all.

    keras                  the model of keras.applications
    tf-fused               a layer on TensorFlow's fused op, which also updates the moving statistics, as in tf.keras 2
    bnfast-op              bnfast.keras.accelerate through bnfast's TensorFlow op
    bnfast-numpy_function  bnfast.keras.accelerate through tf.numpy_function
    bnfast-fold            bnfast.keras.fold; this model only predicts
    left-out               the identity instead of batch norm: a lower bound for any implementation
Weights come from one seed. gamma is drawn from U(0.5, 1.5) and beta from N(0, 0.1), so that no batch norm is close to
the identity; moving statistics come from the data. x has shape (batch, size, size, 3) and is normal, or in 0 to 255 if
the model rescales pixels itself; y holds random classes. This file imports TensorFlow only when `load_keras` is
called.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import numpy as np

import bnfast
from bnfast.benchmark import quiet
from bnfast.benchmark.models import DAMPING, KERAS, SEED, InvalidModel, Spec
from bnfast.benchmark.peers import tensorflow as tensorflow_peer
from bnfast.benchmark.peers.base import Unsupported

LEARNING_RATE = 1e-3


def load_keras(threads: int | None = None) -> Any:
    """Import Keras on its TensorFlow backend, without log lines, and return it. ImportError if that is impossible.

    `threads` is set for TensorFlow's pools and for bnfast; None leaves both as they are. Raises RuntimeError if
    TensorFlow already runs with another number.
    """
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # bnfast runs on the CPU, so Keras's model must too
    quiet.prepare_tensorflow()
    with quiet.quiet_stderr():
        import keras
        import tensorflow as tf

        if keras.backend.backend() != "tensorflow":
            raise ImportError(f"Keras runs on {keras.backend.backend()}")
        if threads is not None:
            tensorflow_peer.start(threads)
            bnfast.set_num_threads(threads)
        tf.constant(0)
    return keras


def start(threads: int | None) -> None:
    """`load_keras`."""
    load_keras(threads)


def versions() -> dict[str, str]:
    """Of the libraries that are compared."""
    keras = load_keras()
    import tensorflow as tf

    return {"tensorflow": tf.__version__, "keras": keras.__version__}


def out_of_memory(error: Exception) -> bool:
    """Whether TensorFlow raised this because memory ran out."""
    import tensorflow as tf

    return isinstance(error, tf.errors.ResourceExhaustedError)


def names() -> list[str]:
    """The names of the models in keras.applications."""
    keras = load_keras()
    return [name for name, value in vars(keras.applications).items() if name[0].isupper() and callable(value)]


def build_model(spec: Spec) -> Any:
    """Keras's model with random weights. Raises InvalidModel if it can't be built or has no batch norm."""
    keras = load_keras()
    keras.utils.set_random_seed(SEED)
    constructor = getattr(keras.applications, spec.name)
    parameters = inspect.signature(constructor).parameters
    for name, _ in spec.arguments:
        if name not in parameters:
            raise InvalidModel(f"{spec.name} has no argument {name}")
    try:
        model = constructor(weights=None, input_shape=(spec.size, spec.size, 3), **dict(spec.arguments))
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidModel(f"{spec.label}: {error}") from error
    layers = batch_norms(model)
    if not layers:
        raise InvalidModel(f"{spec.name} has no batch norm")
    random = np.random.default_rng(SEED)
    for layer in layers:
        if layer.gamma is not None:
            layer.gamma.assign(random.uniform(0.5, 1.5, layer.gamma.shape))
        if layer.beta is not None:
            layer.beta.assign(0.1 * random.standard_normal(layer.beta.shape))
    return model


def batch_norms(model: Any) -> list[Any]:
    """The batch norms of a model and of the models inside it, bnfast's included, in the order of the layers."""
    from bnfast.benchmark.model_layers import is_batch_norm

    found = []
    for layer in model.layers:
        if hasattr(layer, "layers"):
            found += batch_norms(layer)
        elif is_batch_norm(layer):
            found.append(layer)
    return found


def count_batch_norms(model: Any) -> dict[str, int]:
    """The number of batch norms per class, such as {"keras.BatchNormalization": 52}.

    A name is the package and the class; for the classes of this benchmark it is the class alone.
    """
    counts: dict[str, int] = {}
    for layer in batch_norms(model):
        kind = type(layer)
        package = "" if kind.__module__.startswith("bnfast.benchmark") else kind.__module__.split(".")[0] + "."
        name = package + kind.__name__
        counts[name] = counts.get(name, 0) + 1
    return counts


def is_random(model: Any) -> bool:
    """Whether each variant draws numbers of its own in training, as Dropout and its like do."""
    return any(getattr(layer, "seed_generator", None) is not None for layer in model.layers)


def make_data(spec: Spec, model: Any) -> tuple[Any, Any]:
    """x and y as TensorFlow tensors."""
    import tensorflow as tf

    random = np.random.default_rng(SEED)
    x = random.standard_normal((spec.batch, spec.size, spec.size, 3), dtype=np.float32)
    if any(type(layer).__name__ == "Rescaling" for layer in model.layers):
        x = np.clip(64 * x + 128, 0, 255)
    y = random.integers(model.output_shape[-1], size=spec.batch, dtype=np.int32)
    return tf.constant(x), tf.constant(y)


def calibrate(model: Any, x: Any) -> None:
    """Set moving statistics close to those of x, so that an error in the first layer is visible in the predictions.

    The mean is the batch's. The variance is DAMPING*max(v, mean of v over the channels), where v is the batch's
    variance: with v itself, the channels with v near 0 (many in a small batch) amplify rounding to 1e-3 of the
    predictions. With statistics unrelated to x, signals fade: a tenfold epsilon in the first of 52 layers changes
    nothing above 2e-7.
    """
    layers = batch_norms(model)
    momentums = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    model(x, training=True)
    for layer, momentum in zip(layers, momentums, strict=True):
        layer.momentum = momentum
        variance = layer.moving_variance.numpy()
        layer.moving_variance.assign(DAMPING * np.maximum(variance, variance.mean()))


def make_variant(name: str, model: Any) -> Any:
    """Make that variant of Keras's `model`, and compile it if it is trained. Raises Unsupported with the reason."""
    variant = _VARIANTS[name](model)
    if KERAS.variants[name].trained:
        optimizer = load_keras().optimizers.SGD(LEARNING_RATE)
        # Without XLA, which compiles none of the ops compared here.
        variant.compile(optimizer, loss="sparse_categorical_crossentropy", jit_compile=False)
    return variant


def _accelerated_by_op(model: Any) -> Any:
    try:
        from bnfast.tensorflow import op
    except ImportError as error:
        raise Unsupported(f"no TensorFlow op: {error}") from error
    works, reason = op.status()
    if not works:
        raise Unsupported(f"no TensorFlow op: {reason}")
    return _accelerated(model, "op")


def _accelerated(model: Any, bridge: str) -> Any:
    from bnfast.keras import accelerate

    return accelerate(model, bridge=bridge, verbose=False)


def _folded(model: Any) -> Any:
    from bnfast.keras import fold

    return fold(model, verbose=0)


def _with_fused_op(model: Any) -> Any:
    from bnfast.benchmark import model_layers

    return model_layers.replace_batch_norms(model, model_layers.make_fused)


def _without_batch_norm(model: Any) -> Any:
    from bnfast.benchmark import model_layers

    return model_layers.replace_batch_norms(model, model_layers.make_identity)


_VARIANTS: dict[str, Callable[[Any], Any]] = {
    "keras": lambda model: model,
    "tf-fused": _with_fused_op,
    "bnfast-op": _accelerated_by_op,
    "bnfast-numpy_function": lambda model: _accelerated(model, "numpy_function"),
    "bnfast-fold": _folded,
    "left-out": _without_batch_norm,
}
