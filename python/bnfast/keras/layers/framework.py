"""The framework under the Keras layers: every function of theirs that depends on Keras's backend comes from here.

On the backend "tensorflow" these are functions of bnfast.tensorflow; on "torch" and "jax" those of the same names in
`portable`, written over keras.ops. No other file of this folder imports bnfast.tensorflow, and none imports TensorFlow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from ...tensorflow import op_library

BACKEND: str = keras.backend.backend()
BRIDGES = op_library.BRIDGES
ON_TENSORFLOW = BACKEND == "tensorflow"
FUSES = BACKEND in ("tensorflow", "jax")  # what follows a batch norm, while a program is traced
BACKENDS = ("tensorflow", "torch", "jax")

if BACKEND not in BACKENDS:
    raise ImportError(
        f"bnfast.keras needs Keras on one of the backends {', '.join(BACKENDS)} (KERAS_BACKEND). Received: {BACKEND}"
    )

if TYPE_CHECKING or ON_TENSORFLOW:
    from ...tensorflow import conditional, folding, fusion, group_norm, inference, op, scalars, weight_norm, worth
    from ...tensorflow.axes import Axes
    from ...tensorflow.batch import Batch, Options, as_input, parameter
    from ...tensorflow.mode import Mode, is_training, may_train
    from ...tensorflow.reference import SMOOTH
    from ...tensorflow.training import adjustment, bias, ghosts, renorm
    from ...tensorflow.training.core import NAN_POLICIES
    from ...tensorflow.training.step import Policy, step
    from ...tensorflow.training.synchronized import replicas
else:
    from .portable import adjustment, conditional, ghosts, group_norm, renorm, scalars, weight_norm
    from .portable import nothing_fused as bias
    from .portable import nothing_fused as folding
    from .portable import nothing_fused as inference
    from .portable.axes import Axes
    from .portable.batch import Batch, Options, as_input, parameter
    from .portable.core import NAN_POLICIES
    from .portable.mode import Mode, is_training, may_train
    from .portable.reference import SMOOTH
    from .portable.step import Policy, replicas, step

    if BACKEND == "jax":
        from .portable import jax_fusion as fusion
    else:
        from .portable import nothing_fused as fusion

__all__ = [
    "BACKEND",
    "BACKENDS",
    "BRIDGES",
    "FUSES",
    "NAN_POLICIES",
    "ON_TENSORFLOW",
    "SMOOTH",
    "Axes",
    "Batch",
    "Mode",
    "Options",
    "Policy",
    "adjustment",
    "as_input",
    "bias",
    "check_tensorflow",
    "choose_bridge",
    "conditional",
    "count_dtype",
    "folding",
    "fusion",
    "ghosts",
    "group_norm",
    "inference",
    "is_training",
    "may_train",
    "note_updates",
    "parameter",
    "register",
    "renorm",
    "replicas",
    "scalars",
    "step",
    "supports_jit",
    "weight_norm",
    "why_slower",
]


def _kernels() -> Any:
    from .portable import kernels

    return kernels


def supports_jit(bridge: str) -> bool:
    """Whether Keras may compile a layer with this bridge: XLA has no kernel for bnfast's bridges to TensorFlow.

    Raises:
        ValueError: the word names no bridge.
    """
    if ON_TENSORFLOW:
        return op.on_own_ops(bridge)
    op_library.wanted(bridge)
    return True


def choose_bridge(bridge: str) -> str:
    """What computes: a word of BRIDGES on TensorFlow; elsewhere the backend, or "keras.ops" if it has no kernels here.

    Raises:
        RuntimeError, ValueError: those of bnfast.tensorflow.op.choose.
    """
    if ON_TENSORFLOW:
        return op.choose(bridge)
    op_library.wanted(bridge)
    name: str = _kernels().name()
    return name


def why_slower(shape: tuple[int | None, ...] | None, dtype: str, bridge: str) -> str | None:
    """Why a layer with inputs of this shape would not gain by bnfast; or None."""
    return worth.why_slower(shape, dtype, bridge) if ON_TENSORFLOW else _kernels().framework().absent()


def note_updates(y: Any, variables: list[Any]) -> None:
    """Tells the fusion on JAX that these variables have got the moving mean and variance of the call that made y."""
    if BACKEND == "jax":
        from .portable import jax_fusion

        jax_fusion.updated(y, variables)


def count_dtype() -> str:
    """The dtype of a weight that counts."""
    return "int64" if ON_TENSORFLOW else _kernels().count_dtype()


def register() -> None:
    """Loads bnfast's TensorFlow op, so that a SavedModel with a training signature can be loaded."""
    if ON_TENSORFLOW:
        op.register()


def check_tensorflow(name: str) -> None:
    """Raises RuntimeError if Keras doesn't run on TensorFlow, for what only TensorFlow has."""
    if not ON_TENSORFLOW:
        raise RuntimeError(
            f"bnfast.keras.{name} needs the TensorFlow backend of Keras (KERAS_BACKEND=tensorflow). Received: {BACKEND}"
        )
