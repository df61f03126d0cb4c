"""Moving statistics computed anew from the moments of batches, in float64.

    "population"   mean and variance of all values together (Chan's merge): what a long average of large batches tends
                   to. The default.
    "average"      the plain average over the batches of their means and of their variances, every batch counting the
                   same, as torch.optim.swa_utils.update_bn does. With few values per batch the variance is smaller than
                   the population's: by the variance of the batch means.

correction=1 makes the variance the sample variance, W/(W - 1) times the population's: of all values ("population") or
of each batch ("average"). Batches without values are left out.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ..functional.moments import Moments

__all__ = ["ESTIMATORS", "Estimate", "check_estimator"]

ESTIMATORS = ("population", "average")

Vector = npt.NDArray[np.float64]


def check_estimator(estimator: object) -> None:
    """Raises ValueError unless it is one of ESTIMATORS."""
    if estimator not in ESTIMATORS:
        raise ValueError(f'estimator must be "population" or "average". Received: {estimator!r}')


class Estimate:
    """The statistics of one batch norm, updated with the moments of one batch at a time.

    Attributes:
        count: values per channel, or their total weight.
        batches: how many batches had values.
    """

    def __init__(self, estimator: str = "population", correction: int = 0) -> None:
        check_estimator(estimator)
        self._average = estimator == "average"
        self._correction = correction
        self._merged = Moments(0, 0, 0)  # type: ignore[arg-type]  # the identity of merge
        self._sums: tuple[Vector, Vector] | None = None
        self.batches = 0

    @property
    def count(self) -> float:
        return float(self._merged.count)

    def add(self, moments: Moments) -> None:
        """The moments of one more batch."""
        if moments.count == 0:
            return
        self._merged = self._merged.merge(moments)
        self.batches += 1
        if self._average:
            variance = moments.variance * _factor(moments.count, self._correction)
            mean_sum, variance_sum = self._sums or (np.zeros_like(moments.mean), np.zeros_like(variance))
            self._sums = mean_sum + moments.mean, variance_sum + variance

    def extend(self, parts: Iterable[Moments]) -> None:
        """The moments of several batches, one after the other."""
        for moments in parts:
            self.add(moments)

    def result(self) -> tuple[Vector, Vector]:
        """The mean and variance. At least one batch must have had values."""
        if not self.batches:
            raise ValueError("there are no values to take statistics of: every batch was empty or fully masked")
        if self._sums is not None:
            return self._sums[0] / self.batches, self._sums[1] / self.batches
        return self._merged.mean, self._merged.variance * _factor(self._merged.count, self._correction)


def _factor(count: float, correction: int) -> float:
    """W/(W - correction); 1 for a count that leaves nothing, as in bnfast's layers."""
    return count / (count - correction) if count > correction else 1.0
