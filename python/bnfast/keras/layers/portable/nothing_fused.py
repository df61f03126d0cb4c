"""What the layers ask of TensorFlow's graphs, where there is none: nothing is fused, folded or passed over.

Fusion on JAX: jax_fusion.
"""

from __future__ import annotations

from typing import Any

from ...._arguments.trace import Trace

__all__ = ["Trace", "keep"]


def keep(x: Any) -> None:
    """Marks x as a tensor that something else will read; nothing would fold it anyway."""
