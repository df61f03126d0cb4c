"""One CNN, trained once for each of several batch norms: same seed, same batches, same number of steps.

The trainings advance in turn, one step each, and who goes first changes at every step, so whatever else the machine is
doing falls on all of them alike. A time is that of `train_on_batch`, from the NumPy batch to the loss. XLA is off for
every training: bnfast's layer doesn't compile under it, and the rest of the model should run as the same operations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bnfast.cli.datasets import Dataset

SEED = 7
WATCHED = "norm_2"  # the layer whose moving statistics are recorded at every step
UNTIMED_STEPS = 5  # the first traces the graph (about a second), a few more warm TensorFlow's allocator and thread pool


@dataclass
class History:
    """What one training left behind: a value a step, but test_accuracy, which is one an epoch."""

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    moving_mean: list[npt.NDArray[Any]] = field(default_factory=list)
    moving_variance: list[npt.NDArray[Any]] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)

    @property
    def timed_seconds(self) -> list[float]:
        """The step times that count: those after the first UNTIMED_STEPS."""
        return self.seconds[UNTIMED_STEPS:]

    @property
    def step_ms(self) -> float:
        """The median of the timed steps in milliseconds; NaN where there was none."""
        return 1e3 * float(np.median(self.timed_seconds)) if self.timed_seconds else float("nan")


def build_model(batch_norm: type, image_shape: tuple[int, ...]) -> Any:
    """A CNN of three convolutions, each followed by `batch_norm` and ReLU; about 30 000 weights."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(SEED)
    model = keras.Sequential([layers.Input(image_shape)])
    for index, filters in enumerate((32, 32, 64), start=1):
        model.add(layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"conv_{index}"))
        model.add(batch_norm(momentum=0.9, name=f"norm_{index}"))
        model.add(layers.ReLU(name=f"relu_{index}"))
        if index > 1:
            model.add(layers.MaxPooling2D(name=f"pool_{index}"))
    model.add(layers.GlobalAveragePooling2D(name="average"))
    model.add(layers.Dense(10, name="logits"))
    model.compile(
        optimizer=keras.optimizers.Adam(2e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    return model


def train(
    batch_norms: Mapping[str, type],
    data: Dataset,
    *,
    epochs: int,
    batch: int,
    advance: Callable[[int], object] = lambda steps: None,
) -> dict[str, History]:
    """Train one model for each of `batch_norms` side by side; `advance(n)` is called after n more steps of each."""
    models = {name: build_model(layer, data.image_shape) for name, layer in batch_norms.items()}
    histories = {name: History() for name in models}
    turns = list(models)
    shuffle = np.random.default_rng(SEED)
    for _ in range(epochs):
        order = shuffle.permutation(len(data.x_train))
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            x, y = data.x_train[chosen], data.y_train[chosen]
            for name in turns:
                _step(models[name], x, y, histories[name])
            turns.reverse()
            advance(1)
        for name, model in models.items():
            _, accuracy = model.evaluate(data.x_test, data.y_test, batch_size=256, verbose=0)
            histories[name].test_accuracy.append(float(accuracy))
    return histories


def _step(model: Any, x: npt.NDArray[Any], y: npt.NDArray[Any], history: History) -> None:
    before = time.perf_counter()
    loss, _ = model.train_on_batch(x, y)
    history.seconds.append(time.perf_counter() - before)
    watched = model.get_layer(WATCHED)
    history.loss.append(float(loss))
    history.moving_mean.append(watched.moving_mean.value.numpy())
    history.moving_variance.append(watched.moving_variance.value.numpy())
