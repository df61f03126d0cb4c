"""MobileNetV2 and ResNet-50 in PyTorch, in the variants that `bnfast bench --model NAME --framework torch` compares.

    torch     the model as written here (torchvision's layers and names of blocks)
    bnfast    bnfast.torch.accelerate of a copy
    left-out  the identity instead of batch norm: a lower bound for any implementation
Each of them once in contiguous memory and once in torch.channels_last. A training step is forward, cross entropy,
backward, with the gradients set to None before, in eager mode. Weights come from one seed; gamma and beta are drawn as
in keras_models, and moving statistics come from the data.
Sources: Sandler et al. 2018, https://arxiv.org/abs/1801.04381; He et al. 2015, https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import bnfast
from bnfast.benchmark.models import DAMPING, SEED, InvalidModel, Spec
from bnfast.torch import accelerate

CLASSES = 1000
CHANNELS_LAST = "-channels_last"  # the end of a variant's name


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


def mobilenet_v2(classes: int = CLASSES) -> nn.Sequential:
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


def resnet50(classes: int = CLASSES) -> nn.Sequential:
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


def start(threads: int | None) -> None:
    """Set the threads of PyTorch and of bnfast; None leaves both as they are."""
    if threads is not None:
        torch.set_num_threads(threads)
        bnfast.set_num_threads(threads)


def versions() -> dict[str, str]:
    """Of the libraries that are compared."""
    return {"torch": torch.__version__}


def names() -> list[str]:
    """The names of the models."""
    return [*MODELS]


def out_of_memory(error: Exception) -> bool:
    """Whether PyTorch raised this because memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def build_model(spec: Spec) -> nn.Module:
    """PyTorch's model with random weights. Raises InvalidModel if it has no such arguments."""
    for name, _ in spec.arguments:
        raise InvalidModel(f"{spec.name} has no argument {name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = MODELS[spec.name]()
    random = np.random.default_rng(SEED)
    for norm in batch_norms(model):
        norm.weight.data.copy_(torch.from_numpy(random.uniform(0.5, 1.5, norm.num_features)))
        norm.bias.data.copy_(torch.from_numpy(0.1 * random.standard_normal(norm.num_features)))
    return model


def batch_norms(model: nn.Module) -> list[Any]:
    """The batch norms of a model, bnfast's included."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def make_data(spec: Spec, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """x, contiguous, and y: normal images, and random classes."""
    random = np.random.default_rng(SEED)
    x = random.standard_normal((spec.batch, 3, spec.size, spec.size), dtype=np.float32)
    return torch.from_numpy(x), torch.from_numpy(random.integers(CLASSES, size=spec.batch))


def calibrate(model: nn.Module, x: torch.Tensor) -> None:
    """Set moving statistics close to those of x, as `keras_models.calibrate` does. Raises InvalidModel for an x too
    small for statistics."""
    norms = batch_norms(model)
    momentums = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # PyTorch's is the weight of the new value
    try:
        with torch.no_grad():
            model.train()(x)
    except ValueError as error:  # one value per channel
        raise InvalidModel(f"a batch of shape {tuple(x.shape)} is too small: {error}") from error
    for norm, momentum in zip(norms, momentums, strict=True):
        norm.momentum = momentum
        norm.running_var.copy_(DAMPING * torch.maximum(norm.running_var, norm.running_var.mean()))


def is_random(model: nn.Module) -> bool:
    """False: no layer draws numbers."""
    return False


class Variant:
    """A model that trains and predicts in one memory format."""

    def __init__(self, model: nn.Module, order: torch.memory_format) -> None:
        self.model = model.to(memory_format=order)
        self._order = order
        self._given: torch.Tensor | None = None
        self._x: torch.Tensor | None = None

    def train_on_batch(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """The loss. Leaves the gradients in the parameters."""
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(self.model(self._in_order(x)), y)
        loss.backward()
        return float(loss.detach())

    def predict_on_batch(self, x: torch.Tensor) -> Any:
        """The logits as a NumPy array."""
        self.model.eval()
        with torch.no_grad():
            return self.model(self._in_order(x)).numpy()

    def _in_order(self, x: torch.Tensor) -> torch.Tensor:
        """x in this variant's memory format, converted when it is first seen: data comes in the model's format."""
        if self._given is not x:
            self._given, self._x = x, x.contiguous(memory_format=self._order)
        return self._x


def make_variant(name: str, model: nn.Module) -> Variant:
    """A copy of PyTorch's `model` as that variant."""
    kind = name.removesuffix(CHANNELS_LAST)
    order = torch.contiguous_format if kind == name else torch.channels_last
    made = copy.deepcopy(model)
    if kind == "bnfast":
        made = accelerate(made)
    elif kind == "left-out":
        _remove_batch_norms(made)
    return Variant(made, order)


def count_batch_norms(variant: Variant) -> dict[str, int]:
    """The number of batch norms per package and class, such as {"torch.BatchNorm2d": 52}."""
    kinds = [type(norm) for norm in batch_norms(variant.model)]
    return dict(Counter(f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in kinds))


def _remove_batch_norms(model: nn.Module) -> None:
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
