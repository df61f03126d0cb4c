"""`BatchNorm`, a drop-in for flax.nnx.BatchNorm on bnfast's kernels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

try:
    from flax import nnx
    from flax.nnx.nn.dtypes import promote_dtype
except ModuleNotFoundError as error:
    if error.name != "flax":
        raise  # another package is missing: its own message is clearer
    raise ImportError('bnfast.jax.nnx needs Flax, which is not installed: pip install "bnfast[flax]"') from error

from .._arguments import checks
from .functional import batch_norm_infer, batch_norm_train
from .reference import activate
from .support import log_once

__all__ = ["BatchNorm"]


class BatchNorm(nnx.BatchNorm):  # type: ignore[misc]
    """flax.nnx.BatchNorm, a subclass of it: the same arguments, variables, dtypes, modes and errors.

        y = activation(scale * (x - mean)/sqrt(var + epsilon) + bias + residual)

    Calls that the kernels don't take run on Flax's own code, and the logger "bnfast.jax" says once per reason why: with
    `axis_name` (statistics over devices), a mask that differs between channels, or another dtype than float32, float64,
    float16 and bfloat16.

    Args:
        num_features, and all keywords of flax.nnx.BatchNorm but `activation` and `negative_slope`: as there.
        activation: applied in the same pass: None, "relu", "relu6", "leaky_relu" and the others of
            `bnfast.jax.batch_norm_train`.
        negative_slope: of leaky_relu.

    Example:
        >>> import jax.numpy as jnp
        >>> from bnfast.jax.nnx import BatchNorm
        >>> from flax import nnx
        >>> layer = BatchNorm(2, momentum=0.5, epsilon=0.0, activation="relu", rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
        Array([[0., 0.],
               [1., 1.]], dtype=float32)
        >>> layer.mean[...]
        Array([ 1., 10.], dtype=float32)

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """

    def __init__(
        self, num_features: int, *, activation: str | None = None, negative_slope: float = 0.2, **kwargs: Any
    ) -> None:
        self.activation = checks.activation(activation)
        self.negative_slope = checks.real("negative_slope", negative_slope)
        super().__init__(num_features, **kwargs)

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """Normalize x; with the batch's statistics, update `mean` and `var`.

        Args:
            x, use_running_average, mask: as in flax.nnx.BatchNorm; True in the mask is a value that counts.
            residual: array with the shape and dtype of the result, added before the activation.

        Raises:
            ValueError, TypeError: those of Flax; a residual of another shape or dtype.
        """
        given = self.use_running_average if use_running_average is None else use_running_average
        parameters = tuple(None if one is None else one[...] for one in (self.scale, self.bias))
        promote = getattr(self, "promote_dtype", promote_dtype)  # Flax 0.12.0 has no argument of that name
        promoted, _, _, scale, bias = promote((x, self.mean[...], self.var[...], *parameters), dtype=self.dtype)
        reason = self._why_flax(promoted, None if given else mask)
        if given is None or reason:
            if reason:
                log_once(f"flax.nnx.BatchNorm {reason}")
            y = super().__call__(x, use_running_average, mask=mask)
            return activate(y if residual is None else y + residual, self.activation, self.negative_slope)
        options = {"axis": self.axis, "epsilon": self.epsilon, "activation": self.activation}
        options |= {"negative_slope": self.negative_slope, "residual": residual}
        moving = self.mean[...], self.var[...]
        if given:
            return batch_norm_infer(promoted, *moving, scale, bias, **options)
        weights = None if mask is None else self._weights(promoted, mask)
        result = batch_norm_train(promoted, scale, bias, *moving, momentum=self.momentum, mask=weights, **options)
        new = result.moving_mean, result.moving_variance
        for variable, value in zip((self.mean, self.var), new, strict=True):
            variable[...] = jax.lax.stop_gradient(value) if getattr(variable, "_can_update", False) else value
        return result.y

    def _why_flax(self, x: jax.Array, mask: jax.Array | None) -> str:
        if self.axis_name is not None:
            return "takes the mean of its statistics over devices (axis_name)"
        if x.dtype not in (jnp.float32, jnp.float64, jnp.float16, jnp.bfloat16):
            return f"has an input of dtype {x.dtype}"
        if mask is None:
            return ""
        axes = self.axis if isinstance(self.axis, tuple | list) else (self.axis,)
        shape = (1,) * (x.ndim - mask.ndim) + mask.shape
        channels = {axis % x.ndim for axis in axes}
        return "has a mask that differs between channels" if any(shape[i] != 1 for i in channels) else ""

    def _weights(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """The mask with the rank of x, as `batch_norm_train` takes it."""
        return mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
