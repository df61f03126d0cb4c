"""`ConditionalBatchNormalization`: one set of statistics, and a gamma and a beta for each class of samples.

    y[n] = activation(gamma[label[n]]*xhat[n] + beta[label[n]]),  xhat = (x - mean)/sqrt(variance + epsilon)

The kernels compute xhat in the dtype of x. The framework's own ops then apply gamma and beta per sample, in float32
(float64 for float64 x): one more pass over x each way. With a single class the kernels do everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from ..._arguments import checks
from . import masks
from .batch_norm import BatchNormalization
from .framework import adjustment as adjustments
from .framework import conditional, step


@keras.saving.register_keras_serializable(package="bnfast")
class ConditionalBatchNormalization(BatchNormalization):
    """Batch normalization whose gamma and beta depend on each sample's label.

    Mean, variance and moving statistics are those of the whole batch; gamma and beta have shape (num_classes, C). With
    s = 1/sqrt(variance + epsilon) and g = gamma[label]*dy, and with means and sums over all axes but `axis`:

        y[n] = activation(gamma[label[n]]*xhat[n] + beta[label[n]])
        dx = s*(g - mean(g) - xhat*mean(g*xhat));  dgamma[k] = sum(dy*xhat), dbeta[k] = sum(dy) over the samples of k

    A class that isn't in the batch gets gradients of 0. num_classes=1 gives the bits of
    `bnfast.keras.BatchNormalization`.

    Args:
        num_classes: the number of classes, 1 or more.
        axis: the channel axis, a single one; not 0, the axis of the samples.
        momentum and all others: those of `bnfast.keras.BatchNormalization`. An adjustment is applied before gamma and
            beta here, too.

    Call arguments:
        inputs: [x, labels]; labels are integers of shape (N,) or (N, 1) in [0, num_classes). x or [x] is enough if
            gamma and beta are given or switched off (scale=False, center=False).
        gamma, beta: None, or tensors of shape (N, C) or (C,) that replace the layer's own in this call (for example the
            output of a Dense layer). Gradients reach them. Keras casts them to the policy's compute dtype.
        training, mask: as for BatchNormalization. mask is that of x, or a list whose first entry is that of x.

    A label out of range is a ValueError in eager mode and a tf.errors.InvalidArgumentError in a graph; in both cases
    nothing is updated before. Where JAX compiles the call, it can't raise: the sample's y is NaN.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong shape or type. And everything that
            BatchNormalization raises.

    Example:
        >>> import numpy as np
        >>> from bnfast.keras import ConditionalBatchNormalization
        >>> layer = ConditionalBatchNormalization(2, epsilon=0.0)
        >>> layer.build([(None, 1), (None,)])
        >>> _ = layer.gamma.assign([[1.0], [10.0]])
        >>> x, labels = np.array([[1.0], [3.0]], "float32"), np.array([0, 1])
        >>> layer([x, labels], training=True).numpy()
        array([[-1.],
               [10.]], dtype=float32)

    Source: Dumoulin, Shlens and Kudlur 2017, arXiv:1610.07629; de Vries et al. 2017, arXiv:1707.00683.
    """

    def __init__(
        self,
        num_classes: int,
        axis: int = -1,
        momentum: Any = 0.99,
        epsilon: Any = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: Mapping[str, Any] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        activation: Any = None,
        correction: int = 0,
        nan_policy: str = "propagate",
        update_statistics: bool = True,
        use_batch_statistics: bool | None = None,
        trainable_affine: bool = True,
        virtual_batch_size: int | None = None,
        virtual_batch_grouping: str = "contiguous",
        adjustment: adjustments.Adjustment | None = None,
        bridge: str = "auto",
        fused: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(axis, (list, tuple)) and len(axis) != 1:
            raise ValueError(f"axis must be one axis. Received: {axis}")
        super().__init__(
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            renorm=renorm,
            renorm_clipping=renorm_clipping,
            renorm_momentum=renorm_momentum,
            synchronized=synchronized,
            activation=activation,
            correction=correction,
            nan_policy=nan_policy,
            update_statistics=update_statistics,
            use_batch_statistics=use_batch_statistics,
            trainable_affine=trainable_affine,
            virtual_batch_size=virtual_batch_size,
            virtual_batch_grouping=virtual_batch_grouping,
            adjustment=adjustment,
            bridge=bridge,
            fused=fused,
            **kwargs,
        )
        self.num_classes = checks.integer("num_classes", num_classes)
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1. Received: {num_classes}")

    def build(self, input_shape: Any) -> None:
        shape = _first(input_shape)
        if self.axis in (0, -len(shape)):
            raise ValueError(f"axis must not be 0, the samples'. Received: axis={self.axis} for x of shape {shape}")
        super().build(shape)
        self.input_spec = None  # `call` accepts one tensor or two

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
            x, labels = conditional.check_labels(x, labels, self.num_classes)
        elif (self.scale and gamma is None) or (self.center and beta is None):
            raise ValueError("inputs must be [x, labels] unless gamma and beta are given. Received: no labels")
        mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        if mask is None:  # Keras passes masks only to calls whose one argument is tensors
            mask = masks.attached(_split(inputs)[0])
        uniform = self.num_classes == 1 and gamma is None and beta is None
        arguments, finish = self._prepare(x, training, mask, affine=uniform)
        xhat = finish(*step(*arguments))
        if uniform:
            return xhat
        gamma = self._of_samples(self.gamma, labels, xhat) if self.scale and gamma is None else gamma
        beta = self._of_samples(self.beta, labels, xhat) if self.center and beta is None else beta
        y = conditional.apply(xhat, gamma, beta, self._axes[0], self.compute_dtype)
        return keras.ops.cast(self.activation(y), self.compute_dtype)

    def _of_samples(self, table: Any, labels: Any, x: Any) -> Any:
        return conditional.of_samples(table, labels, self.num_classes, x)

    def _check_x(self, x: Any) -> None:
        rank, channels, (axis,) = len(x.shape), self.moving_mean.shape[0], self._axes
        if not -rank <= axis < rank or axis in (0, -rank) or x.shape[axis] not in (None, channels):
            raise ValueError(f"x must have {channels} channels along axis {axis}. Received: shape {x.shape}")

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        return previous_mask[0] if isinstance(previous_mask, (list, tuple)) else previous_mask

    def compute_output_shape(self, input_shape: Any) -> Any:
        return super().compute_output_shape(_first(input_shape))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "num_classes": self.num_classes}


def _split(inputs: Any) -> tuple[Any, Any]:
    """x, and the labels or None."""
    parts = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    if len(parts) not in (1, 2):
        raise ValueError(f"inputs must be [x, labels], [x] or x. Received: {len(parts)} tensors")
    return parts[0], parts[1] if len(parts) == 2 else None


def _first(shapes: Any) -> Any:
    """The shape of x, given as that shape or as a list of shapes."""
    nested = len(shapes) > 0 and isinstance(shapes[0], (list, tuple))
    if nested and len(shapes) not in (1, 2):
        raise ValueError(f"inputs must be [x, labels], [x] or x. Received: {len(shapes)} tensors")
    return tuple(shapes[0] if nested else shapes)


def _check_given(name: str, values: Any, used: bool, x: Any, channels: int) -> None:
    """Raises the errors of a gamma or beta that was passed to the call."""
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
