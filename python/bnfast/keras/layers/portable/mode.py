"""What one call does: which statistics normalize, and whether the moving statistics are updated.

    use_batch_statistics   None: the batch's if the call trains; True: always the batch's; False: always the moving ones
    update_statistics      whether a call that trains updates the moving statistics

`training` may be a boolean tensor whose value is known only when JAX's program runs. `step` then builds both branches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops


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
    """Whether a call trains: False, True, or a boolean tensor whose value is known only when the program runs."""
    known = static_bool(training)
    if not trainable or known is False:
        return False
    return ops.cast(training, "bool") if known is None else True


def may_train(training: Any) -> bool:
    """Whether the call trains or, if `training` is a tensor of unknown value, may train."""
    return static_bool(training) is not False


def static_bool(value: Any) -> bool | None:
    """bool(value), or None for a tensor that has no value yet."""
    try:
        return bool(value)
    except (TypeError, RuntimeError):  # of a tracer of JAX's; of PyTorch's tensors without memory
        return None
