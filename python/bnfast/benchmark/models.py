"""What `bnfast bench --model` can measure: the frameworks with their variants of a model, and how a model is named.

Each framework has a module that builds the variants. It is imported when it is needed, as it imports the framework. It
has the functions
    start(threads), versions(), names(), out_of_memory(error)
    build_model(spec), make_data(spec, model), calibrate(model, x), is_random(model)
    make_variant(name, model), count_batch_norms(variant)
and a variant has train_on_batch(x, y), which returns the loss, and predict_on_batch(x).
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SEED = 7
RESERVED_ARGUMENTS = ("weights", "input_shape", "include_top", "input_tensor")  # set here, so a user can't set them
# calibrate() multiplies the moving variances by this. With 1, rounding in ResNet50 changes predictions by 1e-5. With
# 1.5, a tenfold epsilon changes those of EfficientNetB0 by only 1e-5. With 1.25 the two are 2e-6 and 1e-4.
DAMPING = 1.25


class InvalidModel(Exception):
    """The model cannot be built, or has no batch norm; the message gives the reason."""


class Kind(NamedTuple):
    """A variant of a model: what it is called, and the variant with the framework's own batch norm."""

    title: str
    base: str
    trained: bool = True
    must_agree: bool = True  # on predictions, with the base


@dataclass(frozen=True)
class Framework:
    """A framework and the variants of its models, in the order of reports."""

    name: str
    title: str
    module: str
    requires: tuple[str, ...]
    extra: str  # of bnfast, which installs what is required
    models: str  # what a model can be, for messages
    note: str  # what reports say beside the figures
    variants: dict[str, Kind] = field(hash=False)

    @property
    def titles(self) -> dict[str, str]:
        """The title of each variant."""
        return {name: kind.title for name, kind in self.variants.items()}

    def is_base(self, name: str) -> bool:
        """Whether the variant has the framework's own batch norm."""
        return self.variants[name].base == name

    def chosen(self, names: Iterable[str] | None) -> list[str]:
        """Those variants and the ones that they are compared with; None: all."""
        wanted = set(self.variants if names is None else names)
        wanted |= {self.variants[name].base for name in wanted} or {next(iter(self.variants))}
        return [name for name in self.variants if name in wanted]

    def trained(self, names: Iterable[str]) -> list[str]:
        """Those of the variants that are trained."""
        return [name for name in names if self.variants[name].trained]

    def load(self) -> Any:
        """The module that builds the variants. Imports the framework, or does so when its `start` is called."""
        return importlib.import_module(self.module)


KERAS = Framework(
    name="keras",
    title="Keras",
    module="bnfast.benchmark.keras_models",
    requires=("keras", "tensorflow"),
    extra="demo",
    models="a name of keras.applications",
    note="",
    variants={
        "keras": Kind("Keras's layer", "keras"),
        "tf-fused": Kind("TF fused op", "keras"),
        "bnfast-op": Kind("bnfast, TensorFlow op", "keras"),
        "bnfast-numpy_function": Kind("bnfast, numpy_function", "keras"),
        "bnfast-fold": Kind("bnfast, folded", "keras", trained=False),
        "left-out": Kind("batch norm left out", "keras", must_agree=False),
    },
)
TORCH = Framework(
    name="torch",
    title="PyTorch",
    module="bnfast.benchmark.torch_models",
    requires=("torch",),
    extra="torch",
    models="MobileNetV2 or ResNet50",
    note="A training step is forward, cross entropy and backward, without an optimizer. Ratios are to PyTorch's in the"
    " same memory format.",
    variants={
        "torch": Kind("PyTorch's layer", "torch"),
        "bnfast": Kind("bnfast", "torch"),
        "left-out": Kind("batch norm left out", "torch", must_agree=False),
        "torch-channels_last": Kind("PyTorch's, channels_last", "torch-channels_last"),
        "bnfast-channels_last": Kind("bnfast, channels_last", "torch-channels_last"),
        "left-out-channels_last": Kind("left out, channels_last", "torch-channels_last", must_agree=False),
    },
)
JAX = Framework(
    name="jax",
    title="JAX",
    module="bnfast.benchmark.jax_models",
    requires=("jax",),
    extra="jax",
    models="MobileNetV2 or ResNet50",
    note="A training step is one jitted call: forward, cross entropy, backward and moving statistics, without an"
    " optimizer.",
    variants={
        "jax": Kind("JAX's ops", "jax"),
        "bnfast": Kind("bnfast", "jax"),
        "left-out": Kind("batch norm left out", "jax", must_agree=False),
    },
)
FRAMEWORKS = {framework.name: framework for framework in (KERAS, TORCH, JAX)}


@dataclass(frozen=True)
class Spec:
    """A model to build: a name and its arguments, e.g. MobileNetV2 and {"alpha": 0.35} in keras.applications."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()
    batch: int = 16
    size: int = 224
    framework: Framework = KERAS

    @property
    def text(self) -> str:
        """The form of the command line, such as MobileNetV2(alpha=0.35). parse() reads it."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments)
        return f"{self.name}({arguments})" if arguments else self.name

    @property
    def label(self) -> str:
        """The name in reports, such as MobileNetV2 16x224x224, or MobileNetV2 16x224x224 in PyTorch."""
        where = "" if self.framework is KERAS else f" in {self.framework.title}"
        return f"{self.text} {self.batch}x{self.size}x{self.size}{where}"

    @property
    def file_name(self) -> str:
        """The name of files, such as MobileNetV2-16x224, MobileNetV2-alpha-0.35-2x32 or torch-MobileNetV2-16x224."""
        name = self.name + "".join(f"-{key}-{value}" for key, value in self.arguments)
        name = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in name)
        prefix = "" if self.framework is KERAS else f"{self.framework.name}-"
        return f"{prefix}{name}-{self.batch}x{self.size}"


def parse(text: str, batch: int = 16, size: int = 224, framework: str = "keras") -> Spec:
    """Parse NAME or NAME(argument=literal, ...). Raises ValueError for anything else; any NAME is accepted."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        name, keywords = node, []
        if isinstance(node, ast.Call):
            name, keywords = node.func, node.keywords
            if node.args:
                raise ValueError(text)
        if not isinstance(name, ast.Name):
            raise ValueError(text)
        arguments = tuple((str(keyword.arg), ast.literal_eval(keyword.value)) for keyword in keywords)
    except (SyntaxError, TypeError) as error:
        raise ValueError(text) from error
    if any(key == "None" or key in RESERVED_ARGUMENTS for key, _ in arguments):  # "None": from **{}
        raise ValueError(text)
    return Spec(name.id, arguments, batch, size, FRAMEWORKS[framework])
