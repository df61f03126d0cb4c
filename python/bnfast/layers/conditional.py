"""`ConditionalBatchNormalization` for NumPy: one set of statistics, and a gamma and a beta for each class of samples.

The kernels make xhat; what depends on the sample is NumPy's, after that (_per_sample.py). With one class there is
nothing to choose, and the kernels do all of it.
"""

from __future__ import annotations

from typing import Any

from .._arguments import checks as _checks
from .._arguments.arrays import Array
from .._arguments.axes import Axes
from . import per_sample as _per_sample
from .batch import Batch
from .batch_norm import BatchNormalization

__all__ = ["ConditionalBatchNormalization"]


class ConditionalBatchNormalization(BatchNormalization):
    """Batch normalization whose gamma and beta depend on each sample's label.

        layer = ConditionalBatchNormalization(10)
        y = layer(x, labels, training=True)
        dx = layer.backward(dy)     # and sets layer.dgamma and layer.dbeta, (10, C)

    The mean and variance are the whole batch's, and so are the moving statistics; gamma and beta have shape
    (num_classes, C). With s = 1/sqrt(variance + epsilon) and g = gamma[label]*dy, means and sums over all but `axis`:

        y[n] = activation(gamma[label[n]]*xhat[n] + beta[label[n]] + residual[n]),  xhat = (x - mean)*s
        dx = s*(g - mean(g) - xhat*mean(g*xhat));  dgamma[k] = sum(dy*xhat), dbeta[k] = sum(dy) over the samples of k

    A class that isn't in the batch has gradients of 0. xhat has x's dtype; gamma and beta are applied in float32
    (float64 for float64 x), and xhat is kept for `backward`. num_classes=1 is `BatchNormalization`, bit by bit.

    Args:
        num_classes: the number of classes, 1 or more.
        others: those of `BatchNormalization`; axis not 0, the samples'. An adjustment comes before gamma and beta.

    Raises:
        ValueError, TypeError: an argument out of range, of the wrong shape or type.

    Source: Dumoulin, Shlens and Kudlur 2017, arXiv:1610.07629; de Vries et al. 2017, arXiv:1707.00683.
    """

    num_classes: int = 1

    def __init__(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        self.num_classes = _checks.integer("num_classes", num_classes)
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1. Received: {num_classes}")
        super().__init__(*args, **kwargs)

    # Unlike the plain layer's, this call can't do without labels.
    def __call__(  # type: ignore[override]
        self, x: Any, labels: Any, training: bool = False, mask: Any = None, residual: Any = None
    ) -> Array:
        """As `BatchNormalization`. labels: integers of shape (N,) or (N, 1), N being x.shape[0], in [0, num_classes).

        Raises:
            ValueError, TypeError: an argument is wrong; the layer is unchanged (not even built).
            FloatingPointError: nan_policy="raise" met non-finite statistics; the layer's state is unchanged.
        """
        return self._call(x, training, mask, residual, labels)

    def _batch(self, x: Array, axes: Axes, mask: Any, residual: Any, labels: Any) -> Batch:
        if axes.axes[0] == 0:
            raise ValueError(f"axis must not be 0, the samples'. Received: axis={self.axis} for x of shape {x.shape}")
        labels = _per_sample.check_labels(labels, self.num_classes, x)
        batch = super()._batch(x, axes, mask, residual, labels)
        if self.num_classes > 1:
            return batch
        gamma, beta = (None if rows is None else rows[0] for rows in (self.gamma, self.beta))
        return batch._replace(gamma=gamma, beta=beta, labels=None)

    def _shape_of(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.num_classes, *shape) if name in ("gamma", "beta") else shape

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as `BatchNormalization.get_config`."""
        return {"num_classes": self.num_classes, **super().get_config()}
