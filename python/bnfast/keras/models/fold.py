"""`fold(model)`: the model for inference, with its batch norms folded into the weights of neighbouring layers.

    a = gamma/sqrt(moving_variance + epsilon), b = beta - a*moving_mean, per channel
    layer -> BN:    a*(x @ kernel + bias) + b  =  x @ (kernel*a) + (bias*a + b)
    BN -> layer:    (a*x + b) @ kernel + bias  =  x @ (a*kernel) + (bias + b @ kernel)
    BN -> ReLU -> layer:      relu(a*x + b)    =  a*max(x, -b/a) + b; the affine part goes into the layer; min where
                                                  a < 0, and both for ReLU6

The last two are exact only where every output sees the whole kernel: Dense, and convolutions without padding. The
arithmetic is float64, rounded once to the dtype of the layer's weights (foldable.py). The given model is only read.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import keras
import numpy as np

from ..layers import bias
from ..layers.batch_norm import KERAS
from .copy import Copier
from .fold_plan import FoldPlan
from .foldable import values
from .graph import Graph, check_call, is_graph, layers, operations, rewire
from .patch import PatchedBatchNormalization
from .text import check_verbose

TOLERANCE = {"float16": 2e-2, "bfloat16": 1e-1}  # of `check`; other dtypes 1e-5


def fold(model: Any, *, check: bool = False, verbose: int = 1) -> Any:
    """A copy of the model for inference in which batch norms are folded into the layers before or after them.

    A batch norm (keras.layers.BatchNormalization or bnfast's) is folded into the layer before it if that is Dense,
    Conv1D/2D/3D, DepthwiseConv1D/2D, SeparableConv1D/2D or Conv1D/2D/3DTranspose with a linear activation, if the
    layer's output goes nowhere else, and if its channels lie along the batch norm's axis. Otherwise it is folded into
    the layer after it, if that is Dense or a convolution without padding. In Functional models that compute in float32
    or float64, a ReLU or ReLU6 may stand between the batch norm and the layer after: it becomes keras.ops.maximum (and
    minimum) with one limit per channel.

    Shared layers, and batch norms that are called in training mode, stay. An activation that was fused into bnfast's
    layer stays as a layer of that name. Batch norms of an accelerated model that stay are Keras's in the copy. It
    computes what `model(x, training=False)` does, up to rounding. It is not compiled; folded layers have biases and
    lose the regularizers and constraints of their weights. If everything folds, the copy holds only Keras's own layers
    and operations.

    Args:
        model: a built Functional or Sequential model. Models nested in it are folded, too. It is never changed.
        check: run both models on random input, and raise if an output differs by more than 1e-5 times its largest
            absolute value, or by more than 1e-5 if that is below 1 (float16 2e-2, bfloat16 1e-1).
        verbose: 1 prints how many batch norms were folded, and for each reason which stay; 2 what became of each; 0
            nothing.

    Raises:
        TypeError: model is not a Keras model.
        ValueError: model isn't built, is subclassed, or has no batch norm; or the check failed.

    Example:
        >>> import keras
        >>> from bnfast.keras import fold
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()])
        >>> [type(layer).__name__ for layer in fold(model, verbose=0).layers]
        ['Dense']

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2.
    """
    check_verbose(verbose)
    _validate(model)
    plan = FoldPlan(model)
    copy = _apply(plan, model)
    if check:
        _check(model, copy)
    if verbose:
        print(plan.summary(model.name, verbose))
    return copy


def _validate(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a Keras model. Received: {type(model).__name__}")
    if not model.built or (type(model) is keras.Sequential and not is_graph(model)):
        raise ValueError(f"model must be built: give it an Input or call it once. Received: {model.name}, not built")
    if not is_graph(model):
        raise ValueError(
            "model must be Functional or Sequential: how layers are connected can't be read from a subclass. "
            f"Received: {model.name}, a {type(model).__name__}"
        )
    if not any(isinstance(layer, KERAS) for layer in layers(model)):
        raise ValueError(f"model has no batch norm to fold. Received: {model.name}")


def _apply(plan: FoldPlan, model: Any) -> Any:
    """The folded copy. A batch norm that is gone is None in the attributes that held it."""
    check_call(model, plan.replacements)
    functions = [getattr(layer, name, None) for layer in layers(model) for name in ("function", "activation")]
    # also those that capture a layer: nothing trains it here
    copier = Copier(compiled=False, shared=[each for each in functions if isinstance(each, FunctionType)])
    for operation in operations(model):
        if id(operation) in plan.replacements:
            first = next(iter(plan.replacements[id(operation)]), None)
            copier.pair(operation, first if isinstance(first, keras.layers.Layer) else None)
    copy = copier.duplicate(model)
    for foldable in plan.folded:
        foldable.assign_to(copier.of(foldable.layer))
    rewire(copier, plan.replacements)
    for layer in layers(copy):
        bias.release(layer)
        if type(layer) is PatchedBatchNormalization:  # one that stays: the copy is for inference, which is Keras's
            layer.release()
    return copy


def _check(model: Any, copy: Any) -> None:
    rng = np.random.default_rng(0)
    inputs = keras.tree.map_structure(lambda tensor: _random(tensor, rng), Graph(model).inputs)
    pairs = zip(*(keras.tree.flatten(each(inputs, training=False)) for each in (model, copy)), strict=True)
    tolerance = max(TOLERANCE.get(layer.compute_dtype, 1e-5) for layer in layers(model))
    for index, (wanted, folded) in enumerate((values(wanted), values(folded)) for wanted, folded in pairs):
        allowed = tolerance * max(1.0, float(np.abs(wanted).max(initial=0)))
        difference = np.abs(wanted - folded)
        if not (difference <= allowed).all():
            raise ValueError(
                f"check: output {index} of the folded model must be within {allowed:.3g} of the original's. "
                f"Received: a difference of {difference.max():.3g}"
            )


def _random(tensor: Any, rng: np.random.Generator) -> np.ndarray:
    """Random values for a model input: a batch of 4; other unknown extents are 64; integers are 0 or 1."""
    if tensor.dtype == "string":
        raise ValueError(f"check can make only numbers. Received: an input of strings, {tensor.name}")
    first, *rest = tensor.shape
    shape = (first or 4, *(extent or 64 for extent in rest))
    kind = keras.backend.standardize_dtype(tensor.dtype)
    random = rng.normal(size=shape) if "float" in kind else rng.integers(0, 2, size=shape)
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(random, kind)))
