"""An MLP trained in NumPy: batch norm's forward and backward come from bnfast, everything else is written here.

Dense, batch norm with a fused ReLU, Dense, softmax cross-entropy; SGD with momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bnfast
import common
import numpy as np

RATE = 0.1
INERTIA = 0.9
HIDDEN = 128


class MLP:
    """Two dense layers with batch norm between them. The first has no bias, because beta follows it."""

    def __init__(self, inputs: int, classes: int) -> None:
        normal = np.random.default_rng(0).standard_normal
        self.hidden = normal((inputs, HIDDEN), "float32") * np.float32((2 / inputs) ** 0.5)
        self.norm = bnfast.BatchNormalization(momentum=0.9, activation="relu")
        self.norm.build(HIDDEN)
        self.output = normal((HIDDEN, classes), "float32") * np.float32((1 / HIDDEN) ** 0.5)
        self.bias = np.zeros(classes, "float32")
        self.parameters: list[Any] = [self.hidden, self.norm.gamma, self.norm.beta, self.output, self.bias]
        self.velocities = [np.zeros_like(parameter) for parameter in self.parameters]

    def logits(self, x: Any, *, training: bool) -> tuple[Any, Any]:
        """The class scores, and the hidden values they are computed from."""
        hidden = self.norm(x @ self.hidden, training=training)
        return hidden @ self.output + self.bias, hidden

    def step(self, x: Any, labels: Any) -> float:
        """Make one step of SGD and return the loss before it."""
        scores, hidden = self.logits(x, training=True)
        rows = np.arange(len(x))
        scores -= scores.max(axis=1, keepdims=True)
        probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        loss = -np.log(probabilities[rows, labels]).mean()

        dscores = probabilities
        dscores[rows, labels] -= 1
        dscores /= len(x)
        dx = self.norm.backward(dscores @ self.output.T)
        gradients = [x.T @ dx, self.norm.dgamma, self.norm.dbeta, hidden.T @ dscores, dscores.sum(axis=0)]
        for parameter, velocity, gradient in zip(self.parameters, self.velocities, gradients, strict=True):
            velocity *= INERTIA
            velocity -= RATE * gradient
            parameter += velocity  # in place: norm.gamma and norm.beta are among them
        return float(loss)


def main(argv: Sequence[str] | None = None) -> float:
    """Train and return the test accuracy."""
    steps = common.parse_steps(__doc__, argv)
    data = common.digits(flat=True)
    model = MLP(inputs=64, classes=10)
    loss = float("nan")
    for x, labels in common.batches(data, steps):
        loss = model.step(x, labels)
    scores, _ = model.logits(data.x_test, training=False)
    accuracy = float((scores.argmax(axis=1) == data.y_test).mean())
    print(f"mlp_numpy: last loss {loss:.3f}, test accuracy {100 * accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
