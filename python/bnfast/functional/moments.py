"""`Moments`: count, mean and population variance of each channel, and their merge.

The merge is Chan's formula in float64 (Chan, Golub, LeVeque 1979). With d = mean_b - mean_a and n = n_a + n_b:
    mean     = mean_a + d * n_b/n
    variance = (n_a*variance_a + n_b*variance_b)/n + d^2 * n_a*n_b/n^2
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Moments"]


class Moments(NamedTuple):
    """What `bnfast.moments` returns.

    `Moments(0, 0, 0)` is the identity of `merge`, so that `functools.reduce(Moments.merge, parts, Moments(0, 0, 0))`
    is the moments of the concatenated parts.

    Attributes:
        count: number of values per channel; with a mask their total weight.
        mean, variance: float64 of shape (C,); the variance is the population variance.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> x = np.array([[1.0], [3.0], [5.0], [7.0]])
        >>> bnfast.moments(x[:1]).merge(bnfast.moments(x[1:]))
        Moments(count=4.0, mean=array([4.]), variance=array([5.]))

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    count: float  # type: ignore[assignment]  # hides tuple.count, which has no use here
    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of values together. Neither operand is changed. If one operand is empty, the result
        may share memory with the other.

        With d = other.mean - self.mean, n_a = self.count, n_b = other.count and n = n_a + n_b:

            mean = self.mean + d * n_b/n
            variance = (n_a*self.variance + n_b*other.variance)/n + d^2 * n_a*n_b/n^2

        Raises:
            TypeError: `other` is not a Moments.
            ValueError: the two have different numbers of channels, or a count is negative or not finite, or their sum.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other must be a Moments. Received: {type(other).__name__}")
        for moments in (self, other):
            if not 0 <= moments.count < np.inf:
                raise ValueError(f"count must be finite and at least 0. Received: {moments.count!r}")
        if np.ndim(self.mean) and np.ndim(other.mean) and np.shape(self.mean) != np.shape(other.mean):
            wanted, received = np.shape(self.mean), np.shape(other.mean)
            raise ValueError(f"other.mean must have shape {wanted}, like self.mean. Received: {received}")
        if other.count == 0 and np.ndim(self.mean) >= np.ndim(other.mean):
            return self
        if self.count == 0:
            return other
        count = self.count + other.count
        if count == np.inf:
            raise ValueError(f"the sum of both counts must be finite. Received: {self.count!r} and {other.count!r}")
        share = other.count / count
        delta = np.subtract(other.mean, self.mean, dtype=np.float64)
        mean = self.mean + delta * share
        # (n_a/n)*variance_a, not (n_a*variance_a)/n, because a product with a large count could overflow
        between = delta * delta * (share * (self.count / count))
        variance = self.variance * (self.count / count) + other.variance * share + between
        return Moments(count, mean, variance)
