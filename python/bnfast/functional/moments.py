"""Count, mean and population variance of every channel, and how two of them become one.

Merging is Chan's formula in float64 (Chan, Golub, LeVeque 1979): with d = mean_b - mean_a and n = n_a + n_b,
    mean     = mean_a + d * n_b/n
    variance = (n_a*variance_a + n_b*variance_b)/n + d^2 * n_a*n_b/n^2
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Moments"]


class Moments(NamedTuple):
    """What `bnfast.moments` returns: `count` values (under a mask: their total weight) a channel, and their
    float64 `mean` and population `variance`, each of shape (C,).

    `Moments(0, 0, 0)` is the identity of `merge`, so that `functools.reduce(Moments.merge, parts, Moments(0, 0, 0))`
    gives the moments of the concatenated parts.
    """

    count: float  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of values together. Neither operand is changed; a result may share memory with
        an operand where the other is empty.

        Raises:
            TypeError: `other` is not a Moments.
            ValueError: the two have different numbers of channels, or a count is negative or not finite.
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
        share = other.count / count
        delta = np.subtract(other.mean, self.mean, dtype=np.float64)
        mean = self.mean + delta * share
        # (n_a/n)*variance_a and not (n_a*variance_a)/n: a product with a large count could overflow first
        between = delta * delta * (share * (self.count / count))
        variance = self.variance * (self.count / count) + other.variance * share + between
        return Moments(count, mean, variance)
