"""What is timed: the shapes of shapes.csv; a shape with a layout, an operation and a dtype as a case with its arrays.

x is (N, *spatial, C) in channels_last and (N, C, *spatial) in channels_first, drawn from a normal distribution of mean
3 and standard deviation 2; dy from one of mean 0. Parameters and statistics are float32, or float64 where x is.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bnfast._arguments.arrays import Array

T = TypeVar("T")

EPSILON = 1e-3
MOMENTUM = 0.99  # the weight of the old value
LAYOUTS = ("channels_first", "channels_last")
OPS = ("train", "grad", "infer")
DTYPES = ("float32", "float64", "float16", "bfloat16")
TABLE = Path(__file__).with_name("shapes.csv")


@dataclass(frozen=True)
class NamedShape:
    """A row of the table. `spatial` is empty for a dense layer."""

    set: str
    name: str
    n: int
    c: int
    spatial: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements of the tensor."""
        return self.n * self.c * math.prod(self.spatial)

    @property
    def label(self) -> str:
        """How tables name it: resnet50 stem 32x64x112x112."""
        extents = "x".join(str(extent) for extent in (self.n, self.c, *self.spatial))
        return f"{self.set} {extents}" if self.name == extents else f"{self.set} {self.name} {extents}"


@dataclass(frozen=True)
class Case:
    """One operation on one tensor."""

    shape: NamedShape
    layout: str
    op: str
    dtype: str

    @property
    def axis(self) -> int:
        """The channel axis of x."""
        return 1 if self.layout == "channels_first" else -1

    @property
    def array_shape(self) -> tuple[int, ...]:
        """The shape of x."""
        s = self.shape
        return (s.n, s.c, *s.spatial) if self.layout == "channels_first" else (s.n, *s.spatial, s.c)

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        return self.shape.size * numpy_dtype(self.dtype).itemsize


@dataclass
class Arrays:
    """The inputs of a case. Peers read them, or convert them once and keep that in `kept` for those of their family."""

    x: Array
    dy: Array
    gamma: Array
    beta: Array
    moving_mean: Array
    moving_variance: Array
    kept: dict[str, Any] = field(default_factory=dict)

    def keep(self, key: str, make: Callable[[], T]) -> T:
        """What `make` returned the first time that `key` was asked for."""
        if key not in self.kept:
            self.kept[key] = make()
        found: T = self.kept[key]
        return found


def numpy_dtype(name: str) -> np.dtype[Any]:
    """float32, float64 and float16 are NumPy's own; bfloat16 is ml_dtypes's."""
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    return np.dtype(name)


def make_arrays(case: Case) -> Arrays:
    """The same values for the same case, in every run. Calls of every op may share them."""
    random = np.random.default_rng(7)
    dtype = numpy_dtype(case.dtype)
    parameters = np.dtype("float64" if case.dtype == "float64" else "float32")
    drawn = parameters.type
    shape, channels = case.array_shape, case.shape.c

    def tensor(offset: float, scale: float) -> Array:
        values = random.standard_normal(shape, dtype=drawn)
        values *= drawn(scale)
        values += drawn(offset)
        return values.astype(dtype, copy=False)

    return Arrays(
        x=tensor(3, 2),
        dy=tensor(0, 1),
        gamma=random.uniform(0.5, 1.5, channels).astype(parameters),
        beta=random.standard_normal(channels).astype(parameters),
        moving_mean=random.uniform(2.5, 3.5, channels).astype(parameters),
        moving_variance=random.uniform(3, 5, channels).astype(parameters),
    )


def read_shapes(path: Path = TABLE) -> list[NamedShape]:
    """Every shape of the table, in its order."""
    with path.open(newline="") as file:
        return [
            NamedShape(row["set"], row["name"], int(row["N"]), int(row["C"]), _extents(row["spatial"]))
            for row in csv.DictReader(file)
        ]


def parse_shape(text: str) -> NamedShape:
    """The shape that "N,C" or "N,C,HxW" says. ValueError for anything else."""
    n, c, *spatial = text.split(",")
    if len(spatial) > 1:
        raise ValueError(text)
    shape = NamedShape("given", text, int(n), int(c), _extents(spatial[0] if spatial else ""))
    if min(shape.n, shape.c, *shape.spatial) < 1:
        raise ValueError(text)
    extents = "x".join(str(extent) for extent in (shape.n, shape.c, *shape.spatial))
    return NamedShape("given", extents, shape.n, shape.c, shape.spatial)


def make_cases(shapes: list[NamedShape], layouts: list[str], ops: list[str], dtypes: list[str]) -> list[Case]:
    """All combinations; a dense layer has one layout, which is listed as channels_last whatever `layouts` says."""
    return [
        Case(shape, layout, op, dtype)
        for shape in shapes
        for dtype in dtypes
        for layout in (layouts if shape.spatial else ["channels_last"])
        for op in ops
    ]


def _extents(text: str) -> tuple[int, ...]:
    return tuple(int(extent) for extent in text.split("x")) if text else ()
