"""Loss and metrics of outputs, as a model was compiled with them, without touching the model's own.

The compiled loss and metrics are stateful and are built when they are first used. So new ones are made from what was
given to `compile`. A metric object is made anew from its config; one that can't be is left out, and `notes` says so.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras.src.trainers.compile_utils import CompileLoss, CompileMetrics  # Keras has no public names for these


class Score:
    """Sums up batches of outputs. `result()` is {"loss": ..., "accuracy": ...}, or {} without targets."""

    def __init__(self, model: Any, notes: list[str]) -> None:
        self._model, self._notes = model, notes
        self._loss = self._metrics = None
        self._total = self._count = 0.0
        self._right = self._rows = 0
        compiled = getattr(model, "_compile_loss", None)
        if model.compiled and compiled is not None:
            names = getattr(model, "output_names", None)
            self._loss = CompileLoss(compiled._user_loss, compiled._user_loss_weights, output_names=names)
        theirs = getattr(model, "_compile_metrics", None)
        if model.compiled and theirs is not None:
            given = [self._anew(part) for part in (theirs._user_metrics, theirs._user_weighted_metrics)]
            self._metrics = CompileMetrics(*given, output_names=getattr(model, "output_names", None))

    def _anew(self, metrics: Any) -> Any:
        if isinstance(metrics, dict):
            return {key: self._anew(value) for key, value in metrics.items()}
        if isinstance(metrics, (list, tuple)):
            copies = map(self._anew, metrics)
            return [new for new, old in zip(copies, metrics, strict=True) if new is not None or old is None]
        if not isinstance(metrics, keras.metrics.Metric):
            return metrics
        try:
            return type(metrics).from_config(metrics.get_config())
        except Exception as error:
            note = f"the metric {metrics.name} is left out, as it can't be made anew: {error}"
            if note not in self._notes:
                self._notes.append(note)
            return None

    def add(self, targets: Any, outputs: list[Any], weights: Any, added_loss: float, structure: Any) -> None:
        """One batch: its targets, the flat outputs, sample weights or None, and the losses that layers add."""
        y_pred = keras.tree.pack_sequence_as(structure, [keras.ops.convert_to_tensor(y) for y in outputs])
        y_true = keras.tree.map_structure(keras.ops.convert_to_tensor, targets)
        count = len(outputs[0])
        if self._loss is not None:
            self._total += count * (float(self._loss(y_true, y_pred, weights)) + added_loss)
        if self._metrics is not None:
            self._metrics.update_state(y_true, y_pred, sample_weight=weights)
        if self._metrics is None and len(outputs) == 1 and _classes(targets, outputs[0]):
            self._right += int(np.sum(np.argmax(outputs[0], -1) == np.asarray(targets).reshape(-1)))
            self._rows += count
        self._count += count

    def result(self) -> dict[str, float]:
        if not self._count:
            return {}
        found = {} if self._loss is None else {"loss": self._total / self._count}
        if self._metrics is not None:
            for name, value in self._metrics.result().items():
                array = np.asarray(value)
                if array.ndim == 0:
                    found[name] = float(array)
        if self._rows:
            found["accuracy"] = self._right / self._rows
        return found


def _classes(targets: Any, outputs: Any) -> bool:
    """Whether targets are class numbers and outputs one score per class."""
    y = np.asarray(targets) if not isinstance(targets, (dict, list)) else np.zeros(0)
    return y.dtype.kind in "iu" and y.size == len(outputs) and outputs.ndim == 2 and outputs.shape[1] > 1
