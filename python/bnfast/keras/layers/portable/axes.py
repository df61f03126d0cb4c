"""The channel axes of x, one or several, and one axis in place of several: bnfast.tensorflow.axes over keras.ops."""

from __future__ import annotations

import math
from typing import Any

from keras import ops

from ...._arguments.tensor_axes import TensorAxes


class Axes(TensorAxes):
    def merge(self, x: Any) -> Any:
        """x, or a tensor of its rank, with its axes as one at `place`."""
        if len(self.axes) == 1:
            return x
        x = x if self.adjacent else ops.transpose(x, self.order)
        shape, end = x.shape, self.place + len(self.axes)
        return ops.reshape(x, (*shape[: self.place], math.prod(shape[self.place : end]), *shape[end:]))

    def split(self, y: Any, x: Any) -> Any:
        """The inverse of `merge`: y in the shape of x."""
        if len(self.axes) == 1:
            return y
        if self.adjacent:
            return ops.reshape(y, tuple(x.shape))
        y = ops.reshape(y, tuple(x.shape[i] for i in self.order))
        return ops.transpose(y, [self.order.index(i) for i in range(self.rank)])

    def mask(self, mask: Any, x: Any, attached: bool) -> Any:
        """A mask as booleans of the rank of x, before `merge`. See `mask_axes`."""
        mask = ops.cast(ops.convert_to_tensor(mask), "bool")
        for axis in self.mask_axes(tuple(mask.shape), tuple(x.shape), attached):
            mask = ops.expand_dims(mask, axis)
        constant = len(self.axes) == 1 or all(mask.shape[axis] == 1 for axis in self.axes)
        return mask if constant else ops.broadcast_to(mask, tuple(x.shape))
