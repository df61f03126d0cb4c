"""MobileNetV2 and ResNet-50 in PyTorch, with PyTorch's batch norm, bnfast's, and none.

As a script (python -m bnfast.benchmark.torch_models --help) it prints one JSON object per variant and memory format.

    torch     the model as written here (torchvision's layers and names of blocks)
    bnfast    bnfast.torch.accelerate of a copy
    left-out  the identity instead of batch norm: a lower bound for any implementation
A step is forward, cross entropy, backward, with the gradients set to None before. Each round times one step of every
variant in a rotated order; figures are medians over rounds, of times and of ratios to PyTorch's within a round. Before
anything is timed, the losses and running statistics of the first step are compared.
Sources: Sandler et al. 2018, https://arxiv.org/abs/1801.04381; He et al. 2015, https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from bnfast.benchmark.step_times import LOSS_TOLERANCE, Disagreement, in_turns, parse, rows
from bnfast.torch import accelerate

BASE = "torch"

ORDERS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Residual(nn.Module):  # type: ignore[misc]
    """after(body(x) + shortcut(x)); without a shortcut, body(x) alone."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut, self.after = body, shortcut, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return y if self.after is None else self.after(y)


def _convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, activation: Any = None
) -> nn.Sequential:
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([activation(inplace=True)] if activation else []))


def mobilenet_v2(classes: int = 1000) -> nn.Sequential:
    """The model of width 1."""
    blocks: list[nn.Module] = [_convolution(3, 32, 3, 2, activation=nn.ReLU6)]
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
            layers = [] if expansion == 1 else [_convolution(inputs, hidden, activation=nn.ReLU6)]
            layers.append(_convolution(hidden, hidden, 3, stride, hidden, nn.ReLU6))
            body = nn.Sequential(*layers, _convolution(hidden, outputs))
            blocks.append(Residual(body, nn.Identity() if stride == 1 and inputs == outputs else None))
            inputs = outputs
    blocks.append(_convolution(inputs, 1280, activation=nn.ReLU6))
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes))


def resnet50(classes: int = 1000) -> nn.Sequential:
    """The model with the stride in the 3x3 convolution."""
    blocks: list[nn.Module] = [_convolution(3, 64, 7, 2, activation=nn.ReLU), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, repeats in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(repeats):
            stride = 2 if i == 0 and width > 64 else 1
            body = nn.Sequential(
                _convolution(inputs, width, activation=nn.ReLU),
                _convolution(width, width, 3, stride, activation=nn.ReLU),
                _convolution(width, 4 * width),
            )
            shortcut = _convolution(inputs, 4 * width, stride=stride) if i == 0 else nn.Identity()
            blocks.append(Residual(body, shortcut, nn.ReLU(inplace=True)))
            inputs = 4 * width
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


MODELS: dict[str, Callable[[], nn.Sequential]] = {"MobileNetV2": mobilenet_v2, "ResNet50": resnet50}


def measure(name: str, batch: int, size: int, num_rounds: int, order: str) -> list[dict[str, Any]]:
    """One row per variant: median and quartiles of the step's seconds, the median ratio to PyTorch's, all seconds.

    Raises:
        Disagreement: the accelerated model computes something else.
    """
    torch.manual_seed(7)
    base = MODELS[name]().to(memory_format=ORDERS[order])
    x = torch.randn(batch, 3, size, size).to(memory_format=ORDERS[order])
    labels = torch.randint(0, 1000, (batch,))
    variants = {BASE: base, "bnfast": accelerate(copy.deepcopy(base)), "left-out": _without(copy.deepcopy(base))}
    _check(variants, x, labels)
    steps = {variant: partial(_step, model, x, labels) for variant, model in variants.items()}
    return rows(name, in_turns(steps, num_rounds), order=order)


def _step(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    model.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(model(x), labels)
    loss.backward()
    return float(loss.detach())


def _check(variants: dict[str, nn.Module], x: torch.Tensor, labels: torch.Tensor) -> None:
    losses = {variant: _step(model, x, labels) for variant, model in variants.items()}
    if abs(losses["bnfast"] - losses[BASE]) > LOSS_TOLERANCE * abs(losses[BASE]):
        raise Disagreement(f"the first loss must be {losses[BASE]}, as PyTorch's. Received: {losses['bnfast']}")
    for (key, theirs), ours in zip(
        variants[BASE].state_dict().items(), variants["bnfast"].state_dict().values(), strict=True
    ):
        if not torch.allclose(theirs.double(), ours.double(), rtol=1e-3, atol=1e-4):
            raise Disagreement(f"{key} after the first step must be PyTorch's. Received: another one")


def _without(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return model


def main(arguments: list[str] | None = None) -> None:
    """Measure the models that the command line names, in both memory formats."""
    given = parse("torch_models", MODELS, arguments)
    for name in given.models:
        for order in ORDERS:
            for row in measure(name, given.batch, given.size, given.rounds, order):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
