"""MobileNetV2 and ResNet-50 in plain JAX, with a batch norm of JAX's ops, bnfast's, and none.

As a script (python -m bnfast.benchmark.jax_models --help) it prints one JSON object per variant.

    jax       batch norm as Flax writes it: variance E[x^2] - E[x]^2, then an activation of jax.nn
    bnfast    bnfast.jax.batch_norm_train with the activation and the residual in the same call
    left-out  the activation alone: a lower bound for any implementation
A step is one jitted call: forward, cross entropy, backward, new moving statistics. Arrays are channels_last, as XLA's
convolutions on the CPU read them. Each round times one step of every variant in a rotated order; figures are medians
over rounds, of times and of ratios to JAX's within a round. Before anything is timed, the losses and moving statistics
of the first step are compared.
Sources: Sandler et al. 2018, https://arxiv.org/abs/1801.04381; He et al. 2015, https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnfast.benchmark.step_times import LOSS_TOLERANCE, Disagreement, in_turns, parse, rows
from bnfast.jax import batch_norm_train

BASE = "jax"
VARIANTS = (BASE, "bnfast", "left-out")
MOMENTUM, EPSILON = 0.9, 1e-5

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


Model = Sequence[Block]


def mobilenet_v2() -> Model:
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


def resnet50() -> Model:
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


MODELS: dict[str, Callable[[], Model]] = {"MobileNetV2": mobilenet_v2, "ResNet50": resnet50}


def _activate(y: Array, activation: str | None) -> Array:
    return y if activation is None else {"relu": jax.nn.relu, "relu6": jax.nn.relu6}[activation](y)


def _jax_norm(x: Array, parameters: Any, moving: Any, activation: str | None, residual: Array | None) -> Any:
    mean = x.mean((0, 1, 2))
    variance = jnp.maximum(jnp.square(x).mean((0, 1, 2)) - jnp.square(mean), 0)
    gamma, beta = parameters
    y = (x - mean) * (jax.lax.rsqrt(variance + EPSILON) * gamma) + beta
    new = [old * MOMENTUM + one * (1 - MOMENTUM) for old, one in zip(moving, (mean, variance), strict=True)]
    return _activate(y if residual is None else y + residual, activation), new


def _bnfast_norm(x: Array, parameters: Any, moving: Any, activation: str | None, residual: Array | None) -> Any:
    result = batch_norm_train(
        x, *parameters, *moving, momentum=MOMENTUM, epsilon=EPSILON, activation=activation, residual=residual
    )
    return result.y, [result.moving_mean, result.moving_variance]


def _no_norm(x: Array, _: Any, moving: Any, activation: str | None, residual: Array | None) -> Any:
    return _activate(x if residual is None else x + residual, activation), moving


NORMS = {BASE: _jax_norm, "bnfast": _bnfast_norm, "left-out": _no_norm}


def _start(model: Model, classes: int = 1000) -> tuple[Any, Any]:
    """The parameters, and the moving statistics of each convolution's batch norm."""
    rng = np.random.default_rng(7)
    parameters, moving, last = [], [], 0
    for convolution in _convolutions(model):
        k, last = convolution.kernel, convolution.outputs
        shape = (k, k, convolution.inputs // convolution.groups, last)
        kernel = rng.standard_normal(shape, np.float32) * (2 / (k * k * shape[2])) ** 0.5
        parameters.append((jnp.asarray(kernel), (jnp.ones(last), jnp.zeros(last))))
        moving.append([jnp.zeros(last), jnp.ones(last)])
    return (parameters, jnp.asarray(rng.standard_normal((last, classes), np.float32) * 0.01)), moving


def _convolutions(model: Model) -> list[Convolution]:
    """In the order in which `_forward` runs them."""
    return [one for block in model for one in (*([block.shortcut] if block.shortcut else []), *block.body)]


def _forward(model: Model, norm: Any, parameters: Any, moving: Any, x: Array) -> tuple[Array, Any]:
    layers, dense = parameters
    given = zip(layers, moving, strict=True)
    new = []

    def run(convolution: Convolution, x: Array, residual: Array | None = None) -> Array:
        (kernel, affine), statistics = next(given)
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (convolution.stride,) * 2,
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=convolution.groups,
        )
        y, updated = norm(y, affine, statistics, convolution.activation, residual)
        new.append(updated)
        return y

    for block in model:
        shortcut = run(block.shortcut, x) if block.shortcut else x
        for convolution in block.body[:-1]:
            x = run(convolution, x)
        x = run(block.body[-1], x, shortcut if block.residual else None)
    return x.mean((1, 2)) @ dense, new


def _step(model: Model, variant: str) -> Any:
    def loss(parameters: Any, moving: Any, x: Array, labels: Array) -> tuple[Array, Any]:
        logits, new = _forward(model, NORMS[variant], parameters, moving, x)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
        return -chosen.mean(), new

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def measure(name: str, batch: int, size: int, num_rounds: int) -> list[dict[str, Any]]:
    """One row per variant: median and quartiles of the step's seconds, the median ratio to JAX's, all seconds.

    Raises:
        Disagreement: the step with bnfast computes something else.
    """
    model = MODELS[name]()
    rng = np.random.default_rng(8)
    x = jnp.asarray(rng.standard_normal((batch, size, size, 3), np.float32))
    arguments = (*_start(model), x, jnp.asarray(rng.integers(0, 1000, batch)))
    steps = {variant: _step(model, variant) for variant in VARIANTS}
    _check({variant: step(*arguments) for variant, step in steps.items()})

    def run(variant: str) -> None:
        jax.block_until_ready(steps[variant](*arguments))

    calls = {variant: partial(run, variant) for variant in VARIANTS}
    return rows(f"{name} {batch}x{size}x{size}", in_turns(calls, num_rounds))


def _check(results: dict[str, Any]) -> None:
    (loss, moving), _ = results["bnfast"]
    (wanted, wanted_moving), _ = results[BASE]
    if not abs(loss - wanted) <= LOSS_TOLERANCE * abs(wanted):
        raise Disagreement(f"the first loss must be {wanted}, as with JAX's ops. Received: {loss}")
    for i, (ours, theirs) in enumerate(zip(moving, wanted_moving, strict=True)):
        for one, other in zip(ours, theirs, strict=True):
            if not np.allclose(one, other, rtol=1e-3, atol=1e-4):
                raise Disagreement(f"moving statistics {i} after the first step must be JAX's. Received: other ones")


def main(arguments: list[str] | None = None) -> None:
    """Measure the models that the command line names."""
    given = parse("jax_models", MODELS, arguments)
    for name in given.models:
        for row in measure(name, given.batch, given.size, given.rounds):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
