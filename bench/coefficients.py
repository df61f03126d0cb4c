"""The polynomials of csrc/cpu/kernels/math.inl.h. `python bench/coefficients.py` prints them; it needs mpmath.

Each polynomial is a minimax fit: weighted least squares on Chebyshev nodes, with weights sharpened until the largest
relative error is level (Lawson's iteration). The coefficients are rounded to the type one by one, from the constant
term on, and the rest is fitted again after each rounding, so that it makes up for the error. The comment behind each
polynomial is the error of the rounded polynomial relative to the function, as a power of 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mpmath as mp
import numpy as np

mp.mp.dps = 60
HALF_LN2 = mp.log(2) / 2 * mp.mpf("1.002")
FLOAT, DOUBLE = 24, 53  # digits of the type, in bits
Function = Callable[[Any], Any]


def rounded(value: Any, digits: int) -> Any:
    """The nearest number of so many bits."""
    return mp.mpf(float(np.float32(float(value)))) if digits == FLOAT else mp.mpf(float(value))


def solve(nodes: Sequence[Any], targets: Sequence[Any], weights: Sequence[Any], powers: Sequence[int]) -> list[Any]:
    """Weighted least squares: the coefficients of these powers."""
    rows = [[node**p * w for p in powers] for node, w in zip(nodes, weights, strict=True)]
    right = [t * w for t, w in zip(targets, weights, strict=True)]
    normal = mp.matrix(len(powers), len(powers))
    vector = mp.matrix(len(powers), 1)
    for row, value in zip(rows, right, strict=True):
        for i, a in enumerate(row):
            vector[i] += a * value
            for j in range(i + 1):
                normal[i, j] += a * row[j]
    for i in range(len(powers)):
        for j in range(i):
            normal[j, i] = normal[i, j]
    return list(mp.lu_solve(normal, vector))


def fit(
    function: Function, relative_to: Function, low: Any, high: Any, degree: int, digits: int
) -> tuple[list[Any], Any]:
    """Coefficients from the constant term on, and the largest error divided by `relative_to`."""
    count = 6 * (degree + 2)
    nodes = [(low + high) / 2 + (high - low) / 2 * mp.cos(mp.pi * (i + 0.5) / count) for i in range(count)]
    values = [function(node) for node in nodes]
    scale = [1 / abs(relative_to(node)) for node in nodes]
    emphasis = [mp.mpf(1)] * count

    def error_at(coefficients: Sequence[Any]) -> list[Any]:
        return [
            abs(mp.polyval(list(reversed(list(coefficients))), node) - value) * s
            for node, value, s in zip(nodes, values, scale, strict=True)
        ]

    for _ in range(25):
        found = solve(nodes, values, [s * mp.sqrt(e) for s, e in zip(scale, emphasis, strict=True)], range(degree + 1))
        errors = error_at(found)
        total = sum(e * x for e, x in zip(emphasis, errors, strict=True))
        emphasis = [e * x / total * count for e, x in zip(emphasis, errors, strict=True)]
    fixed: list[Any] = []
    weights = [s * mp.sqrt(e) for s, e in zip(scale, emphasis, strict=True)]
    while len(fixed) <= degree:
        rest = [v - sum(c * n**i for i, c in enumerate(fixed)) for n, v in zip(nodes, values, strict=True)]
        fixed.append(rounded(solve(nodes, rest, weights, range(len(fixed), degree + 1))[0], digits))
    return fixed, max(error_at(fixed))


def show(name: str, coefficients: Sequence[Any], error: Any, digits: int) -> None:
    suffix = "f" if digits == FLOAT else ""
    print(f"{name}: relative error 2^{float(mp.log(error, 2)):.1f}")
    print("    {" + ", ".join(float(c).hex().replace("0000000p", "p") + suffix for c in coefficients) + "}")


def fit_exp(degree: int, digits: int) -> tuple[list[Any], Any]:
    """exp(r) - 1 = r + r^2*P(r)."""
    return fit(lambda r: (mp.expm1(r) - r) / r**2, lambda r: mp.expm1(r) / r**2, -HALF_LN2, HALF_LN2, degree, digits)


def fit_log(degree: int, digits: int) -> tuple[list[Any], Any]:
    """log(1 + e) = t + t^3*P(t^2) with t = 2e/(2 + e) and 0 <= e <= 1, that is 2*atanh(t/2)."""

    def over_cube(w: Any) -> Any:
        return 2 * mp.atanh(mp.sqrt(w) / 2) / mp.sqrt(w) ** 3

    return fit(lambda w: over_cube(w) - 1 / w, over_cube, mp.mpf(0), mp.mpf(4) / 9, degree, digits)


def fit_tanh(degree: int, digits: int) -> tuple[list[Any], Any]:
    """tanh(z) = z + z^3*P(z^2) for 0 <= z <= 0.55."""

    def over_cube(w: Any) -> Any:
        return mp.tanh(mp.sqrt(w)) / mp.sqrt(w) ** 3

    return fit(lambda w: over_cube(w) - 1 / w, over_cube, mp.mpf(0), mp.mpf("0.305"), degree, digits)


def fit_tail(degree: int, digits: int, zero: Any, pole: Any, last: Any) -> tuple[list[Any], Any]:
    """Phi(-t) = exp(-t^2/2) * P(y)/(t + pole) with y = (t - zero)/(t + pole) and 0 <= t <= last."""

    def value(y: Any) -> Any:
        t = (zero + pole * y) / (1 - y)
        return mp.ncdf(-t) * mp.exp(t * t / 2) * (t + pole)

    return fit(value, value, -zero / pole, (last - zero) / (last + pole), degree, digits)


def main() -> None:
    """Print all polynomials for both types."""
    show("float exp", *fit_exp(4, FLOAT), FLOAT)
    show("float log", *fit_log(4, FLOAT), FLOAT)
    show("float tanh", *fit_tanh(4, FLOAT), FLOAT)
    show("float tail", *fit_tail(10, FLOAT, mp.mpf(0), mp.mpf("2.5"), mp.mpf(15)), FLOAT)
    show("double exp", *fit_exp(9, DOUBLE), DOUBLE)
    show("double log", *fit_log(10, DOUBLE), DOUBLE)
    show("double tanh", *fit_tanh(9, DOUBLE), DOUBLE)
    show("double tail", *fit_tail(25, DOUBLE, mp.mpf(1), mp.mpf(3), mp.mpf(39)), DOUBLE)


if __name__ == "__main__":
    main()
