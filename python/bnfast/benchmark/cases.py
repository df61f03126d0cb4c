"""The cases that are timed. A case is a shape of shapes.csv with a layout, an operation and a dtype.

x has shape (N, *spatial, C) in channels_last and (N, C, *spatial) in channels_first. x is normal with mean 3 and
standard deviation 2, dy is normal with mean 0 and standard deviation 1. Parameters and statistics are float64 if x is
float64, else float32.
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
SHAPES_CSV = Path(__file__).with_name("shapes.csv")


@dataclass(frozen=True)
class NamedShape:
    """A row of shapes.csv. `spatial` is empty for a dense layer."""

    set: str
    name: str
    n: int
    c: int
    spatial: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of values in the tensor."""
        return self.n * self.c * math.prod(self.spatial)

    @property
    def label(self) -> str:
        """The name in tables, such as: resnet50 stem 32x64x112x112."""
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
        """The size of x in bytes."""
        return self.shape.size * numpy_dtype(self.dtype).itemsize


@dataclass
class Arrays:
    """The inputs of a case. A peer may convert them once; peers of one library share the conversions through `keep`."""

    x: Array
    dy: Array
    gamma: Array
    beta: Array
    moving_mean: Array
    moving_variance: Array
    kept: dict[str, Any] = field(default_factory=dict)

    def keep(self, key: str, make: Callable[[], T]) -> T:
        """Return the value stored under `key`; the first time, call `make` to get it."""
        if key not in self.kept:
            self.kept[key] = make()
        found: T = self.kept[key]
        return found


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of that name. bfloat16 comes from ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    return np.dtype(name)


def make_arrays(case: Case) -> Arrays:
    """Make the inputs of a case: the same values in every run. All operations may share them."""
    random = np.random.default_rng(7)
    dtype = numpy_dtype(case.dtype)
    parameter_dtype = np.dtype("float64" if case.dtype == "float64" else "float32")
    channels = case.shape.c

    def normal(mean: float, std: float) -> Array:
        values = random.standard_normal(case.array_shape, dtype=parameter_dtype.type)
        values *= parameter_dtype.type(std)
        values += parameter_dtype.type(mean)
        return values.astype(dtype, copy=False)

    return Arrays(
        x=normal(3, 2),
        dy=normal(0, 1),
        gamma=random.uniform(0.5, 1.5, channels).astype(parameter_dtype),
        beta=random.standard_normal(channels).astype(parameter_dtype),
        moving_mean=random.uniform(2.5, 3.5, channels).astype(parameter_dtype),
        moving_variance=random.uniform(3, 5, channels).astype(parameter_dtype),
    )


def read_shapes(path: Path = SHAPES_CSV) -> list[NamedShape]:
    """Every row of shapes.csv, in order."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            NamedShape(row["set"], row["name"], int(row["N"]), int(row["C"]), _extents(row["spatial"]))
            for row in csv.DictReader(file)
        ]


def parse_shape(text: str) -> NamedShape:
    """Parse "N,C" or "N,C,HxW". Raises ValueError for anything else."""
    n, c, *spatial = text.split(",")
    if len(spatial) > 1:
        raise ValueError(text)
    extents = (int(n), int(c), *_extents(spatial[0] if spatial else ""))
    if min(extents) < 1:
        raise ValueError(text)
    name = "x".join(str(extent) for extent in extents)
    return NamedShape("given", name, extents[0], extents[1], extents[2:])


def make_cases(shapes: list[NamedShape], layouts: list[str], ops: list[str], dtypes: list[str]) -> list[Case]:
    """All combinations. A dense layer has only one layout; it is always listed as channels_last."""
    return [
        Case(shape, layout, op, dtype)
        for shape in shapes
        for dtype in dtypes
        for layout in (layouts if shape.spatial else ["channels_last"])
        for op in ops
    ]


def _extents(text: str) -> tuple[int, ...]:
    return tuple(int(extent) for extent in text.split("x")) if text else ()
