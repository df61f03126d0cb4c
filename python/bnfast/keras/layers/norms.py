"""What the constructors of the layer, group and instance norms share."""

from __future__ import annotations

import math
from typing import Any

from .framework import check_backend


def check(layer: Any) -> None:
    """Checks the backend and epsilon, and marks the layer as not compilable by XLA."""
    check_backend(type(layer).__name__)
    if not (layer.epsilon >= 0 and math.isfinite(layer.epsilon)):
        raise ValueError(f"epsilon must be finite and >= 0. Received: {layer.epsilon}")
    layer.supports_jit = False  # XLA has no kernel for a callback
