"""What one call does: which statistics normalize, and whether the moving statistics are updated.

    use_batch_statistics   None: the batch's if the call trains; True: always the batch's; False: always the moving ones
    update_statistics      whether a call that trains updates the moving statistics

`training` may be a boolean tensor whose value is known only when the graph runs. `step` then builds both branches under
a tf.cond. Replicas can't communicate inside a tf.cond, so `synchronized` selects the result itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf


class Mode(NamedTuple):
    """The mode of one call. `is_training` is False, True or a boolean tensor, and so are the two properties."""

    is_training: Any
    use_batch_statistics: bool | None = None
    update_statistics: bool = True

    @property
    def use_batch(self) -> Any:
        """Whether the batch's own statistics normalize it."""
        return self.is_training if self.use_batch_statistics is None else self.use_batch_statistics

    @property
    def update(self) -> Any:
        """Whether the moving statistics are updated."""
        return self.is_training if self.update_statistics else False


def is_training(training: Any, trainable: bool) -> Any:
    """Whether a call trains: False, True, or a boolean tensor whose value is known only when the graph runs."""
    if not trainable or not may_train(training):
        return False
    if tf.is_tensor(training) and tf.get_static_value(training) is None:
        return tf.cast(training, tf.bool)
    return True


def may_train(training: Any) -> bool:
    """Whether the call trains or, if `training` is a tensor of unknown value, may train."""
    if tf.is_tensor(training):
        training = tf.get_static_value(training)
        return training is None or bool(training)
    return bool(training)
