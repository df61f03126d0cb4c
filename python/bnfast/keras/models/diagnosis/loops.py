"""Calls inside Keras's loops: which of them are steps, and which only tell the shape of the output.

`rnn` (of keras.layers.RNN, unless unrolled) and `keras.ops.map` call their function once more than there are steps,
before the steps, and discard what it returns. In eager mode that call is computed, and in a graph with masks or with a
loop in a loop, too: TensorFlow prunes only what nothing refers to. Only the loop's own frame tells: the variable that
holds the discarded result is not bound yet.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.src import backend  # Keras has no public names for these
from keras.src.legacy import backend as legacy

__all__ = ["Loop", "loop_around"]

# Per loop: the argument with the data, and the variable that is bound after the first call.
_LOOPS = {
    backend.rnn.__code__: ("inputs", "output_time_zero"),
    legacy.rnn.__code__: ("inputs", "output_time_zero"),
    backend.core.map.__code__: ("xs", "fn_output_signature"),
}


class Loop(NamedTuple):
    """The outermost loop around a call.

    Attributes:
        key: the same in all calls within one run of the loop; a later run may have it again.
        starts: whether this is its call for the shape, which comes before all others of the run.
        discarded: whether the result is discarded, by this loop or by one inside it.
        path: from which line of code the call comes; equal in all steps.
    """

    key: int
    starts: bool
    discarded: bool
    path: tuple[tuple[int, int], ...]


def loop_around(layer: str) -> Loop | None:
    """The loop around this call, or None. layer: the name of the layer that is called, for the error.

    Raises:
        RuntimeError: the calls can't be told apart: a tf.function inside the loop, or another version of Keras.
    """
    path: list[tuple[int, int]] = []
    loop: Loop | None = None
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    frame: Any = sys._getframe(1)
    while frame is not None:
        data, variable = _LOOPS.get(frame.f_code, ("", ""))
        if data and not frame.f_locals.get("unroll"):
            if variable not in frame.f_code.co_varnames + frame.f_code.co_cellvars:
                raise _unclear(layer, f"the loop of Keras {keras.__version__} is unknown")
            leaf = keras.tree.flatten(frame.f_locals[data])[0]
            inside, graph = graph, leaf.graph if tf.is_symbolic_tensor(leaf) else None
            starts = variable not in frame.f_locals
            discarded = starts and inside is graph
            if starts and not discarded and (graph is None or loop or frame.f_locals.get("mask") is not None):
                # One trace serves both kinds of calls. Only a plain loop in a graph has the first one pruned.
                raise _unclear(layer, "it comes from a tf.function inside the loop")
            loop = Loop(id(frame), starts, discarded or (loop is not None and loop.discarded), tuple(path))
        path.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return loop


def _unclear(layer: str, why: str) -> RuntimeError:
    return RuntimeError(
        f"layer {layer} is called in a loop (RNN, keras.ops.map), and the loop's extra call, for the shape of the "
        f"output, can't be told from its steps: {why}. Without that tf.function, or with unroll=True, it can"
    )
