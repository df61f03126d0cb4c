"""`accelerate(model)`: the same model, whose batch norms bnfast computes.

Nothing changes but classes: that of each batch norm, and that of a convolution whose bias a batch norm takes away
again. Layers, names, order, weights, paths and tensors stay, so whatever addresses them goes on working.
What follows a batch norm is fused with it when a graph is traced (tensorflow/fusion.py).
"""

from __future__ import annotations

from typing import Any

from ..layers import bias
from .copy import duplicate
from .norms import check_model, norms, reset_compiled_functions, scalars
from .patch import PatchedBatchNormalization, uses_bnfast
from .report import report, shape_of, why_unchanged
from .text import check_verbose

_RETURNED = "The model that accelerate returned is the fast one: train it. The given model is unchanged."
_CHANGED = "The given model is now the fast one."


def accelerate(
    model: Any, *, inplace: bool = False, strict: bool = False, bridge: str = "auto", verbose: int = 1
) -> Any:
    """The same model, trained on bnfast's kernels: equal layers, names, weights, tensors and gradients.

    Each keras.layers.BatchNormalization (exactly that class) gets a class of bnfast's with that name. Where a model is
    traced (`fit`, `train_on_batch`, tf.function), Keras's ReLU, ReLU6, LeakyReLU and Add, as layers, keras.ops or
    keras.activations, that follow a batch norm in training become one pass over memory with it. The tensors in between
    still exist for whoever reads them: `Model(model.inputs, layer.output)`, gradients, hooks of your own.

    If a batch norm reads the output of a convolution, the gradient of that layer's bias is 0 in training, because the
    batch's mean takes the bias away again. The layer is changed so that TensorFlow doesn't sum a gradient over all
    pixels to find this (2 % of a ResNet50 step). Where anything else reads the layer, it sums.

    Files of the model (`save`, `save_weights`, `export`) hold Keras's own layers and open without bnfast; accelerate
    the model again after loading it. `bnfast.keras.report(model)` lists each batch norm; `to_keras` is the way back.

    Args:
        model: a built model: Functional, Sequential or subclassed. It may contain nested models. It is not changed.
        inplace: True changes the given model and returns it, without a second copy of its weights.
        strict: raise if a batch norm would stay on Keras's layer, before anything is changed.
        bridge: how TensorFlow calls the kernels, as in `bnfast.keras.BatchNormalization`.
        verbose: 1 prints the report with one line per group of layers that are alike, 2 with one per layer, 0 nothing.

    Returns:
        The new model, compiled if the model was: optimizer with its slots and iterations, losses and metrics. Training
        one of the two models doesn't change the other. A model compiled with jit_compile=True continues without XLA,
        which can't call the kernels.

    Raises:
        TypeError: not a keras.Model.
        ValueError: the model has no batch norm or isn't built; something in it can't be copied (inplace=True needs no
            copy); strict=True and a batch norm stays on Keras's layer. The message names the layer.

    Example:
        >>> import keras
        >>> from bnfast.keras import accelerate, uses_bnfast
        >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.BatchNormalization()])
        >>> fast = accelerate(model, verbose=False)
        >>> uses_bnfast(fast), uses_bnfast(model)
        (True, False)
    """
    check_verbose(verbose)
    check_model(model)
    found = list(norms(model))
    if not found:
        raise ValueError(f"model {model.name} has no batch norm: there is nothing to accelerate")
    reasons = [None if uses_bnfast(norm) else why_unchanged(norm, shape_of(norm), bridge) for norm in found]
    if strict:
        for norm, reason in zip(found, reasons, strict=True):
            if reason is not None:
                name = norm.path or norm.name
                raise ValueError(f"strict=True, and batch norm {name} stays on Keras's layer: {reason}")
    if not inplace:
        model = duplicate(model, shared=scalars(found))
        found = list(norms(model))
    for norm, reason in zip(found, reasons, strict=True):
        if reason is None and not uses_bnfast(norm):
            PatchedBatchNormalization.adopt(norm, bridge)
            for node in norm._inbound_nodes:
                bias.adopt(node.input_tensors[0]._keras_history.operation)
    reset_compiled_functions(model)
    if verbose:
        print(report(model).text(verbose))
        print(_CHANGED if inplace else _RETURNED)
    return model
