"""A training step that may be emitted more than once while a graph is traced: its record, for `fusion`.

If what reads y is fused with the step, a second op computes the whole step. Readers of the moving statistics of the
first op are moved to the second. The fused op hands dy = dout*activation'(out) to y. If exactly this tensor arrives at
the batch norm, the gradient of the batch norm is the fused one, which the kernel computes from dout, and dy is pruned.
If anything was added to it, the gradient is that of dy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from .. import fusion, ops
from ..batch import Batch, Options
from ..pullback import inside
from . import bias

Gradients = dict[str, tf.Tensor]  # of x, gamma, beta and residual, where present


@dataclass(eq=False, kw_only=True)
class Step(fusion.Record):
    """One training step: its arguments, and the op that computes it now."""

    momentum: Any
    attributes: dict[str, Any]
    bridge: ops.KernelBridge
    saved: Any = None  # the batch's statistics, from the op that computes the step now; the bridge sets it
    updated: tuple[tf.Tensor, ...] = ()  # the moving statistics, from that op
    _fused: list[tuple[tf.Tensor, Gradients]] = field(default_factory=list)

    def run(self, options: Options, residual: tf.Tensor | None = None) -> tf.Tensor:
        """Emits an op for the step and makes it the one that updates the moving statistics."""
        batch = self.batch._replace(residual=residual)
        y, *updated = self.bridge.train_step(batch, self.moving, self.momentum, options, **self.attributes, record=self)
        for old, new in zip(self.updated, updated, strict=False):
            _move_readers(old, new)
        self.updated = tuple(updated)
        return y

    def gradients(self, dy: tf.Tensor, options: Options) -> Gradients:
        """The fused gradients if dy is what a fused op handed back, else those of dy."""
        return self._handed(dy) or self._gradients_of(dy, options)

    def gradient_of_residual(self, dsum: tf.Tensor) -> tf.Tensor:
        handed = self._handed(dsum)
        return dsum if handed is None else handed["residual"]

    def gradient_before_activation(
        self, dout: tf.Tensor, z: tf.Tensor, out: tf.Tensor, options: Options, residual: tf.Tensor | None
    ) -> tf.Tensor:
        gradients = self._gradients_of(dout, options, residual, out)
        dy = super().gradient_before_activation(dout, z, out, options, residual)
        self._fused.append((dy, gradients))
        return dy

    def _handed(self, dy: tf.Tensor) -> Gradients | None:
        """The fused gradients, if dy is exactly what a fused op handed back."""
        return next((gradients for handed, gradients in self._fused if handed is dy), None)

    def _gradients_of(self, dy: tf.Tensor, options: Options, residual: Any = None, y: Any = None) -> Gradients:
        """The gradients for the gradient dy of y, the output of `run` with these options and this residual."""
        batch = self.batch._replace(residual=residual)
        gradients = self.bridge.step_gradient(dy, batch, self.saved, options, y)
        if batch.mask is None:
            bias.mark(gradients["x"], options.axis)
        return gradients


def train_step(
    batch: Batch,
    moving: tuple[tf.Tensor, tf.Tensor],
    momentum: Any,
    options: Options,
    bridge: ops.KernelBridge,
    trace: fusion.Trace,
    **attributes: Any,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """`ops.train_step` without residual and activation, whose y is marked."""
    trace.in_graph = True
    batch = Batch(*(None if tensor is None else inside(tensor) for tensor in batch))
    last = fusion.last_operation()
    step = Step(batch, moving, options, trace, last, momentum=momentum, attributes=attributes, bridge=bridge)
    y = step.run(options)
    fusion.mark(y, step)
    return (y, *step.updated)


def _move_readers(old: tf.Tensor, new: tf.Tensor) -> None:
    for reader in old.consumers():
        for index, tensor in enumerate(reader.inputs):
            if tensor is old:
                reader._update_input(index, new)
