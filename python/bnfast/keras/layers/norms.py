"""What the constructors of the layer, group and instance norms share."""

from __future__ import annotations

import math
from typing import Any

from .framework import check_backend, on_own_ops


def check(layer: Any) -> None:
    """Checks the backend and epsilon, and tells Keras whether XLA can compile the layer."""
    check_backend(type(layer).__name__)
    if not (layer.epsilon >= 0 and math.isfinite(layer.epsilon)):
        raise ValueError(f"epsilon must be finite and >= 0. Received: {layer.epsilon}")
    layer.supports_jit = on_own_ops("auto")  # XLA has no kernel for a callback
