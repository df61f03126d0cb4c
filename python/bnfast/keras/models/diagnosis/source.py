"""The batches of whatever people have as data: arrays, tf.data.Dataset, PyDataset, generators and loaders.

A batch is (inputs, targets, sample weights), the last two None where there are none. A tuple is read as Keras reads it:
(inputs,), (inputs, targets) or (inputs, targets, sample_weights); several inputs are a list or a dict.

Arrays are cut into batches of equal size (they differ by at most 1), after they are put into a fixed random order:
samples often come sorted by class, and batches of one class have statistics of their own. Everything else keeps its
batches and their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.models.functional import Functional  # Keras has no public name for it

MOST_SAMPLES, FEWEST_SAMPLES, BATCH_BYTES = 256, 32, 8 << 20


@dataclass(frozen=True)
class Data:
    """One batch. rows: the positions of its samples in the arrays; None if the data has none."""

    inputs: Any
    targets: Any = None
    weights: Any = None
    rows: Any = None

    def __len__(self) -> int:
        return _extent(keras.tree.flatten(self.inputs)[0])


class Source:
    """An iterable of batches.

    Attributes:
        length: the number of batches, None if it is unknown.
        once: whether the data can be read only once.
    """

    def __init__(
        self,
        model: Any,
        data: Any,
        targets: Any = None,
        *,
        batch_size: int | None = None,
        batches: int | None = None,
        name: str = "data",
    ) -> None:
        for argument, value in (("batch_size", batch_size), ("batches", batches)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1):
                raise ValueError(f"{argument} must be an integer of at least 1, or None. Received: {value!r}")
        self._model, self._data, self._name, self._most = model, data, name, batches
        self._needed = _needed(model)
        self.once = False
        self.length: int | None = None
        if _is_array(data) or isinstance(data, (list, tuple, dict)):
            self._use_arrays(data, targets, batch_size)
        else:
            if targets is not None:
                kind = type(data).__name__
                raise ValueError(
                    f"targets must be None where {name} gives them itself. Received: {name} of type {kind}"
                )
            if batch_size is not None:
                raise ValueError(f"batch_size is for arrays only: {name} of type {type(data).__name__} has batches")
            self._use_batches(data)
        if batches is not None and self.length is not None:
            self.length = min(self.length, batches)

    def __iter__(self) -> Iterator[Data]:
        found = 0
        for data in self._read():
            if self._most is not None and found == self._most:
                break
            if len(data):
                self._check(data.inputs)
                found += 1
                yield data
        if not found:
            raise ValueError(f"{self._name} is empty: it has no batch with samples")

    # ---- arrays -----------------------------------------------------------------------------------------------------

    def _use_arrays(self, data: Any, targets: Any, batch_size: int | None) -> None:
        weights = None
        if isinstance(data, tuple):
            if not 1 <= len(data) <= 3:
                raise ValueError(
                    f"{self._name} as a tuple must be (inputs,), (inputs, targets) or "
                    f"(inputs, targets, sample_weights); several inputs are a list or a dict. "
                    f"Received: a tuple of {len(data)}"
                )
            if targets is not None and len(data) > 1:
                raise ValueError(f"targets must be None where {self._name} has them: it is a tuple of {len(data)}")
            data, given, weights = (*data, None, None)[:3]
            targets = given if targets is None else targets
        whole = Data(_arrays(data, self._name), _arrays(targets, "targets"), _arrays(weights, "sample_weights"))
        leaves = keras.tree.flatten(whole.inputs)
        if not leaves:
            raise ValueError(f"{self._name} is empty: it holds no array")
        rest = [leaf for leaf in keras.tree.flatten((whole.targets, whole.weights)) if leaf is not None]
        extents = [_extent(leaf) for leaf in (*leaves, *rest)]
        if len(set(extents)) > 1:
            raise ValueError(f"all arrays must have the same number of samples. Received: {extents}")
        if extents[0] == 0:
            raise ValueError(f"{self._name} is empty: its arrays have no samples")
        self._check(whole.inputs)
        sample = sum(np.asarray(leaf[:1]).nbytes for leaf in leaves)
        fixed = self._needed[0][1][0] if self._needed and self._needed[0][1] else None
        size = fixed or batch_size or min(MOST_SAMPLES, max(FEWEST_SAMPLES, BATCH_BYTES // max(sample, 1)))
        self.length = math.ceil(extents[0] / size)
        order = np.random.default_rng(0).permutation(extents[0])
        cuts = np.arange(size, extents[0], size) if fixed else self.length
        self._parts, self._whole = np.array_split(order, cuts), whole
        self._read = self._read_arrays

    def _read_arrays(self) -> Iterator[Data]:
        for rows in self._parts:
            whole = self._whole
            x, y, w = (_take(part, rows) for part in (whole.inputs, whole.targets, whole.weights))
            yield Data(x, y, w, rows)

    # ---- batches ----------------------------------------------------------------------------------------------------

    def _use_batches(self, data: Any) -> None:
        self._read = self._read_batches
        if isinstance(data, tf.distribute.DistributedDataset):
            raise TypeError(f"{self._name} must be a plain tf.data.Dataset. Received: one that a strategy distributes")
        if isinstance(data, tf.data.Dataset):
            cardinality = int(data.cardinality())
            if cardinality == tf.data.INFINITE_CARDINALITY and self._most is None:
                raise ValueError(f"{self._name} has no end: say how many batches to use, with batches=")
            self.length = cardinality if cardinality >= 0 else self._most if cardinality == -1 else None
        elif isinstance(data, keras.utils.PyDataset):
            self.length = data.num_batches
            if self.length is None and self._most is None:
                raise ValueError(f"{self._name} has no end: say how many batches to use, with batches=")
            self.length = self._most if self.length is None else self.length
        elif hasattr(data, "__iter__"):
            self.once = hasattr(data, "__next__")
            self.length = len(data) if hasattr(data, "__len__") else None
        else:
            raise TypeError(
                f"{self._name} must be an array, a list or dict of arrays, a tuple (inputs, targets), a "
                f"tf.data.Dataset, a PyDataset or an iterable of batches. Received: {type(data).__name__}"
            )

    def _read_batches(self) -> Iterator[Data]:
        data = self._data
        if isinstance(data, keras.utils.PyDataset):
            elements: Iterator[Any] = (data[i] for i in range(self.length or 0))
        else:
            elements = iter(data)
        lists = type(data).__module__.partition(".")[0] == "torch"  # a DataLoader makes lists of pairs
        for element in elements:
            element = tuple(element) if lists and isinstance(element, list) else element
            if isinstance(element, tuple) and len(element) > 3:
                raise ValueError(
                    f"a batch of {self._name} must be inputs or a tuple (inputs, targets, sample_weights). "
                    f"Received: a tuple of {len(element)}"
                )
            x, y, w = (*element, None, None)[:3] if isinstance(element, tuple) else (element, None, None)
            yield Data(_arrays(x, self._name), _arrays(y, "targets"), w)

    # ---- what the model needs ----------------------------------------------------------------------------------------

    def _check(self, inputs: Any) -> None:
        """Raises unless inputs have the names, the number and the ranks of a functional model's, and are finite."""
        model, name = self._model, self._name
        if self._needed:
            needed = [key for key, *_ in self._needed]
            if isinstance(inputs, dict):
                missing = [key for key in needed if key not in inputs]
                if missing:
                    received = sorted(map(str, inputs))
                    raise ValueError(
                        f"{name} lacks the input {missing[0]!r} of model {model.name}. Received: {received}"
                    )
                leaves = [inputs[key] for key in needed]
            else:
                leaves = keras.tree.flatten(inputs)
            if len(leaves) != len(needed):
                raise ValueError(
                    f"model {model.name} has {len(needed)} inputs ({', '.join(needed)}), and {name} gives {len(leaves)}"
                    f": pass several inputs as a list or a dict (a tuple is inputs, targets, sample weights)"
                )
            for (key, shape, dtype), leaf in zip(self._needed, leaves, strict=True):
                if dtype != "string" and _is_text(leaf):
                    raise ValueError(f"input {key!r} must hold numbers. Received: dtype {leaf.dtype}")
                if shape is not None and len(leaf.shape) == len(shape) - 1 and tuple(leaf.shape) == tuple(shape[1:]):
                    raise ValueError(
                        f"input {key!r} must have shape {shape}, the first extent the batch's. "
                        f"Received: {tuple(leaf.shape)}: the data has no batches; use .batch(n)"
                    )
        for leaf in keras.tree.flatten(inputs):
            if _is_float(leaf) and not _finite(leaf):
                raise ValueError(f"{name} holds NaN or Inf in its inputs: replace or leave out those samples")


def _needed(model: Any) -> list[tuple[str, Any, str]]:
    """The names, shapes and dtypes of a functional model's inputs; empty for a subclassed one: its call alone knows."""
    functional = model._functional if isinstance(model, keras.Sequential) else model
    if not isinstance(functional, Functional):
        return []
    struct = functional._inputs_struct
    if isinstance(struct, dict):
        return [(key, tuple(tensor.shape), tensor.dtype) for key, tensor in struct.items()]
    return [(tensor.name, tuple(tensor.shape), tensor.dtype) for tensor in functional.inputs]


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "__getitem__") and not isinstance(value, tf.data.Dataset)


def _arrays(part: Any, name: str) -> Any:
    """A part of the data with NumPy arrays in place of whatever else has their interface; tensors stay."""
    if part is None:
        return None
    if isinstance(part, dict):
        return {key: _arrays(value, name) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [_arrays(value, name) for value in part]
    if tf.is_tensor(part):
        return np.asarray(part) if isinstance(part, tf.Tensor) and part.dtype != tf.string else part
    if not (hasattr(part, "shape") or hasattr(part, "__array__")):
        raise TypeError(f"{name} must hold arrays. Received: {type(part).__name__}")
    array = np.asarray(part.detach().cpu() if hasattr(part, "detach") else part)
    if array.ndim == 0:
        raise ValueError(f"{name} must have samples along its first axis. Received: an array of rank 0")
    return array


def _take(part: Any, rows: Any) -> Any:
    """These rows of all arrays of a part of the data."""
    return None if part is None else keras.tree.map_structure(lambda leaf: leaf[rows], part)


def _extent(leaf: Any) -> int:
    """The number of samples; 1 where a ragged tensor doesn't say."""
    return 1 if not len(leaf.shape) or leaf.shape[0] is None else int(leaf.shape[0])


def _is_text(leaf: Any) -> bool:
    return leaf.dtype.kind in "USO" if isinstance(leaf, np.ndarray) else leaf.dtype == tf.string


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and (leaf.dtype.kind == "f" or leaf.dtype.name == "bfloat16")


def _finite(leaf: Any) -> bool:
    return bool(np.isfinite(leaf.sum(dtype=np.float64 if leaf.dtype.kind == "f" else None)) or np.isfinite(leaf).all())
