"""The framework under the Keras layers: every function of theirs that depends on Keras's backend comes from here.

No other file of this folder imports bnfast.tensorflow, and none imports TensorFlow. Another backend provides the same
names; `check_backend` then lets it pass.
"""

from __future__ import annotations

import keras

from ...tensorflow import conditional, folding, fusion, group_norm, inference, scalars, weight_norm
from ...tensorflow.axes import Axes
from ...tensorflow.batch import Batch, Options, as_input, parameter
from ...tensorflow.mode import Mode, is_training, may_train
from ...tensorflow.op import BRIDGES, on_own_ops
from ...tensorflow.reference import SMOOTH
from ...tensorflow.training import adjustment, bias, ghosts, renorm
from ...tensorflow.training.core import NAN_POLICIES
from ...tensorflow.training.step import Policy, step
from ...tensorflow.training.synchronized import replicas

__all__ = [
    "BRIDGES",
    "NAN_POLICIES",
    "SMOOTH",
    "Axes",
    "Batch",
    "Mode",
    "Options",
    "Policy",
    "adjustment",
    "as_input",
    "bias",
    "check_backend",
    "conditional",
    "folding",
    "fusion",
    "ghosts",
    "group_norm",
    "inference",
    "is_training",
    "may_train",
    "on_own_ops",
    "parameter",
    "renorm",
    "replicas",
    "scalars",
    "step",
    "weight_norm",
]


def check_backend(name: str) -> None:
    """Raises RuntimeError if Keras runs on a backend that the layer of this name doesn't support."""
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            f"bnfast.keras.{name} needs the TensorFlow backend of Keras (KERAS_BACKEND=tensorflow). "
            f"Received: {keras.backend.backend()}"
        )
