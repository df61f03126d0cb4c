"""`ConditionalBatchNormalization`: one set of statistics, and a gamma and a beta for each class of samples.

    y[n] = activation(gamma[label[n]]*xhat[n] + beta[label[n]]),  xhat = (x - mean)/sqrt(variance + epsilon)

The kernels make xhat, in x's dtype; what depends on the sample is TensorFlow's ops after that, in float32 (float64 for
float64 x): one more pass over x each way. With one class there is nothing to choose, and the kernels do all of it.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from ..._arguments import checks as _checks
from ...tensorflow import reference as formula
from .batch_norm import BatchNormalization


@keras.saving.register_keras_serializable(package="bnfast")
class ConditionalBatchNormalization(BatchNormalization):
    """Batch normalization whose gamma and beta depend on each sample's label.

    The mean and variance are the whole batch's, and so are the moving statistics; gamma and beta have shape
    (num_classes, C). With s = 1/sqrt(variance + epsilon) and g = gamma[label]*dy, means and sums over all but `axis`:

        y[n] = activation(gamma[label[n]]*xhat[n] + beta[label[n]])
        dx = s*(g - mean(g) - xhat*mean(g*xhat));  dgamma[k] = sum(dy*xhat), dbeta[k] = sum(dy) over the samples of k

    A class that isn't in the batch has gradients of 0. num_classes=1 is `bnfast.keras.BatchNormalization`, bit by bit.

    Args:
        num_classes: the number of classes, 1 or more.
        axis: one axis, that of the channels; not 0, the samples'.
        others: those of `bnfast.keras.BatchNormalization`. An adjustment comes before gamma and beta here too.

    Call arguments:
        inputs: [x, labels]; labels are integers of shape (N,) or (N, 1) in [0, num_classes). x or [x] alone will do
            where gamma and beta are given or absent (scale=False, center=False).
        gamma, beta: None, or tensors of shape (N, C) or (C,) that take the place of this layer's own in this call (the
            output of a Dense layer, say). Gradients reach them. Keras casts them to the policy's compute dtype.
        training, mask: as there; mask is x's own, or a list of which the first, x's, counts.

    Labels out of range: ValueError in eager mode, tf.errors.InvalidArgumentError in a graph; in either nothing was
    updated before.

    Raises:
        ValueError, TypeError: an argument out of range, of the wrong shape or type; and all that BatchNormalization
            raises.

    Source: Dumoulin, Shlens and Kudlur 2017, arXiv:1610.07629; de Vries et al. 2017, arXiv:1707.00683.
    """

    def __init__(self, num_classes: int, axis: int = -1, momentum: float | None = 0.99, *args: Any, **kwargs: Any):
        if isinstance(axis, (list, tuple)) and len(axis) != 1:
            raise ValueError(f"axis must be one axis. Received: {axis}")
        super().__init__(axis, momentum, *args, **kwargs)
        self.num_classes = _checks.integer("num_classes", num_classes)
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1. Received: {num_classes}")

    def build(self, input_shape: Any) -> None:
        shape = _first(input_shape)
        if self.axis in (0, -len(shape)):
            raise ValueError(f"axis must not be 0, the samples'. Received: axis={self.axis} for x of shape {shape}")
        super().build(shape)
        self.input_spec = None  # one tensor or two: `call` looks

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("name") in ("gamma", "beta"):
            kwargs["shape"] = (self.num_classes, *kwargs["shape"])
        return super().add_weight(*args, **kwargs)

    def call(self, inputs: Any, training: Any = None, mask: Any = None, gamma: Any = None, beta: Any = None) -> Any:
        x, labels = _split(inputs)
        self._check_x(x)
        channels = x.shape[self.axis]
        for name, given, used in (("gamma", gamma, self.scale), ("beta", beta, self.center)):
            _check_given(name, given, used, x, channels)
        if labels is not None:
            x, labels = self._checked(x, labels)
        elif (self.scale and gamma is None) or (self.center and beta is None):
            raise ValueError("inputs must be [x, labels] unless gamma and beta are given. Received: no labels")
        mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        if mask is None:  # Keras hands masks on to calls with one argument of tensors only
            mask = getattr(_split(inputs)[0], "_keras_mask", None)
        if self.num_classes == 1 and gamma is None and beta is None:
            return self._call(x, None, training, mask)
        xhat = self._call(x, None, training, mask, affine=False)
        y = tf.cast(xhat, formula.compute_dtype(xhat))
        if self.scale:
            y *= self._spread(self.gamma if gamma is None else gamma, gamma is None, labels, y)
        if self.center:
            y += self._spread(self.beta if beta is None else beta, beta is None, labels, y)
        return tf.cast(self.activation(tf.cast(y, self.compute_dtype)), self.compute_dtype)

    def _check_x(self, x: tf.Tensor) -> None:
        rank, channels = x.shape.rank, self.moving_mean.shape[0]
        if not -rank <= self.axis < rank or self.axis in (0, -rank) or x.shape[self.axis] not in (None, channels):
            raise ValueError(f"x must have {channels} channels along axis {self.axis}. Received: shape {x.shape}")

    def _checked(self, x: tf.Tensor, labels: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """x, which in a graph now waits for the check of the labels, and the labels, (N,)."""
        labels = tf.convert_to_tensor(labels)
        if not labels.dtype.is_integer:
            raise TypeError(f"labels must have an integer dtype. Received: {labels.dtype.name}")
        extents = labels.shape
        if extents.rank not in (1, 2) or extents[1:] not in ([], [1], [None]) or not _fit(extents[0], x.shape[0]):
            raise ValueError(f"labels must have shape (N,) or (N, 1) with N = {x.shape[0]}. Received: {extents}")
        labels = tf.reshape(labels, [-1])
        wanted = f"labels must be in [0, {self.num_classes})"
        if tf.executing_eagerly():
            wrong = tf.boolean_mask(labels, (labels < 0) | (labels >= self.num_classes)).numpy()
            if wrong.size:
                raise ValueError(f"{wanted}. Received: {wrong[0]}")
            return x, labels
        wide = tf.cast(labels, tf.int64)
        checks = [
            tf.debugging.assert_non_negative(wide, message=wanted),
            tf.debugging.assert_less(wide, tf.constant(self.num_classes, tf.int64), message=wanted),
        ]
        with tf.control_dependencies([check for check in checks if check is not None]):
            return tf.identity(x), tf.identity(labels)

    def _spread(self, values: Any, own: bool, labels: tf.Tensor | None, y: tf.Tensor) -> tf.Tensor:
        """Values for each class (own) or given ones, as they broadcast to y."""
        values = tf.convert_to_tensor(values)
        if own:
            assert labels is not None
            values = _of_class(tf.cast(values, y.dtype), labels, self.num_classes)
        axis = self._axes[0] % y.shape.rank
        if values.shape.rank == 1:
            return formula.per_channel(values, y, axis)
        places = (slice(None), *[None] * (axis - 1), slice(None), *[None] * (y.shape.rank - axis - 1))
        return tf.cast(values, y.dtype)[places]

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        return previous_mask[0] if isinstance(previous_mask, (list, tuple)) else previous_mask

    def compute_output_shape(self, input_shape: Any) -> Any:
        return super().compute_output_shape(_first(input_shape))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "num_classes": self.num_classes}


def _of_class(table: tf.Tensor, labels: tf.Tensor, classes: int) -> tf.Tensor:
    """table[labels], with a dense gradient: few optimizers and clippings treat tf.gather's sparse one the same."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def look_up(table: tf.Tensor) -> Any:
        return tf.gather(table, labels), lambda upstream: tf.math.unsorted_segment_sum(upstream, labels, classes)

    return look_up(table)


def _split(inputs: Any) -> tuple[tf.Tensor, Any]:
    """x, and the labels or None."""
    parts = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    if len(parts) not in (1, 2):
        raise ValueError(f"inputs must be [x, labels], [x] or x. Received: {len(parts)} tensors")
    return parts[0], parts[1] if len(parts) == 2 else None


def _first(shapes: Any) -> Any:
    """The shape of x, of that of x alone or of a list of shapes."""
    nested = len(shapes) > 0 and isinstance(shapes[0], (list, tuple))
    if nested and len(shapes) not in (1, 2):
        raise ValueError(f"inputs must be [x, labels], [x] or x. Received: {len(shapes)} tensors")
    return tuple(shapes[0] if nested else shapes)


def _check_given(name: str, values: Any, used: bool, x: tf.Tensor, channels: int) -> None:
    """The errors of a gamma or beta that came with the call."""
    if values is None:
        return
    if not used:
        switch = {"gamma": "scale", "beta": "center"}[name]
        raise ValueError(f"{name} must be None with {switch}=False. Received: shape {values.shape}")
    shape = values.shape
    rows = x.shape[0] if len(shape) == 2 else None
    if len(shape) not in (1, 2) or not _fit(shape[-1], channels) or not _fit(shape[0] if rows else None, rows):
        wanted = f"({x.shape[0]}, {channels}) or ({channels},)"
        raise ValueError(f"{name} must have shape {wanted} for x of shape {x.shape}. Received: {shape}")


def _fit(extent: int | None, wanted: int | None) -> bool:
    return extent is None or wanted is None or extent == wanted
