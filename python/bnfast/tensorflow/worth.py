"""Whether a batch norm of some size gains by bnfast's kernels in TensorFlow, as measured."""

from __future__ import annotations

from . import numpy_callback, op, op_library


def why_slower(shape: tuple[int | None, ...] | None, dtype: str, bridge: str) -> str | None:
    """Why a layer with inputs of this shape would be slower on bnfast than on Keras's own code; or None.

    Where TensorFlow sees a GPU, every call would copy x, y, dy and dx over the bus: some 100x the time by the
    bandwidths of PCIe and of a GPU's memory, which was not measured. The rest was: through the TensorFlow op no layer
    is slower: (8, 32) takes 0.83x Keras's time. If the op can't be loaded, a callback each way costs 0.13 ms more than
    Keras's ops on little data: (32, 300) takes 2.1x Keras's time, 256 KiB 1.1x, 512 KiB 0.55x. A bridge that is asked
    for by name obeys.
    """
    if op_library.wanted(bridge) != "auto":
        return None
    chosen = op.choose(bridge)
    if chosen == "tensorflow":
        return op.GPU_REASON
    if chosen == "op" or shape is None or None in shape[1:]:
        return None
    size = numpy_callback.input_bytes(shape, dtype)
    if size >= numpy_callback.SMALL_BYTES:
        return None
    return (
        f"{size / 1024:.0f} KiB of input (a batch of unknown size counts as {numpy_callback.USUAL_BATCH} samples) are "
        f"too little for numpy_function, and the TensorFlow op can't be used: {op.status()[1]}"
    )
