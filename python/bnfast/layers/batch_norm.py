"""A batch normalization layer over NumPy arrays: parameters, moving statistics, forward, backward, state.

It holds arrays and passes them to `_forward`; no numerics live here. `backward` reads what the last call kept: a
reference to x, mask and residual (no copies, so these must not be overwritten in between), and mean and invstd; where
samples have something of their own (_per_sample.py), also xhat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .._arguments import checks as _checks
from .._arguments.arrays import Array
from .._arguments.axes import Axes
from ..functional.batch_norm import GradResult
from . import (
    convert_keras as convert,
)
from . import (
    convert_torch,
)
from . import (
    forward as _forward,
)
from . import (
    ghosts as _ghosts,
)
from . import (
    per_sample as _per_sample,
)
from . import (
    renorm as _renorm_step,
)
from .batch import Batch, Policy, Renorm

__all__ = ["BatchNormalization"]


class BatchNormalization:
    """Batch normalization with learned gamma and beta and moving statistics.

        layer = BatchNormalization()
        y = layer(x, training=True)     # normalizes with the batch, updates moving_mean and moving_variance
        dx = layer.backward(dy)         # and sets layer.dgamma, layer.dbeta, layer.dresidual
        layer.gamma -= rate * layer.dgamma
        y = layer(x)                    # inference: normalizes with the moving statistics

    Args:
        axis: the channel axis; or several, as (1, 2): each pair of their indices is a channel then, and (C,) stands
            for their extents in the order of x, as (3, 4).
        momentum: weight of the old moving value (PyTorch's momentum is 1 minus this). None: the moving statistics are
            the plain averages over all batches so far, empty and fully masked ones aside.
        epsilon: added to the variance. Keras's default 1e-3; PyTorch's is 1e-5.
        center, scale: whether there is a beta, a gamma. Where not, it is None.
        activation: None, "relu", "relu6" or "leaky_relu" (with `negative_slope`), fused.
        nan_policy: "propagate", "skip_update" or "raise", see `batch_norm_train`.
        correction: 0 keeps the population variance in moving_variance (Keras), 1 the sample variance (PyTorch).
        dtype: of the parameters, "float32" or "float64"; None: float64 where the first x is, else float32.
        trainable: False freezes the layer, as in Keras: a call with training=True then runs like training=False.
        virtual_batch_size: training normalizes each so many samples (axis 0) by themselves, as ghost batches (Hoffer
            2017, https://arxiv.org/abs/1705.08741), and must divide the batch; the moving statistics take the mean of
            the ghosts' statistics, those that hold nothing aside. None: the batch is one.
        virtual_batch_grouping: "contiguous": samples side by side make a ghost; "strided": every G-th of G ghosts (TF
            1's, and tf.keras 2's), at one copy of x and y.
        renorm: batch renormalization (Ioffe 2017, https://arxiv.org/abs/1702.03275) as in Keras: in training y =
            gamma*(xhat*r + d) + beta with r and d of `renorm_correction`; x is read once more. Not with ghosts or
            correction=1.
        renorm_clipping: a dict of rmin, rmax and dmax, or some of them; may be reassigned between steps.
        renorm_momentum: that of renorm_mean and renorm_stddev.
        update_statistics, use_batch_statistics, trainable_affine: which part of the layer is frozen, see below.
        adjustment: a function of x.shape that gives (scale, bias), which broadcast to x: in training y =
            activation((xhat*scale + bias)*gamma + beta + residual), as in TF 1. Constants to `backward`. Runs on NumPy
            after the kernels, which make xhat in x's dtype; `backward` keeps xhat. Not with ghosts.

    Three switches freeze a part of the layer, and may be reassigned between calls. "In training" means training=True
    and layer.trainable. trainable_affine=False leaves dgamma and dbeta None.

        use_batch_statistics  update_statistics   y uses                        moving statistics
        None (default)        True (default)      batch's in training           move in training
        None                  False               batch's in training           never move
        False                 True                moving ones                   move in training
        False                 False               moving ones                   never move
        True                  True                batch's, also in inference    move in training
        True                  False               batch's, also in inference    never move

    In (False, True) the moving statistics move after y, in a training pass of their own.

    Attributes:
        gamma, beta, moving_mean, moving_variance: arrays of shape (C,), None before `build`.
        moving_stddev, renorm_mean, renorm_stddev: with renorm, likewise.
        batches: how many batches the moving statistics have seen since `build`; part of the state with momentum=None.
        dgamma, dbeta, dresidual: set by `backward`, else None. dgamma (dbeta) stays None without scale (center).

    A layer can be pickled and deep-copied; what it kept for `backward` and the gradients stay behind.
    """

    gamma: Array | None = None
    beta: Array | None = None
    moving_mean: Array | None = None
    moving_variance: Array | None = None
    moving_stddev: Array | None = None
    renorm_mean: Array | None = None
    renorm_stddev: Array | None = None
    dgamma: Array | None = None
    dbeta: Array | None = None
    dresidual: Array | None = None
    batches: int = 0
    _backward: Callable[[Any], GradResult] | None = None

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.2,
        nan_policy: str = "propagate",
        correction: int = 0,
        dtype: Any = None,
        trainable: bool = True,
        virtual_batch_size: int | None = None,
        virtual_batch_grouping: str = "contiguous",
        renorm: bool = False,
        renorm_clipping: Mapping[str, float | None] | None = None,
        renorm_momentum: float = 0.99,
        update_statistics: bool = True,
        use_batch_statistics: bool | None = None,
        trainable_affine: bool = True,
        adjustment: Callable[[tuple[int, ...]], tuple[Any, Any]] | None = None,
    ) -> None:
        self.axis = _checks.channel_axes(axis)
        self.momentum = None if momentum is None else _checks.real("momentum", momentum, 1.0)
        self.epsilon = _checks.real("epsilon", epsilon)
        self.center = _checks.boolean("center", center)
        self.scale = _checks.boolean("scale", scale)
        self.activation = _checks.choice("activation", activation, _checks.ACTIVATIONS)
        self.negative_slope = _checks.real("negative_slope", negative_slope)
        self.nan_policy = str(_checks.choice("nan_policy", nan_policy, _checks.NAN_POLICIES))
        self.correction = _checks.bessel(correction)
        self.dtype = _checks.parameter_dtype(dtype)
        self.trainable = _checks.boolean("trainable", trainable)
        self.virtual_batch_size = _ghosts.check(virtual_batch_size)
        self.virtual_batch_grouping = _checks.choice(
            "virtual_batch_grouping", virtual_batch_grouping, _ghosts.GROUPINGS
        )
        self.renorm = _renorm_step.check(renorm, renorm_clipping, renorm_momentum, virtual_batch_size, correction)
        self.renorm_clipping, self.renorm_momentum = renorm_clipping, float(renorm_momentum)
        self.update_statistics = _checks.boolean("update_statistics", update_statistics)
        self.use_batch_statistics = _checks.optional_boolean("use_batch_statistics", use_batch_statistics)
        self.trainable_affine = _checks.boolean("trainable_affine", trainable_affine)
        self.adjustment = _per_sample.check_adjustment(adjustment, virtual_batch_size)

    def build(self, channels: int | Sequence[int], dtype: Any = None) -> None:
        """Make the arrays: ones for gamma and moving_variance, zeros for beta and moving_mean. Called by the first
        call; calling it again with the same channels starts over. channels: C, or the extents of several axes.

        Raises:
            ValueError: `channels` is negative, or not what the layer was built for.
        """
        shape = _checks.extents("channels", channels, self.axis)
        if self.moving_mean is not None and shape != self.moving_mean.shape:
            raise ValueError(f"channels must be {self.channels}, for which this layer was built. Received: {channels}")
        dtype = self.dtype or _checks.parameter_dtype(dtype) or np.dtype(np.float32)
        for name in self._names():
            fill = np.zeros if name in ("beta", "moving_mean", "renorm_mean") else np.ones
            setattr(self, name, fill(self._shape_of(name, shape), dtype))
        self.batches = 0
        self._forget()

    @property
    def built(self) -> bool:
        """Whether the arrays exist."""
        return self.moving_mean is not None

    @property
    def channels(self) -> int | tuple[int, ...] | None:
        """C, or the extents of several axes; None before `build`."""
        if self.moving_mean is None:
            return None
        return self.moving_mean.shape[0] if isinstance(self.axis, int) else self.moving_mean.shape

    def __call__(self, x: Any, training: bool = False, mask: Any = None, residual: Any = None) -> Array:
        """y = activation(gamma*(x - mean)/sqrt(variance + epsilon) + beta + residual), with the statistics of the
        batch (training) or the moving ones. See `batch_norm_train` for mask and residual; a mask weighs statistics
        alone, so it does nothing in inference.

        Raises:
            ValueError, TypeError: an argument is wrong; the layer is unchanged (not even built).
            FloatingPointError: nan_policy="raise" met non-finite statistics; the layer's state is unchanged.
        """
        return self._call(x, training, mask, residual)

    def _call(self, x: Any, training: Any, mask: Any, residual: Any, labels: Any = None) -> Array:
        x = _checks.tensor("x", x)
        axes = Axes.of(self.axis, x)
        training = _checks.boolean("training", training) and self.trainable
        if self.moving_mean is not None and axes.shape != self.moving_mean.shape:
            wanted = f"{self.channels} channels on axis {self.axis}, for which this layer was built"
            raise ValueError(f"x must have {wanted}. Received: shape {x.shape}")
        unbuilt = not self.built
        if unbuilt:
            self.build(axes.shape, "float64" if x.dtype == np.float64 else "float32")
        try:
            batch = self._batch(x, axes, mask, residual, labels)
            of_batch = training if self.use_batch_statistics is None else self.use_batch_statistics
            moves = training and self.update_statistics
            adjustment = self.adjustment if training else None
            passed = _forward.forward(batch, self._state(), self._policy(), of_batch, moves, adjustment)
        except BaseException:
            if unbuilt:
                for name in self._names():
                    setattr(self, name, None)
            raise
        self.batches += moves and passed.present
        self._backward = passed.backward
        return passed.y

    def _batch(self, x: Array, axes: Axes, mask: Any, residual: Any, labels: Any) -> Batch:
        return Batch(
            *(x, self.axis, axes, self.gamma, self.beta, mask, residual), self.activation, self.negative_slope, labels
        )

    def _state(self) -> dict[str, Array]:
        names = ("moving_mean", "moving_variance", *_renorm_step.NAMES * self.renorm)
        return {name: getattr(self, name) for name in names}

    def _policy(self) -> Policy:
        return Policy(
            self.batches / (self.batches + 1) if self.momentum is None else self.momentum,
            *(self.epsilon, self.correction, self.nan_policy, self.virtual_batch_size, self.virtual_batch_grouping),
            Renorm(self.renorm_clipping, self.renorm_momentum) if self.renorm else None,
        )

    def backward(self, dy: Any) -> Array:
        """dx for the last call; dgamma, dbeta and dresidual become attributes, replacing those of an earlier call.
        After a call that used the moving statistics this is the gradient with constant statistics.

        Raises:
            RuntimeError: there was no call since the layer was made, built, loaded, unpickled or copied.
            ValueError, TypeError: dy hasn't the shape and dtype of that call's x.
        """
        if self._backward is None:
            raise RuntimeError("backward needs a call of this layer before it: call layer(x, training=True) first")
        dx, dgamma, dbeta, dresidual = self._backward(dy)
        learns = self.trainable_affine
        self.dgamma = dgamma.reshape(self.gamma.shape) if learns and self.gamma is not None else None
        self.dbeta = dbeta.reshape(self.beta.shape) if learns and self.beta is not None else None
        self.dresidual = dresidual
        return dx

    def _forget(self) -> None:
        self._backward = self.dgamma = self.dbeta = self.dresidual = None

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, in plain types: `BatchNormalization(**layer.get_config())` is its like. An
        adjustment, which is a function, is in it where there is one."""
        names = "axis momentum epsilon center scale activation negative_slope nan_policy correction dtype trainable"
        names += " virtual_batch_size virtual_batch_grouping renorm renorm_clipping renorm_momentum update_statistics"
        names += " use_batch_statistics trainable_affine"
        config = {name: getattr(self, name) for name in names.split()}
        config["dtype"] = None if self.dtype is None else self.dtype.name
        config["renorm_clipping"] = None if self.renorm_clipping is None else dict(self.renorm_clipping)
        return config if self.adjustment is None else config | {"adjustment": self.adjustment}

    def state_dict(self) -> dict[str, Array]:
        """Copies of gamma, beta (where the layer has them), moving_mean and moving_variance, by name; with renorm
        also moving_stddev, renorm_mean and renorm_stddev; with momentum=None also batches, an int64 of shape ().

        Raises:
            RuntimeError: the layer isn't built.
        """
        if not self.built:
            raise RuntimeError("the layer has no state before it is built: call it once, or build(channels)")
        counted = {"batches": np.array(self.batches, np.int64)} if self.momentum is None else {}
        return {name: getattr(self, name).copy() for name in self._names()} | counted

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy `state` in, all or nothing. A layer that isn't built takes its channels and dtype from it (a `dtype`
        given to the constructor must agree); a built one keeps its arrays and overwrites their values.

        Raises:
            ValueError: a key is missing or unknown, or a shape is wrong.
            TypeError: a dtype is wrong: none is changed silently.
        """
        if self.momentum is None and isinstance(state, Mapping) and "batches" in state:
            batches = _checks.integer("batches", state["batches"])
            if batches < 0:
                raise ValueError(f"batches must be at least 0. Received: {batches}")
            convert.load(self, {name: array for name, array in state.items() if name != "batches"}, self._names())
            self.batches = batches
        else:
            convert.load(self, state, (*self._names(), *("batches",) * (self.momentum is None)))
        self._forget()

    def _names(self) -> tuple[str, ...]:
        """The state's arrays, in Keras's order."""
        own = (*("gamma",) * self.scale, *("beta",) * self.center, "moving_mean", "moving_variance")
        return own + _renorm_step.NAMES * self.renorm

    def _shape_of(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the array of that name, `shape` being that of a vector."""
        return shape

    def to_keras(self, target: Any = None) -> Any:
        """This layer for Keras, see `bnfast.layers.convert_keras.to_keras`."""
        return convert.to_keras(self, target)

    @classmethod
    def from_keras(cls, source: Any) -> BatchNormalization:
        """A layer with configuration and state of a Keras layer, see `bnfast.layers.convert_keras.from_keras`."""
        return convert.from_keras(cls, source)

    def to_torch(self, target: Any = None) -> Any:
        """This layer for PyTorch, see `bnfast.layers.convert_torch.to_torch`."""
        return convert_torch.to_torch(self, target)

    @classmethod
    def from_torch(cls, source: Any, *, axis: int = 1, **settings: Any) -> BatchNormalization:
        """A layer with settings and state of a PyTorch module, see `bnfast.layers.convert_torch.from_torch`."""
        return convert_torch.from_torch(cls, source, axis=axis, **settings)

    def __getstate__(self) -> dict[str, Any]:
        left = ("_backward", "dgamma", "dbeta", "dresidual")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __repr__(self) -> str:
        config = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({config})"
