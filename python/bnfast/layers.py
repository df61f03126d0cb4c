"""A batch normalization layer over NumPy arrays: parameters, moving statistics, forward, backward, state.

It holds arrays and passes them to `functional`; no numerics live here. `backward` reads what the last call kept: a
reference to x, mask and residual (no copies, so these must not be overwritten in between), and mean and invstd.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import _checks, _ghosts, convert, convert_torch
from ._arrays import Array
from ._axes import Axes
from .functional import batch_norm_grad, batch_norm_infer, batch_norm_train

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

    Attributes:
        gamma, beta, moving_mean, moving_variance: arrays of shape (C,), None before `build`.
        batches: how many batches the moving statistics have seen since `build`; part of the state with momentum=None.
        dgamma, dbeta, dresidual: set by `backward`, else None. dgamma (dbeta) stays None without scale (center).

    A layer can be pickled and deep-copied; what it kept for `backward` and the gradients stay behind.
    """

    gamma: Array | None = None
    beta: Array | None = None
    moving_mean: Array | None = None
    moving_variance: Array | None = None
    dgamma: Array | None = None
    dbeta: Array | None = None
    dresidual: Array | None = None
    batches: int = 0
    _saved: dict[str, Any] | None = None

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
        self.gamma = np.ones(shape, dtype) if self.scale else None
        self.beta = np.zeros(shape, dtype) if self.center else None
        self.moving_mean, self.moving_variance = np.zeros(shape, dtype), np.ones(shape, dtype)
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
        x = _checks.tensor("x", x)
        axes = Axes.of(self.axis, x)
        training = _checks.boolean("training", training) and self.trainable
        if self.moving_mean is not None and axes.shape != self.moving_mean.shape:
            wanted = f"{self.channels} channels on axis {self.axis}, for which this layer was built"
            raise ValueError(f"x must have {wanted}. Received: shape {x.shape}")
        if self.built:
            return self._forward(x, axes, training, mask, residual)
        self.build(axes.shape, "float64" if x.dtype == np.float64 else "float32")
        try:
            return self._forward(x, axes, training, mask, residual)
        except BaseException:
            self.gamma = self.beta = self.moving_mean = self.moving_variance = None
            raise

    def _forward(self, x: Array, axes: Axes, training: bool, mask: Any, residual: Any) -> Array:
        fused: dict[str, Any] = {
            "axis": self.axis,
            "activation": self.activation,
            "negative_slope": self.negative_slope,
        }
        momentum = self.batches / (self.batches + 1) if self.momentum is None else self.momentum
        size, grouping = self.virtual_batch_size, self.virtual_batch_grouping
        ghosts = _ghosts.slices(x, axes, size, grouping) if training else []
        if ghosts:
            assert self.moving_mean is not None
            assert self.moving_variance is not None
            policy = {"epsilon": self.epsilon, "nan_policy": self.nan_policy}
            result = _ghosts.train(x, ghosts, self.gamma, self.beta, axes, mask, residual, **policy, **fused)
            moving = self.moving_mean, self.moving_variance
            self.batches += _ghosts.update(moving, result, momentum, self.correction, self.nan_policy)
            y, mean, invstd, mask = result.y, result.mean, result.invstd, result.mask
        elif training:
            y, mean, _, invstd = batch_norm_train(
                *(x, self.gamma, self.beta, self.moving_mean, self.moving_variance),
                momentum=momentum,
                epsilon=self.epsilon,
                mask=mask,
                residual=residual,
                correction=self.correction,
                nan_policy=self.nan_policy,
                **fused,
            )
            weights = _checks.weights(mask, x, axes) if self.momentum is None else None
            self.batches += bool(x.size and (weights is None or weights.any()))
        else:
            _checks.weights(mask, x, axes)
            y = batch_norm_infer(
                *(x, self.moving_mean, self.moving_variance, self.gamma, self.beta),
                epsilon=self.epsilon,
                residual=residual,
                **fused,
            )
            mean, invstd = self._moving_mean_and_invstd()
        self._saved = {"x": x, "mean": mean, "invstd": invstd, "residual": residual, "training": training, **fused}
        self._saved["mask"] = mask if training else None
        if ghosts:
            self._saved["ghosts"] = ghosts
        return y

    def _moving_mean_and_invstd(self) -> tuple[Array, Array]:
        """Copies, as the moving statistics may move before `backward`."""
        assert self.moving_mean is not None
        assert self.moving_variance is not None
        total = self.moving_variance.astype(np.float64) + self.epsilon
        with np.errstate(divide="ignore", invalid="ignore"):
            invstd = np.where(total == 0, 0.0, 1 / np.sqrt(total))  # 0 as in TrainResult.invstd
        return self.moving_mean.astype(np.float64), invstd

    def backward(self, dy: Any) -> Array:
        """dx for the last call; dgamma, dbeta and dresidual become attributes, replacing those of an earlier call.
        After a call in inference mode (or of a frozen layer) this is the gradient with constant statistics.

        Raises:
            RuntimeError: there was no call since the layer was made, built, loaded, unpickled or copied.
            ValueError, TypeError: dy hasn't the shape and dtype of that call's x.
        """
        if self._saved is None:
            raise RuntimeError("backward needs a call of this layer before it: call layer(x, training=True) first")
        gradients = _ghosts.grad if "ghosts" in self._saved else batch_norm_grad
        dx, dgamma, dbeta, dresidual = gradients(dy, gamma=self.gamma, beta=self.beta, **self._saved)
        self.dgamma = dgamma if self.scale else None
        self.dbeta = dbeta if self.center else None
        self.dresidual = dresidual
        return dx

    def _forget(self) -> None:
        self._saved = self.dgamma = self.dbeta = self.dresidual = None

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, in plain types: `BatchNormalization(**layer.get_config())` is its like."""
        names = "axis momentum epsilon center scale activation negative_slope nan_policy correction dtype trainable"
        names += " virtual_batch_size virtual_batch_grouping"
        config = {name: getattr(self, name) for name in names.split()}
        config["dtype"] = None if self.dtype is None else self.dtype.name
        return config

    def state_dict(self) -> dict[str, Array]:
        """Copies of gamma, beta (where the layer has them), moving_mean and moving_variance, by name; with
        momentum=None also batches, an int64 of shape ().

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
        return (*("gamma",) * self.scale, *("beta",) * self.center, "moving_mean", "moving_variance")

    def to_keras(self, target: Any = None) -> Any:
        """This layer for Keras, see `bnfast.convert.to_keras`."""
        return convert.to_keras(self, target)

    @classmethod
    def from_keras(cls, source: Any) -> BatchNormalization:
        """A layer with configuration and state of a Keras layer, see `bnfast.convert.from_keras`."""
        return convert.from_keras(cls, source)

    def to_torch(self, target: Any = None) -> Any:
        """This layer for PyTorch, see `bnfast.convert_torch.to_torch`."""
        return convert_torch.to_torch(self, target)

    @classmethod
    def from_torch(cls, source: Any, *, axis: int = 1, **settings: Any) -> BatchNormalization:
        """A layer with settings and state of a PyTorch module, see `bnfast.convert_torch.from_torch`."""
        return convert_torch.from_torch(cls, source, axis=axis, **settings)

    def __getstate__(self) -> dict[str, Any]:
        left = ("_saved", "dgamma", "dbeta", "dresidual")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __repr__(self) -> str:
        config = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"BatchNormalization({config})"
