"""What one batch norm saw in a pass over data."""

from __future__ import annotations

from typing import Any

import numpy as np

from ....functional.moments import Moments


class Seen:
    """Sums over the batches of one pass."""

    def __init__(self) -> None:
        self.sites: dict[int, Moments] = {}
        self.means = Moments(0, 0, 0)  # type: ignore[arg-type]  # of the batches' means
        self.within: Any = 0.0
        self.batches = self.infinite = self.samples = 0
        self.top: Any = None  # per channel: the largest squared deviation of a sample, its batch and its row

    @property
    def all(self) -> Moments:
        merged = Moments(0, 0, 0)  # type: ignore[arg-type]
        for _, part in sorted(self.sites.items()):
            merged = merged.merge(part)
        return merged

    def add(self, site: int, x: Any, found: Moments) -> bool:
        """Whether the values were finite and any."""
        if not (np.isfinite(found.mean).all() and np.isfinite(found.variance).all()):
            self.infinite += 1
            return False
        if not found.count:
            return False
        mean, variance = found.mean.ravel(), found.variance.ravel()
        self.sites[site] = self.sites[site].merge(found) if site in self.sites else found
        self.means = self.means.merge(Moments(1.0, mean, np.zeros_like(mean)))
        self.within = self.within + variance
        self.batches, self.samples = self.batches + 1, self.samples + len(x)
        return True

    def find_top(self, x: Any, axes: tuple[int, ...], mean: Any, batch: int) -> None:
        """Compares each sample's part of the variances with the largest so far."""
        if 0 in axes:
            return
        rest = tuple(i for i in range(1, x.ndim) if i not in axes)
        shape = [1 if i not in axes else n for i, n in enumerate(x.shape)]
        square = (np.asarray(x, np.float32) - mean.reshape(shape).astype(np.float32)) ** 2
        parts = square.sum(rest, dtype=np.float64).reshape(len(x), -1)
        rows = parts.argmax(0)
        best = parts[rows, np.arange(parts.shape[1])]
        if self.top is None:
            self.top = best, np.full(len(best), batch), rows
            return
        larger = best > self.top[0]
        self.top = tuple(np.where(larger, new, old) for new, old in zip((best, batch, rows), self.top, strict=True))
