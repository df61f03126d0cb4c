"""MobileNetV2 and ResNet-50 in plain JAX, in the variants that `bnfast bench --model NAME --framework jax` compares.

    jax       batch norm as Flax writes it: variance E[x^2] - E[x]^2, then an activation of jax.nn
    bnfast    bnfast.jax's batch_norm_train and batch_norm_infer, activation and residual in the same call
    left-out  the activation alone: a lower bound for any implementation
A training step is one jitted call: forward, cross entropy, backward, new moving statistics. Arrays are channels_last,
as XLA's convolutions on the CPU read them. Weights come from one seed; gamma and beta are drawn as in keras_models, and
moving statistics come from the data.
Sources: Sandler et al. 2018, https://arxiv.org/abs/1801.04381; He et al. 2015, https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bnfast
from bnfast.benchmark.models import DAMPING, SEED, InvalidModel, Spec
from bnfast.benchmark.peers import jax as jax_peer
from bnfast.benchmark.peers.base import Unsupported
from bnfast.jax import batch_norm_infer, batch_norm_train, status

MOMENTUM, EPSILON = 0.9, 1e-5
CLASSES = 1000

Array = Any


class Convolution(NamedTuple):
    """A convolution without bias, batch norm, the sum with `residual` where a Block gives one, and an activation."""

    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    activation: str | None = None


class Block(NamedTuple):
    """body(x) + x, or + shortcut(x); the last convolution of the body takes the sum. residual=False: body(x)."""

    body: tuple[Convolution, ...]
    shortcut: Convolution | None = None
    residual: bool = True


Blocks = Sequence[Block]


def mobilenet_v2() -> Blocks:
    """The model of width 1, without its classifier."""
    blocks = [Block((Convolution(3, 32, 3, 2, activation="relu6"),), residual=False)]
    inputs = 32
    settings = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    for expansion, outputs, repeats, first_stride in settings:
        for i in range(repeats):
            stride, hidden = first_stride if i == 0 else 1, inputs * expansion
            expand = (Convolution(inputs, hidden, activation="relu6"),) if expansion > 1 else ()
            depthwise = Convolution(hidden, hidden, 3, stride, hidden, "relu6")
            body = (*expand, depthwise, Convolution(hidden, outputs))
            blocks.append(Block(body, residual=stride == 1 and inputs == outputs))
            inputs = outputs
    return [*blocks, Block((Convolution(inputs, 1280, activation="relu6"),), residual=False)]


def resnet50() -> Blocks:
    """The model with the stride in the 3x3 convolution, without its classifier and with the pooling as a stride."""
    blocks = [Block((Convolution(3, 64, 7, 4, activation="relu"),), residual=False)]
    inputs = 64
    for width, repeats in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(repeats):
            stride = 2 if i == 0 and width > 64 else 1
            body = (
                Convolution(inputs, width, activation="relu"),
                Convolution(width, width, 3, stride, activation="relu"),
                Convolution(width, 4 * width, activation="relu"),
            )
            blocks.append(Block(body, Convolution(inputs, 4 * width, stride=stride) if i == 0 else None))
            inputs = 4 * width
    return blocks


MODELS: dict[str, Callable[[], Blocks]] = {"MobileNetV2": mobilenet_v2, "ResNet50": resnet50}


def _activate(y: Array, activation: str | None) -> Array:
    return y if activation is None else {"relu": jax.nn.relu, "relu6": jax.nn.relu6}[activation](y)


class Norm(NamedTuple):
    """A batch norm, and the parameters around it, as a call of `_forward` gives them."""

    gamma: Array
    beta: Array
    moving_mean: Array
    moving_variance: Array
    activation: str | None
    residual: Array | None


NormFunction = Callable[[Array, Norm], tuple[Array, tuple[Array, Array]]]  # y, new moving statistics


def _normalize(x: Array, norm: Norm, mean: Array, variance: Array) -> Array:
    y = (x - mean) * (jax.lax.rsqrt(variance + EPSILON) * norm.gamma) + norm.beta
    return _activate(y if norm.residual is None else y + norm.residual, norm.activation)


def _jax_train(x: Array, norm: Norm, momentum: float = MOMENTUM) -> tuple[Array, tuple[Array, Array]]:
    mean = x.mean((0, 1, 2))
    variance = jnp.maximum(jnp.square(x).mean((0, 1, 2)) - jnp.square(mean), 0)
    moving = (
        norm.moving_mean * momentum + mean * (1 - momentum),
        norm.moving_variance * momentum + variance * (1 - momentum),
    )
    return _normalize(x, norm, mean, variance), moving


def _jax_infer(x: Array, norm: Norm) -> tuple[Array, tuple[Array, Array]]:
    moving = norm.moving_mean, norm.moving_variance
    return _normalize(x, norm, *moving), moving


def _bnfast_train(x: Array, norm: Norm) -> tuple[Array, tuple[Array, Array]]:
    result = batch_norm_train(x, **norm._asdict(), momentum=MOMENTUM, epsilon=EPSILON)
    return result.y, (result.moving_mean, result.moving_variance)


def _bnfast_infer(x: Array, norm: Norm) -> tuple[Array, tuple[Array, Array]]:
    y = batch_norm_infer(x, **norm._asdict(), epsilon=EPSILON)
    return y, (norm.moving_mean, norm.moving_variance)


def _left_out(x: Array, norm: Norm) -> tuple[Array, tuple[Array, Array]]:
    y = _activate(x if norm.residual is None else x + norm.residual, norm.activation)
    return y, (norm.moving_mean, norm.moving_variance)


# Training and inference.
NORMS: dict[str, tuple[NormFunction, NormFunction]] = {
    "jax": (_jax_train, _jax_infer),
    "bnfast": (_bnfast_train, _bnfast_infer),
    "left-out": (_left_out, _left_out),
}


def _convolutions(blocks: Blocks) -> list[Convolution]:
    """In the order in which `_forward` runs them."""
    return [one for block in blocks for one in (*([block.shortcut] if block.shortcut else []), *block.body)]


def _forward(blocks: Blocks, normalize: NormFunction, parameters: Any, moving: Any, x: Array) -> tuple[Array, Any]:
    layers, dense = parameters
    given = zip(layers, moving, strict=True)
    new = []

    def run(convolution: Convolution, x: Array, residual: Array | None = None) -> Array:
        (kernel, gamma, beta), (mean, variance) = next(given)
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (convolution.stride,) * 2,
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=convolution.groups,
        )
        y, updated = normalize(y, Norm(gamma, beta, mean, variance, convolution.activation, residual))
        new.append(updated)
        return y

    for block in blocks:
        shortcut = run(block.shortcut, x) if block.shortcut else x
        for convolution in block.body[:-1]:
            x = run(convolution, x)
        x = run(block.body[-1], x, shortcut if block.residual else None)
    return x.mean((1, 2)) @ dense, new


@dataclass
class Model:
    """Blocks with the values of their parameters: per convolution its kernel, gamma and beta; and the last product."""

    blocks: Blocks
    parameters: Any
    moving: Any


def start(threads: int | None) -> None:
    """Set the threads of JAX, which must not run yet, and of bnfast; None leaves both as they are."""
    jax_peer.start(threads)
    if threads is not None:
        bnfast.set_num_threads(threads)


def versions() -> dict[str, str]:
    """Of the libraries that are compared."""
    return {"jax": jax.__version__}


def names() -> list[str]:
    """The names of the models."""
    return [*MODELS]


def out_of_memory(error: Exception) -> bool:
    """Whether XLA raised this because memory ran out."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def build_model(spec: Spec) -> Model:
    """The model with random weights. Raises InvalidModel if it has no such arguments."""
    for name, _ in spec.arguments:
        raise InvalidModel(f"{spec.name} has no argument {name}")
    blocks = MODELS[spec.name]()
    random = np.random.default_rng(SEED)
    layers, moving, last = [], [], 0
    for convolution in _convolutions(blocks):
        k, last = convolution.kernel, convolution.outputs
        shape = (k, k, convolution.inputs // convolution.groups, last)
        kernel = random.standard_normal(shape, np.float32) * (2 / (k * k * shape[2])) ** 0.5
        affine = random.uniform(0.5, 1.5, last), 0.1 * random.standard_normal(last)
        layers.append([jnp.asarray(array, jnp.float32) for array in (kernel, *affine)])
        moving.append((jnp.zeros(last, jnp.float32), jnp.ones(last, jnp.float32)))
    dense = jnp.asarray(random.standard_normal((last, CLASSES), np.float32) * 0.01)
    return Model(blocks, (layers, dense), moving)


def make_data(spec: Spec, model: Model) -> tuple[Array, Array]:
    """x and y: normal images, and random classes."""
    random = np.random.default_rng(SEED)
    x = random.standard_normal((spec.batch, spec.size, spec.size, 3), np.float32)
    return jnp.asarray(x), jnp.asarray(random.integers(CLASSES, size=spec.batch))


def calibrate(model: Model, x: Array) -> None:
    """Set moving statistics close to those of x, as `keras_models.calibrate` does."""
    forward = jax.jit(partial(_forward, model.blocks, partial(_jax_train, momentum=0.0)))
    _, moving = forward(model.parameters, model.moving, x)
    model.moving = [(mean, DAMPING * jnp.maximum(variance, variance.mean())) for mean, variance in moving]


def is_random(model: Model) -> bool:
    """False: nothing draws numbers."""
    return False


class Variant:
    """A model that trains and predicts with one of NORMS."""

    def __init__(self, name: str, model: Model) -> None:
        train, infer = NORMS[name]
        self.name = name
        self.model = replace(model)

        def loss(parameters: Any, moving: Any, x: Array, y: Array) -> tuple[Array, Any]:
            logits, new = _forward(model.blocks, train, parameters, moving, x)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean(), new

        self._step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        self._predict = jax.jit(lambda *arguments: _forward(model.blocks, infer, *arguments)[0])

    def train_on_batch(self, x: Array, y: Array) -> float:
        """The loss. Computes the gradients, and keeps the new moving statistics."""
        result = self._step(self.model.parameters, self.model.moving, x, y)
        (loss, self.model.moving), _ = jax.block_until_ready(result)
        return float(loss)

    def predict_on_batch(self, x: Array) -> Any:
        """The logits as a NumPy array."""
        return np.asarray(self._predict(self.model.parameters, self.model.moving, x))


def make_variant(name: str, model: Model) -> Variant:
    """That variant of the model. Raises Unsupported with the reason."""
    works, reason = status()
    if name == "bnfast" and not works:
        raise Unsupported(f"no kernels for JAX: {reason}")
    return Variant(name, model)


def count_batch_norms(variant: Variant) -> dict[str, int]:
    """The number of batch norms, such as {"jax": 52}."""
    return {} if variant.name == "left-out" else {variant.name: len(variant.model.moving)}
