"""The channel axes of x, one or several, and one axis in place of several.

Adjacent axes merge by a reshape. Others are moved to the end first: x is copied before the step and y after it, and so
are dy and dx. One axis needs no merging: both methods are then the identity.
"""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from .._arguments.tensor_axes import TensorAxes


class Axes(TensorAxes):
    def merge(self, x: tf.Tensor) -> tf.Tensor:
        """x, or a tensor of its rank, with its axes as one at `place`."""
        if len(self.axes) == 1:
            return x
        x = x if self.adjacent else tf.transpose(x, self.order)
        extents = [tf.shape(x)[i] if extent is None else extent for i, extent in enumerate(x.shape)]
        end = self.place + len(self.axes)
        return tf.reshape(x, [*extents[: self.place], math.prod(x.shape[self.place : end]), *extents[end:]])

    def split(self, y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        """The inverse of `merge`: y in the shape of x."""
        if len(self.axes) == 1:
            return y
        if self.adjacent:
            y = tf.reshape(y, tf.shape(x))
        else:
            y = tf.transpose(tf.reshape(y, tf.gather(tf.shape(x), self.order)), tf.argsort(self.order))
        y.set_shape(x.shape)
        return y

    def mask(self, mask: Any, x: tf.Tensor, attached: bool) -> tf.Tensor:
        """A mask as booleans of the rank of x, before `merge`. See `mask_axes`."""
        mask = tf.cast(mask, tf.bool)
        for axis in self.mask_axes(mask.shape, x.shape, attached):
            mask = tf.expand_dims(mask, axis)
        constant = len(self.axes) == 1 or all(mask.shape[axis] == 1 for axis in self.axes)
        return mask if constant else tf.broadcast_to(mask, tf.shape(x))
