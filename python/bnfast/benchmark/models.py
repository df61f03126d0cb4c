"""The variants of a keras.applications model that `bnfast bench --model` compares: same weights, another batch norm.

    keras                  as keras.applications makes it
    tf-fused               TensorFlow's fused op in a custom layer, moving statistics by the op, as tf.keras 2 had it
    bnfast-op          bnfast.keras.accelerate through the TensorFlow op
    bnfast-numpy_function  the same through tf.numpy_function
    bnfast-fold            bnfast.keras.fold: it predicts and doesn't train
    left-out               the identity: what a batch norm that costs nothing would leave

Weights are drawn from one seed, gamma from U(0.5, 1.5) and beta from N(0, 0.1), so that no batch norm can pass for the
identity; moving statistics come from the data. x is normal of shape (batch, size, size, 3) (0 to 255 where the model
rescales pixels itself), y holds random classes. TensorFlow is imported by `load`, not by this file.
"""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import bnfast
from bnfast.benchmark.peers.base import Unsupported
from bnfast.benchmark.peers.tensorflow import start

SEED = 7
LEARNING_RATE = 1e-3
# 1: ResNet50's rounding reaches 1e-5. 1.5: such an epsilon moves EfficientNetB0's predictions by 1e-5. Here 2e-6, 1e-4.
DAMPING = 1.25
TITLES = {
    "keras": "Keras's layer",
    "tf-fused": "TF fused op",
    "bnfast-op": "bnfast, TensorFlow op",
    "bnfast-numpy_function": "bnfast, numpy_function",
    "bnfast-fold": "bnfast, folded",
    "left-out": "batch norm left out",
}
BASE = "keras"
TRAINS = tuple(name for name in TITLES if name != "bnfast-fold")
EXACT = tuple(name for name in TITLES if name not in (BASE, "left-out"))  # those whose predictions must be Keras's


class Refused(Exception):
    """No such model can be built; the message says why."""


@dataclass(frozen=True)
class Spec:
    """What is built: a name of keras.applications with its own arguments, e.g. MobileNetV2 and {"alpha": 0.35}."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()
    batch: int = 16
    size: int = 224

    @property
    def text(self) -> str:
        """As it is written on the command line: MobileNetV2(alpha=0.35). parse() reads it."""
        inside = ", ".join(f"{name}={value!r}" for name, value in self.arguments)
        return f"{self.name}({inside})" if inside else self.name

    @property
    def label(self) -> str:
        """How reports name it: MobileNetV2 16x224x224."""
        return f"{self.text} {self.batch}x{self.size}x{self.size}"

    @property
    def file_name(self) -> str:
        """How files are named: MobileNetV2-16x224, MobileNetV2-alpha-0.35-2x32."""
        own = "".join(f"-{name}-{value}" for name, value in self.arguments)
        kept = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in self.name + own)
        return f"{kept}-{self.batch}x{self.size}"


def parse(text: str, batch: int = 16, size: int = 224) -> Spec:
    """The model that NAME or NAME(argument=literal, ...) says. ValueError for anything else; names aren't looked up."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        name, given = (node.func, node.keywords) if isinstance(node, ast.Call) else (node, [])
        if not isinstance(name, ast.Name) or (isinstance(node, ast.Call) and node.args):
            raise ValueError(text)
        arguments = tuple((str(keyword.arg), ast.literal_eval(keyword.value)) for keyword in given)
    except (SyntaxError, TypeError) as error:
        raise ValueError(text) from error
    if any(key in ("None", "weights", "input_shape", "include_top", "input_tensor") for key, _ in arguments):
        raise ValueError(text)
    return Spec(name.id, arguments, batch, size)


def load(threads: int | None = None) -> Any:
    """keras, imported quietly on its TensorFlow backend. ImportError where that can't be had.

    threads: of TensorFlow's pools and of bnfast; None: as they are. RuntimeError where TensorFlow runs with others.
    """
    from bnfast.cli import quiet

    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # bnfast is a CPU library: a GPU would train Keras's model
    quiet.prepare_tensorflow()
    with quiet.quiet_stderr():
        import keras
        import tensorflow as tf

        if keras.backend.backend() != "tensorflow":
            raise ImportError(f"Keras runs on {keras.backend.backend()}")
        if threads is not None:
            start(threads)
            bnfast.set_num_threads(threads)
        tf.constant(0)
    return keras


def known(keras: Any) -> list[str]:
    """The names that keras.applications has."""
    return [name for name, value in vars(keras.applications).items() if name[0].isupper() and callable(value)]


def build(spec: Spec) -> Any:
    """The model as Keras has it, on random weights. Refused where that can't be built, or has no batch norm."""
    keras = load()
    keras.utils.set_random_seed(SEED)
    constructor = getattr(keras.applications, spec.name)
    unknown = [name for name, _ in spec.arguments if name not in inspect.signature(constructor).parameters]
    if unknown:
        raise Refused(f"{spec.name} has no argument {unknown[0]}")
    try:
        model = constructor(weights=None, input_shape=(spec.size, spec.size, 3), **dict(spec.arguments))
    except (ValueError, TypeError) as error:
        raise Refused(f"{spec.label}: {error}") from error
    layers = batch_norms(model)
    if not layers:
        raise Refused(f"{spec.name} has no batch norm")
    random = np.random.default_rng(SEED)
    for layer in layers:
        if layer.gamma is not None:
            layer.gamma.assign(random.uniform(0.5, 1.5, layer.gamma.shape))
        if layer.beta is not None:
            layer.beta.assign(0.1 * random.standard_normal(layer.beta.shape))
    return model


def batch_norms(model: Any) -> list[Any]:
    """Its batch norms and those of models inside it, bnfast's too, in the order of the layers."""
    from bnfast.benchmark.model_layers import is_batch_norm

    found = []
    for layer in model.layers:
        found += batch_norms(layer) if hasattr(layer, "layers") else [layer] if is_batch_norm(layer) else []
    return found


def data(spec: Spec, model: Any) -> tuple[Any, Any]:
    """x and y as TensorFlow tensors."""
    import tensorflow as tf

    random = np.random.default_rng(SEED)
    x = random.standard_normal((spec.batch, spec.size, spec.size, 3), dtype=np.float32)
    if any(type(layer).__name__ == "Rescaling" for layer in model.layers):
        x = np.clip(64 * x + 128, 0, 255)
    y = random.integers(model.output_shape[-1], size=spec.batch, dtype=np.int32)
    return tf.constant(x), tf.constant(y)


def calibrate(model: Any, x: Any) -> None:
    """Set moving statistics near those of x, so that what the first layer does still reaches the predictions.

    mean = the batch's, variance = DAMPING*max(v, the channels' mean v) of the batch's v. With v itself the channels
    whose v is near 0, many in a small batch, blow rounding up: 1e-3 of the predictions. With statistics that ignore x
    signals fade, and an epsilon 10 times too large in the first of 52 layers changes nothing above 2e-7.
    """
    layers = batch_norms(model)
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    model(x, training=True)
    for layer, momentum in zip(layers, before, strict=True):
        layer.momentum = momentum
        variance = layer.moving_variance.numpy()
        layer.moving_variance.assign(DAMPING * np.maximum(variance, variance.mean()))


def make(name: str, model: Any) -> Any:
    """The variant of Keras's `model`, compiled where it trains. Unsupported, with the reason, where it isn't here."""
    made = _MAKERS[name](model)
    if name in TRAINS:
        keras = load()
        # XLA compiles none of the ops that are compared here
        optimizer = keras.optimizers.SGD(LEARNING_RATE)
        made.compile(optimizer, loss="sparse_categorical_crossentropy", jit_compile=False)
    return made


def _native(model: Any) -> Any:
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

    return fold(model)


def _exchanged(model: Any, kind: str) -> Any:
    from bnfast.benchmark import model_layers

    return model_layers.exchange(model, getattr(model_layers, kind))


_MAKERS: dict[str, Callable[[Any], Any]] = {
    "keras": lambda model: model,
    "tf-fused": lambda model: _exchanged(model, "fused"),
    "bnfast-op": _native,
    "bnfast-numpy_function": lambda model: _accelerated(model, "numpy_function"),
    "bnfast-fold": _folded,
    "left-out": lambda model: _exchanged(model, "identity"),
}
