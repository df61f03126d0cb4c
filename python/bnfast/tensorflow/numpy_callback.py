"""TensorFlow tensors <-> NumPy arrays around one Python function, in graph and in eager mode, without a copy.

Graph mode is tf.numpy_function(stateful=False): TF hands out aliases of its buffers (writeable ones: nothing here or
below may write them, `outs` excepted) and adopts an output as it is where that is C-contiguous, of the dtype announced,
and 64-byte aligned, as all outputs of the kernels are. Statics are the caller's: a numpy_function has neither shape nor
gradient.
Eager tensors go in through the buffer protocol and come out through DLPack; numpy_function would copy both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

Function = Callable[..., Sequence[np.ndarray]]
Direct = Callable[[list[str], Function], Function]

# A DLPack capsule costs about 5 us, a copy of 16 KiB about 1: below this, copying is both simpler and faster.
_ADOPT_BYTES = 16 * 1024
_ALIGNMENT = 64  # TensorFlow aborts the process on a DLPack pointer that is not a multiple of this


def call(
    function: Function,
    tensors: Mapping[str, tf.Tensor],
    dtypes: Sequence[tf.DType],
    direct: Direct | None = None,
    outs: Mapping[str, str] | None = None,
) -> list[tf.Tensor]:
    """function(**arrays) as TensorFlow tensors of `dtypes`. The function reads its arrays and never writes them.

    outs: the function's arguments for arrays to write outputs to and return, each with the name of the tensor that has
    its shape and dtype. Given in graph mode: TensorFlow's memory, which its allocator uses for other tensors, too.
    direct: makes of the arrays' names and the function what is called in its place, with the arrays in their order;
    arrays to write come as integers (_unwritten).
    """
    lent = {} if outs is None or tf.executing_eagerly() else outs
    tensors = {**tensors, **{out: _unwritten(tensors[like]) for out, like in lent.items()}}
    names = list(tensors)

    def callback(*arrays: np.ndarray) -> Sequence[np.ndarray]:
        words = dict(zip(names, arrays, strict=True))
        for out, like in lent.items():
            words[out] = words[out].view(words[like].dtype)
        return function(**words)

    if direct is not None:
        callback = direct(names, callback)

    if tf.executing_eagerly():
        return [to_tensor(array) for array in callback(*map(to_array, tensors.values()))]
    return list(tf.numpy_function(callback, list(tensors.values()), list(dtypes), stateful=False))


def _unwritten(like: tf.Tensor) -> tf.Tensor:
    """Memory for an output like that tensor, taken when the tensor is there and no sooner.

    As integers: tf.debugging.enable_check_numerics would find NaNs in floats that nobody has written yet.
    """
    with tf.control_dependencies([like]):
        return tf.raw_ops.Empty(shape=tf.shape(like), dtype=f"int{8 * like.dtype.size}", init=False)


def to_array(tensor: tf.Tensor) -> np.ndarray:
    """A read-only array over the buffer of an eager tensor, which it keeps alive."""
    if tensor.dtype == tf.bfloat16:  # no buffer-protocol code for it: travel as the same 16 bits
        return np.asarray(memoryview(tf.bitcast(tensor, tf.uint16))).view(tf.bfloat16.as_numpy_dtype)
    return np.asarray(memoryview(tensor))


def to_tensor(array: np.ndarray) -> tf.Tensor:
    """An eager tensor over the array's buffer, which it keeps alive; over a copy of a small or unaligned one."""
    if array.nbytes < _ADOPT_BYTES or array.__array_interface__["data"][0] % _ALIGNMENT:
        return tf.convert_to_tensor(array)
    if array.dtype == tf.bfloat16.as_numpy_dtype:
        return tf.bitcast(to_tensor(array.view(np.uint16)), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
