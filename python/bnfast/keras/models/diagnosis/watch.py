"""`Watch`: a callback that says, while a model trains, when its moving statistics won't serve.

It needs no data. One training step changes the moving statistics by the batch's own, so these can be read back:

    new = old*momentum^k + batch*(1 - momentum^k)     =>     batch = (new - old*momentum^k)/(1 - momentum^k)

k is how often a step updates the layer: the assignments are counted while the training step is traced. The last
steps that were read stand for the data.
"""

from __future__ import annotations

import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ....diagnosis.estimate import Estimate
from ....diagnosis.figures import LayerFigures, ModelFigures
from ....diagnosis.verdicts import judge
from ....diagnosis.verdicts.case import POSSIBLE_SHARE, Verdict
from ....functional.moments import Moments
from ..norms import norms
from .layer_state import broken_weights, has_trained, starting_statistics
from .probe import Tap, names, value

MOST_SAMPLES = 16  # the last steps that were read stand for the data
# The relative error of the batch statistics read back is float32's 6e-8 divided by 1 - momentum: 6e-4 at 0.9999.
MOST_MOMENTUM = 0.9999


class Watch(keras.callbacks.Callback):  # type: ignore[misc]
    """Watches the gap between moving and batch statistics during `fit`, and says once when a verdict becomes true.

    After each epoch it compares every batch norm's moving statistics with those of the last batches. A verdict that
    more training will undo (too few updates, in a training that is long enough) isn't said.

        model.fit(x, y, callbacks=[bnfast.keras.Watch()])

    It needs no data of its own and runs no forward pass: it reads the moving statistics before and after some training
    steps. It takes `budget` of the training's time at most, and reads fewer steps where one costs more. Frozen layers,
    momentum=None, and layers in a loop of TensorFlow's (a recurrent cell) are left out; `left` says so. Validation data
    plays no part: diagnose(model, x, data2=x_val) compares it.

    Args:
        log_dir: a folder for TensorBoard: batch_norm/<layer>/gap, mean_off and variance_log2 per epoch. None: none.
        budget: the share of the training's time that it may take.
        verbose: 1 prints verdicts, 0 keeps them in `verdicts`.

    Attributes:
        history: one dict per epoch: {name of the layer: gap}; empty for an epoch so short that the budget was spent.
        verdicts: {code: (epoch, Verdict)}, each when it first became true.
        left: {name of the layer: why it isn't watched}.
        seconds: the time that it took.

    Raises:
        ValueError: budget isn't in (0, 1]. At the start of training: the model has no batch norm.

    Example:
        >>> import keras, numpy as np
        >>> from bnfast.keras import Watch
        >>> norm = keras.layers.BatchNormalization(momentum=0.9, name="norm")
        >>> model = keras.Sequential([keras.Input((3,)), norm, keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> x, watch = np.random.default_rng(0).normal(5, 2, (640, 3)).astype("float32"), Watch(verbose=0)
        >>> _ = model.fit(x, x[:, :1], epochs=3, verbose=0, callbacks=[watch])
        >>> len(watch.history), list(watch.history[-1])
        (3, ['norm'])
    """

    def __init__(self, log_dir: Any = None, *, budget: float = 0.02, verbose: int = 1) -> None:
        super().__init__()
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
            raise ValueError(f"budget must be a number in (0, 1]. Received: {budget!r}")
        self._log_dir, self._budget, self._verbose = log_dir, budget, verbose
        self.history: list[dict[str, float]] = []
        self.verdicts: dict[str, tuple[int, Verdict]] = {}
        self.left: dict[str, str] = {}
        self.seconds = 0.0
        self._taps: list[Tap] = []
        self._counts: dict[int, int | None] = {}  # by id of the layer: updates per step; None in a loop
        self._counted: Any = None  # the train function whose updates were counted
        self._before: list[Any] | None = None
        self._writer: Any = None

    # ---- Keras's hooks -----------------------------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        found = list(norms(self.model))
        if not found:
            raise ValueError(f"model {self.model.name} has no batch norm to watch")
        self._taps = [Tap(layer, name, i) for i, (layer, name) in enumerate(zip(found, names(found), strict=True))]
        self._executions = self._reads = 0
        self._epoch = self._judged = -1
        self._pending = dict[str, tuple[int, Verdict]]()
        self._started, self._restore = time.perf_counter(), list[Any]()
        if self._counted is None or self._counted is not self.model.train_function:
            self._count_updates()
        if self._log_dir is not None:
            self._writer = tf.summary.create_file_writer(str(self._log_dir))
        self._samples: list[list[tuple[Any, Any]]] = [[] for _ in self._taps]
        self._before = None

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        started = time.perf_counter()
        if self._affordable():
            self._before, self._iterations = self._read(), self._steps()
            self.seconds += time.perf_counter() - started

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._executions += 1
        self._stop_counting()  # the step has been traced
        if self._before is None:
            return
        started = time.perf_counter()
        before, self._before = self._before, None
        # The iterations stand still where a train_step has optimizers of its own.
        steps = self._steps() - self._iterations or int(self.model.steps_per_execution)
        self._reads += 1
        for tap, old, new in zip(self._taps, before, self._read(), strict=True):
            self._add(tap, old, new, steps)
        self.seconds += time.perf_counter() - started

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch
        if self._affordable() or not self.history:
            self._judge()
        else:  # epochs of a fraction of a second
            self.history.append({})

    def _judge(self) -> None:
        """Compares, keeps the gaps of the epoch that has ended, and says what is new."""
        started, epoch = time.perf_counter(), self._epoch
        self._judged = epoch
        figures = self._figures()
        self.history.append({row.name: row.gap for row in figures.layers if row.seen})
        self._pending = {}
        for verdict in judge(figures):
            if self._will_pass(verdict, figures, epoch):
                self._pending[verdict.code] = epoch, verdict
            else:
                self._say(epoch, verdict)
        if self._writer is not None:
            self._write(epoch, figures)
        self.seconds += time.perf_counter() - started

    def on_train_end(self, logs: Any = None) -> None:
        if self._judged != self._epoch:
            self.history.pop()
            self._judge()
        for epoch, verdict in self._pending.values():  # training ended early: nothing will undo them
            self._say(epoch, verdict)
        if self._writer is not None:
            self._writer.close()

    # ---- reading back ------------------------------------------------------------------------------------------------

    def _affordable(self) -> bool:
        return self.seconds <= 0.75 * self._budget * (time.perf_counter() - self._started)

    def _steps(self) -> int:
        """How many steps there were. A model without an optimizer of its own makes one per execution, or as told."""
        optimizer = self.model.optimizer
        if optimizer is None:
            return self._executions * int(self.model.steps_per_execution)
        return int(keras.ops.convert_to_numpy(optimizer.iterations))

    def _read(self) -> list[Any]:
        """The moving mean, and the moving variance or, with renorm, the moving standard deviation."""
        second = ["moving_stddev" if getattr(tap.layer, "renorm", False) else "moving_variance" for tap in self._taps]
        return [
            None if tap.frozen else (value(tap.layer.moving_mean), value(getattr(tap.layer, name)))
            for tap, name in zip(self._taps, second, strict=True)
        ]

    def _add(self, tap: Tap, old: Any, new: Any, steps: int) -> None:
        count = self._counts.get(id(tap.layer), 0)
        momentum = None if tap.layer.momentum is None else float(keras.ops.convert_to_numpy(tap.layer.momentum))
        if old is None or new is None or not count or momentum is None or not 0 <= momentum <= MOST_MOMENTUM:
            return
        kept = momentum ** (count * steps)
        mean, variance = (
            (after.astype(np.float64).ravel() - kept * before.astype(np.float64).ravel()) / (1 - kept)
            for before, after in zip(old, new, strict=True)
        )
        if getattr(tap.layer, "renorm", False):
            variance = variance**2 - float(keras.ops.convert_to_numpy(tap.layer.epsilon))
        mine = self._samples[tap.index]
        mine.append((mean, np.maximum(variance, 0)))
        del mine[:-MOST_SAMPLES]

    def _count_updates(self) -> None:
        """Counts, while the training step is traced, how often it assigns each moving mean. A step that was traced
        before is traced anew."""
        self._counts = {id(tap.layer): 0 for tap in self._taps}
        graphs: dict[tuple[int, int], int] = {}
        for tap in self._taps:
            variable, layer = tap.layer.moving_mean, tap.layer

            def counting(new: Any, *args: Any, _own: Any = variable.assign, _layer: Any = layer, **kwargs: Any) -> Any:
                if not _in_first_replica():  # the others' assignments are parts of the same update
                    pass
                elif tf.inside_function():
                    graph = tf.compat.v1.get_default_graph()
                    looped = "while" in graph.name
                    key = id(_layer), id(graph)
                    graphs[key] = graphs.get(key, 0) + 1
                    self._counts[id(_layer)] = None if looped else graphs[key]
                else:
                    self._counts[id(_layer)] = None  # eager: calls can't be told from steps
                return _own(new, *args, **kwargs)

            vars(variable)["assign"] = counting
            self._restore.append(variable)
        self.model.make_train_function(force=True)
        self._counted = self.model.train_function

    def _stop_counting(self) -> None:
        for variable in self._restore:
            vars(variable).pop("assign", None)
        self._restore = []

    def _say(self, epoch: int, verdict: Verdict) -> None:
        if verdict.code not in self.verdicts:
            self.verdicts[verdict.code] = epoch, verdict
            if self._verbose:
                print(_message(epoch, verdict))

    # ---- judging -----------------------------------------------------------------------------------------------------

    def _figures(self) -> ModelFigures:
        rows = []
        for tap in self._taps:
            row = self._row(tap)
            reason = self._why_left(tap, row)
            if reason is not None:
                self.left[tap.name] = reason
            rows.append(row)
        far = max((row.gap for row in rows), default=0.0)
        noise = max((_noise(row) for row in rows), default=0.0)
        figures = ModelFigures(self.model.name, rows, distance=far, batch_distance=1.25 * noise)
        figures.iterations, figures.batches = self._steps(), MOST_SAMPLES
        return figures

    def _why_left(self, tap: Tap, row: LayerFigures) -> str | None:
        if tap.frozen:
            return "it is frozen"
        if row.momentum is None:
            return "momentum=None"
        if row.momentum > MOST_MOMENTUM:
            return f"at momentum {row.momentum} batch statistics can't be read back"
        if self._counts.get(id(tap.layer)) is None:
            return "it is updated in a loop, or eagerly: the updates of a step can't be counted"
        if row.seen or self._counts[id(tap.layer)] == 0:
            return None
        return "no step was read: the budget was spent" if not self._reads else "what it sees isn't finite"

    def _row(self, tap: Tap) -> LayerFigures:
        layer = tap.layer
        moving = [value(v).astype(np.float64).ravel() for v in (layer.moving_mean, layer.moving_variance)]
        row = LayerFigures(
            tap.name,
            float(keras.ops.convert_to_numpy(layer.epsilon)),
            None if layer.momentum is None else float(keras.ops.convert_to_numpy(layer.momentum)),
            moving[0],
            moving[1],
            frozen=tap.frozen,
            trained=has_trained(layer),
            start=starting_statistics(layer, len(moving[0])),
            infinite_state=broken_weights(layer),
        )
        samples = self._samples[tap.index]
        if samples and all(np.isfinite(mean).all() and np.isfinite(variance).all() for mean, variance in samples):
            estimate = Estimate()
            estimate.extend(Moments(1.0, mean, variance) for mean, variance in samples)
            row.mean, row.variance = estimate.result()
            row.between = np.var([mean for mean, _ in samples], axis=0)
            row.within = np.mean([variance for _, variance in samples], axis=0)
            row.batches = min(len(samples), 3)  # too few to find batches of different kinds
            row.sites, row.count = [(row.mean, row.variance)], float(len(samples))
            noise = _noise(row)
            row.samples = row.per_batch = 1 / noise**2 if noise > 0 else 1e9
            row.step = (
                row.gap * (1 - row.momentum) if row.momentum is not None else None
            )  # at least: it has fallen behind
        elif self._counts.get(id(layer)) == 0 and not tap.frozen and self._steps() and row.start is not None:
            row.never_training = row.at_start
        return row

    def _will_pass(self, verdict: Verdict, figures: ModelFigures, epoch: int) -> bool:
        """Whether the rest of the training will undo it."""
        if verdict.code not in ("too-few-updates", "drift", "stale"):
            return False
        epochs, steps = self.params.get("epochs"), self.params.get("steps")
        momenta = [row.momentum for row in figures.layers if row.name in verdict.layers and row.momentum is not None]
        if not epochs or not steps or not momenta:
            return verdict.code != "too-few-updates"
        left = (epochs - 1 - epoch) * steps
        return left > 0 and bool(max(momenta) ** (left + (figures.iterations or 0)) < POSSIBLE_SHARE)

    def _write(self, epoch: int, figures: ModelFigures) -> None:
        with self._writer.as_default():
            for row in figures.layers:
                if row.usable and row.seen:
                    _scalar(f"batch_norm/{row.name}/gap", row.gap, epoch)
                    _scalar(f"batch_norm/{row.name}/mean_off", float(np.sqrt(np.mean(row.shift**2))), epoch)
                    _scalar(f"batch_norm/{row.name}/variance_log2", float(np.median(row.ratio)), epoch)
        self._writer.flush()


def _in_first_replica() -> bool:
    """Whether this isn't the trace of a second replica of a tf.distribute strategy."""
    context = tf.distribute.get_replica_context()
    if context is None:
        return True
    replica = context.replica_id_in_sync_group
    return not (tf.get_static_value(replica) if tf.is_tensor(replica) else replica)


def _scalar(tag: str, number: float, step: int) -> None:
    """What tf.summary.scalar writes; that function needs the package tensorboard."""
    metadata = tf.compat.v1.SummaryMetadata()
    metadata.plugin_data.plugin_name = "scalars"
    metadata.data_class = 1  # DATA_CLASS_SCALAR
    tf.summary.write(tag, tf.constant(number, tf.float32), step=step, metadata=metadata)


def _noise(row: LayerFigures) -> float:
    """The spread of the batch means, in standard deviations of the data."""
    if row.between is None or row.variance is None or row.count < 4:
        return 0.0
    return float(np.sqrt(np.median(row.between / (row.variance + max(row.epsilon, 1e-12)))))


def _message(epoch: int, verdict: Verdict) -> str:
    reasons = " ".join(verdict.reasons)
    layers = ", ".join(verdict.layers[:3]) + (" ..." if len(verdict.layers) > 3 else "")
    return f"\nbnfast, epoch {epoch + 1}: {verdict.title} ({layers}). {reasons} Cure: {verdict.cure}"
