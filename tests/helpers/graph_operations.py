"""What a traced TensorFlow function runs."""

from typing import Any

import tensorflow as tf


def live(concrete: Any) -> list[str]:
    """The types of the operations that a concrete function runs for its results."""
    seen: dict[str, str] = {}
    waiting = tf.nest.flatten(concrete.structured_outputs)
    while waiting:
        tensor = waiting.pop()
        if tensor.op.type == "IdentityN":  # TensorFlow prunes the inputs whose outputs nobody reads
            waiting.append(tensor.op.inputs[tensor.value_index])
        elif tensor.op.name not in seen:
            seen[tensor.op.name] = tensor.op.type
            waiting += tensor.op.inputs
    return list(seen.values())
