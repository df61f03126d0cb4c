"""Statistics from the moments of batches, against float64 NumPy."""

from __future__ import annotations

import bnfast
import numpy as np
import pytest
from bnfast.diagnosis.estimate import Estimate


@pytest.fixture
def parts():
    rng = np.random.default_rng(3)
    return [rng.normal(1000, 2, (n, 5)) for n in (7, 1, 30, 12)]


@pytest.mark.parametrize("correction", [0, 1])
def test_population(parts, correction):
    estimate = Estimate("population", correction)
    estimate.extend(bnfast.moments(part) for part in parts)
    whole = np.concatenate(parts)
    mean, variance = estimate.result()
    np.testing.assert_allclose(mean, whole.mean(0), rtol=1e-14)
    np.testing.assert_allclose(variance, whole.var(0, ddof=correction), rtol=1e-10)
    assert (estimate.count, estimate.batches) == (50, 4)


@pytest.mark.parametrize("correction", [0, 1])
def test_average(parts, correction):
    estimate = Estimate("average", correction)
    estimate.extend(bnfast.moments(part) for part in parts)
    mean, variance = estimate.result()
    np.testing.assert_allclose(mean, np.mean([part.mean(0) for part in parts], 0), rtol=1e-14)
    wanted = [part.var(0, ddof=correction if len(part) > 1 else 0) for part in parts]
    np.testing.assert_allclose(variance, np.mean(wanted, 0), rtol=1e-10)


def test_empty_batches_do_not_count(parts):
    estimate = Estimate()
    estimate.add(bnfast.moments(parts[0][:0]))
    with pytest.raises(ValueError, match="no values"):
        estimate.result()
    estimate.add(bnfast.moments(parts[0]))
    assert estimate.batches == 1


def test_an_unknown_estimator():
    with pytest.raises(ValueError, match="median"):
        Estimate("median")
