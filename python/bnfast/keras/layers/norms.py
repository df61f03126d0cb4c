"""What the constructors of the layer, group and instance norms share."""

from __future__ import annotations

import math
from typing import Any

from .framework import supports_jit


def check(layer: Any) -> None:
    """Checks epsilon, and tells Keras whether XLA can compile the layer."""
    if not (layer.epsilon >= 0 and math.isfinite(layer.epsilon)):
        raise ValueError(f"epsilon must be finite and >= 0. Received: {layer.epsilon}")
    layer.supports_jit = supports_jit("auto")
