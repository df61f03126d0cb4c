"""`BatchNormalizationAdd`: the end of a residual block in one layer, y = activation(batch_norm(x) + residual).

The kernels add and activate in their apply step: neither the normalized tensor nor the sum is stored. The gradient of
the residual is computed in the same pass as dx; without an activation it is dy itself.
"""

from __future__ import annotations

from typing import Any

import keras

from .batch_norm import BatchNormalization
from .framework import step


@keras.saving.register_keras_serializable(package="bnfast")
class BatchNormalizationAdd(BatchNormalization):
    """Batch normalization of one tensor, plus a second tensor that is added before the activation.

        y = activation(gamma*(x - mean)/sqrt(variance + epsilon) + beta + residual)

    Arguments are those of `bnfast.keras.BatchNormalization`.

    Call arguments:
        inputs: [x, residual], two float tensors of one shape.
        training, mask: as for BatchNormalization. mask is that of x, or a list of the masks of x and the residual, of
            which the first is used.

    The mask of the output is that of keras.layers.Add: the union of both masks, or None if one of them is None.

    Raises:
        ValueError: inputs are not two tensors of one shape. And everything that BatchNormalization raises.

    Example:
        >>> import numpy as np
        >>> from bnfast.keras import BatchNormalizationAdd
        >>> x, residual = np.array([[1.0], [5.0]], "float32"), np.array([[3.0], [-4.0]], "float32")
        >>> BatchNormalizationAdd(epsilon=0.0, activation="relu")([x, residual], training=True).numpy()
        array([[2.],
               [0.]], dtype=float32)

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167; He, Zhang, Ren and Sun 2016, arXiv:1512.03385.
    """

    def build(self, input_shape: Any) -> None:
        shape, _ = _both_shapes(input_shape)
        super().build(shape)
        self.input_spec = [self.input_spec] * 2

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        x, residual = inputs
        mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        arguments, finish = self._prepare(x, training, mask, residual)
        return finish(*step(*arguments))

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        masks = previous_mask if isinstance(previous_mask, (list, tuple)) else [None]
        if any(mask is None for mask in masks):
            return None
        return keras.ops.logical_or(*masks)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return super().compute_output_shape(_both_shapes(input_shape)[0])


def _both_shapes(shapes: Any) -> tuple[Any, Any]:
    """The shapes of x and of the residual."""
    if isinstance(shapes, (list, tuple)) and len(shapes) == 2 and all(isinstance(s, (list, tuple)) for s in shapes):
        x, residual = (tuple(shape) for shape in shapes)
        if len(x) == len(residual) and all(None in (m, n) or m == n for m, n in zip(x, residual, strict=True)):
            return x, residual
    raise ValueError(f"inputs must be [x, residual], two tensors of one shape. Received: shapes {shapes}")
