"""`save(model, path)`: a file that opens without bnfast."""

from __future__ import annotations

from typing import Any

from ..layers.reader import save_assets
from .graph import layers
from .norms import OURS, RELATIVES, check_model
from .patch import PatchedBatchNormalization
from .to_keras import to_keras


def save(model: Any, path: Any, *, overwrite: bool = True) -> None:
    """Save a model with Keras's own layers alone, so that keras.models.load_model opens the file without bnfast.

    A model that was accelerated or patched is saved as it is: its files name Keras's layers anyway. One that was built
    of `bnfast.keras` layers is converted first, as `to_keras` does; the model itself stays as it is.

    Args:
        model: a built keras.Model.
        path: where to, as for `model.save`: a name that ends in .keras.
        overwrite: whether to replace a file that is there. False asks.

    Raises:
        TypeError: not a keras.Model.
        ValueError: the model isn't built, or has a layer or an option that Keras lacks (ConditionalBatchNormalization,
            WeightNormalization, momentum=None, several axes ...). The message names it. Nothing is written.

    Example:
        >>> import keras, tempfile
        >>> import bnfast.keras
        >>> model = keras.Sequential([keras.Input((4,)), bnfast.keras.BatchNormalization(activation="relu")])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bnfast.keras.save(model, f"{folder}/plain.keras")
        ...     loaded = keras.models.load_model(f"{folder}/plain.keras")
        >>> [type(layer).__module__.split(".")[0] for layer in loaded.layers]
        ['keras', 'keras']
    """
    check_model(model)
    kinds = {*OURS, *RELATIVES} - {PatchedBatchNormalization}
    plain = to_keras(model) if any(type(layer) in kinds for layer in layers(model)) else model
    left = [layer for layer in layers(plain) if getattr(type(layer), "save_assets", None) is save_assets]
    if left:
        names = ", ".join(f"{layer.name} ({type(layer).__name__})" for layer in left[:3])
        raise ValueError(f"model {model.name} has layers without a counterpart in Keras: {names}")
    plain.save(path, overwrite=overwrite)
