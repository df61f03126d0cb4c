"""What the layers ask of TensorFlow's graphs, where there is none: nothing is fused, folded or passed over.

Fusion on JAX: jax_fusion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Trace:
    """What became of one call of a layer, for reports: nothing is fused with it."""

    most: int = 0
    alone: bool = False
    in_graph: bool = False
    fused: tuple[str, ...] = ()


def keep(x: Any) -> None:
    """Marks x as a tensor that something else will read; nothing would fold it anyway."""
