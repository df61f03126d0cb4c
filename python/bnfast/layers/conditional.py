"""`ConditionalBatchNormalization` for NumPy: one set of statistics, and one gamma and beta per class of samples.

The kernels compute xhat, and NumPy applies each sample's gamma and beta (per_sample.py). With one class the kernels do
everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .._arguments import checks
from .._arguments.arrays import Array
from .._arguments.axes import Axes
from .batch import Batch
from .batch_norm import BatchNormalization
from .per_sample import check_labels

__all__ = ["ConditionalBatchNormalization"]


class ConditionalBatchNormalization(BatchNormalization):
    """Batch normalization whose gamma and beta depend on each sample's label.

        layer = ConditionalBatchNormalization(10)
        y = layer(x, labels, training=True)
        dx = layer.backward(dy)     # also sets layer.dgamma and layer.dbeta, of shape (10, C)

    The batch statistics and the moving statistics are over all classes; gamma and beta have shape (num_classes, C).
    With s = 1/sqrt(variance + epsilon), g = gamma[label]*dy, and means and sums over all axes except `axis`:

        y[n] = activation(gamma[label[n]]*xhat[n] + beta[label[n]] + residual[n]),  xhat = (x - mean)*s
        dx = s*(g - mean(g) - xhat*mean(g*xhat))
        dgamma[k] = sum(dy*xhat), dbeta[k] = sum(dy), over the samples of class k

    The gradients of a class that is not in the batch are 0. xhat has x's dtype; gamma and beta are applied in float32
    (float64 for float64 x). xhat is kept for `backward`. num_classes=1 has the bits of `BatchNormalization`.

    Args:
        num_classes: the number of classes, 1 or more.
        axis: the channel axis or axes; not 0, the sample axis.
        momentum and all others: those of `BatchNormalization`. An adjustment is applied before gamma and beta.

    Raises:
        ValueError, TypeError: an argument is wrong.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> layer = bnfast.ConditionalBatchNormalization(2, epsilon=0.0)
        >>> layer.build(1)
        >>> layer.gamma[:] = [[1], [10]]
        >>> x, labels = np.array([[1], [3]], np.float32), np.array([0, 1])
        >>> layer(x, labels, training=True)
        array([[-1.],
               [10.]], dtype=float32)

    Source: Dumoulin, Shlens and Kudlur 2017, https://arxiv.org/abs/1610.07629; de Vries et al. 2017,
    https://arxiv.org/abs/1707.00683.
    """

    num_classes: int = 1

    def __init__(
        self,
        num_classes: int,
        axis: int | Sequence[int] = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.2,
        nan_policy: str = "propagate",
        correction: int = 0,
        dtype: Any = None,
        trainable: bool = True,
        virtual_batch_size: int | None = None,
        virtual_batch_grouping: str = "contiguous",
        renorm: bool = False,
        renorm_clipping: Mapping[str, float | None] | None = None,
        renorm_momentum: float = 0.99,
        update_statistics: bool = True,
        use_batch_statistics: bool | None = None,
        trainable_affine: bool = True,
        adjustment: Callable[[tuple[int, ...]], tuple[Any, Any]] | None = None,
    ) -> None:
        self.num_classes = checks.integer("num_classes", num_classes)
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1. Received: {num_classes}")
        if self.num_classes >= 2**63:
            raise ValueError(f"num_classes must be less than 2**63. Received: {num_classes}")
        super().__init__(
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            activation=activation,
            negative_slope=negative_slope,
            nan_policy=nan_policy,
            correction=correction,
            dtype=dtype,
            trainable=trainable,
            virtual_batch_size=virtual_batch_size,
            virtual_batch_grouping=virtual_batch_grouping,
            renorm=renorm,
            renorm_clipping=renorm_clipping,
            renorm_momentum=renorm_momentum,
            update_statistics=update_statistics,
            use_batch_statistics=use_batch_statistics,
            trainable_affine=trainable_affine,
            adjustment=adjustment,
        )

    # labels are required here, which the base class's signature does not have
    def __call__(  # type: ignore[override]
        self, x: Any, labels: Any, training: bool = False, mask: Any = None, residual: Any = None
    ) -> Array:
        """As `BatchNormalization`, with labels: integers in [0, num_classes), of shape (N,) or (N, 1), N = x.shape[0].

        Raises:
            ValueError, TypeError: an argument is wrong; the layer is unchanged (not even built).
            FloatingPointError: nan_policy="raise" and the statistics are not finite; the layer's state is unchanged.
        """
        return self._call(x, training, mask, residual, labels)

    def _batch(self, x: Array, axes: Axes, mask: Any, residual: Any, labels: Any) -> Batch:
        if axes.axes[0] == 0:
            received = f"axis={self.axis} for x of shape {x.shape}"
            raise ValueError(f"axis must not be 0, which is the sample axis. Received: {received}")
        labels = check_labels(labels, self.num_classes, x)
        batch = super()._batch(x, axes, mask, residual, labels)
        if self.num_classes > 1:
            return batch
        gamma, beta = (None if rows is None else rows[0] for rows in (self.gamma, self.beta))
        return batch._replace(gamma=gamma, beta=beta, labels=None)

    def _array_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.num_classes, *shape) if name in ("gamma", "beta") else shape

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as `BatchNormalization.get_config`."""
        return {"num_classes": self.num_classes, **super().get_config()}
