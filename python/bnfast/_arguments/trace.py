"""What is fused with a batch norm while a program is traced, by whichever framework traces it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GATES", "Trace"]

# Scripts multiply what these read by the result (x*sigmoid(x)): the batch norm's output is needed then, too.
GATES = frozenset({"sigmoid", "hard_sigmoid", "tanh", "softplus"})


@dataclass
class Trace:
    """What became of one call of a layer while it was traced, for reports."""

    most: int = 2  # operations that may be fused: more would repeat the call for other readers of what lies between
    alone: bool = False  # whether the model shows that a single operation reads the output
    in_graph: bool = False
    fused: tuple[str, ...] = ()
