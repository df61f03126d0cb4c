"""A batch normalization layer over NumPy arrays: parameters, moving statistics, forward, backward, state.

The layer holds arrays and passes them to `forward`; no numerics live here. `backward` uses what the last call kept:
references to x, mask and residual (not copies, so they must not be overwritten before `backward`), mean and invstd, and
also xhat if there is a per-sample scale or offset (per_sample.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from .._arguments import checks
from .._arguments.array_checks import tensor
from .._arguments.arrays import Array
from .._arguments.axes import Axes
from ..functional.batch_norm import GradResult
from ..functional.moments import Moments
from . import convert_keras, convert_torch, device
from .batch import Batch, Policy, Renorm
from .forward import forward
from .ghosts import GROUPINGS, check_virtual_batch_size
from .per_sample import check_adjustment
from .recalibrate import statistics
from .renorm import RENORM_STATE, check_clipping, check_renorm
from .state import MOST_BATCHES, batch_count, load_state

__all__ = ["BatchNormalization"]

OPTIONS = (  # the constructor's arguments, other than adjustment
    "axis",
    "momentum",
    "epsilon",
    "center",
    "scale",
    "activation",
    "negative_slope",
    "nan_policy",
    "correction",
    "dtype",
    "trainable",
    "virtual_batch_size",
    "virtual_batch_grouping",
    "renorm",
    "renorm_clipping",
    "renorm_momentum",
    "update_statistics",
    "use_batch_statistics",
    "trainable_affine",
)


class BatchNormalization:
    """Batch normalization with learned gamma and beta and moving statistics.

        training:  y = activation(gamma * (x - mean)/sqrt(variance + epsilon) + beta + residual)
                   moving = moving*momentum + batch*(1 - momentum)
        inference: y = activation(gamma * (x - moving_mean)/sqrt(moving_variance + epsilon) + beta + residual)

    Args:
        axis: the channel axis, whose extent is C. With several axes, as (1, 2), each pair of their indices is one
            channel, and (C,) means their extents in the order of x, as (3, 4).
        momentum: weight of the old moving value (PyTorch's momentum is 1 minus this). None: the moving statistics are
            the plain averages over all batches so far, except empty and fully masked ones.
        epsilon: added to the variance, >= 0. The default is Keras's; PyTorch's is 1e-5.
        center, scale: whether the layer has beta and gamma; if not, they are None.
        activation: one of the words of `batch_norm_train`, fused; "leaky_relu" has slope `negative_slope` below 0.
        nan_policy: "propagate", "skip_update" or "raise", see `batch_norm_train`.
        correction: 0 averages the population variance in moving_variance (Keras), 1 the sample variance (PyTorch).
        dtype: of the parameters, "float32" or "float64". None: float64 if the first x is float64, else float32.
        trainable: False freezes the layer, as in Keras: a call with training=True then runs like training=False.
        virtual_batch_size: in training, each group of this many samples (axis 0) is normalized separately, as ghost
            batches (Hoffer 2017, https://arxiv.org/abs/1705.08741). It must divide the batch. The moving statistics
            take the mean of the ghosts' statistics, except ghosts without any weight. None: the batch is one ghost.
        virtual_batch_grouping: "contiguous": a ghost is neighbouring samples. "strided": a ghost is every G-th sample
            of G ghosts, as in TF 1 and tf.keras 2, for one copy each of x and y.
        renorm: batch renormalization (Ioffe 2017, https://arxiv.org/abs/1702.03275) as in Keras: in training y =
            gamma*(xhat*r + d) + beta, with r and d from `renorm_correction`. x is read once more. Not with ghosts or
            correction=1.
        renorm_clipping: a dict with some or all of rmin, rmax and dmax. May be reassigned between steps.
        renorm_momentum: momentum of renorm_mean and renorm_stddev.
        update_statistics, use_batch_statistics, trainable_affine: freeze a part of the layer, see below.
        adjustment: a function from x.shape to (scale, bias), which broadcast to x. In training y =
            activation((xhat*scale + bias)*gamma + beta + residual), as in TF 1; `backward` treats both as constants.
            Runs on NumPy after the kernels, which compute xhat in x's dtype; xhat is kept for `backward`. Not with
            ghosts.

    Three switches freeze a part of the layer. They may be reassigned between calls. "In training" means training=True
    and layer.trainable. With trainable_affine=False dgamma and dbeta are None.

        use_batch_statistics  update_statistics   y uses the statistics of      moving statistics
        None (default)        True (default)      the batch in training         are updated in training
        None                  False               the batch in training         are never updated
        False                 True                the moving averages           are updated in training
        False                 False               the moving averages           are never updated
        True                  True                the batch, always             are updated in training
        True                  False               the batch, always             are never updated

    With (False, True) the moving statistics are updated after y is computed, in a second pass over x.

    Attributes:
        gamma, beta, moving_mean, moving_variance: arrays of shape (C,); None before `build`.
        moving_stddev, renorm_mean, renorm_stddev: the same, with renorm.
        batches: number of batches averaged in the moving statistics since `build`; part of the state with
            momentum=None.
        dgamma, dbeta, dresidual: set by `backward`, else None. dgamma and dbeta stay None without scale and center.

    x may also lie on a CUDA device (see `bnfast.cuda`), where there are no masks, renorm, ghosts, adjustment and smooth
    activations yet. The layer's arrays follow x: the first call on a device moves them there, and one with a NumPy
    array back. state_dict() gives NumPy arrays in any case.

    A layer can be pickled and deep-copied. The copy has no gradients and nothing kept for `backward`.

    Raises:
        ValueError, TypeError: an argument is wrong.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> layer = bnfast.BatchNormalization(momentum=0.5, epsilon=0.0)
        >>> x, dy = np.array([[1.0], [3.0]]), np.array([[4.0], [2.0]])
        >>> layer(x, training=True)
        array([[-1.],
               [ 1.]])
        >>> layer.moving_mean
        array([1.])
        >>> dx = layer.backward(dy)
        >>> layer.dgamma, layer.dbeta
        (array([-2.]), array([6.]))
        >>> layer.gamma -= 0.1 * layer.dgamma
        >>> layer(x)  # inference, with the moving statistics
        array([[0. ],
               [2.4]])

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
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
        self.axis = checks.channel_axes(axis)
        self.momentum = None if momentum is None else checks.real("momentum", momentum, 1.0)
        self.epsilon = checks.real("epsilon", epsilon)
        self.center = checks.boolean("center", center)
        self.scale = checks.boolean("scale", scale)
        self.activation = checks.activation(activation)
        self.negative_slope = checks.real("negative_slope", negative_slope)
        self.nan_policy = str(checks.choice("nan_policy", nan_policy, checks.NAN_POLICIES))
        self.correction = checks.check_correction(correction)
        self.dtype = checks.parameter_dtype(dtype)
        self.trainable = checks.boolean("trainable", trainable)
        self.virtual_batch_size = check_virtual_batch_size(virtual_batch_size)
        self.virtual_batch_grouping = checks.choice("virtual_batch_grouping", virtual_batch_grouping, GROUPINGS)
        self.renorm = check_renorm(renorm, renorm_clipping, renorm_momentum, virtual_batch_size, correction)
        self.renorm_clipping, self.renorm_momentum = renorm_clipping, float(renorm_momentum)
        self.update_statistics = checks.boolean("update_statistics", update_statistics)
        self.use_batch_statistics = checks.optional_boolean("use_batch_statistics", use_batch_statistics)
        self.trainable_affine = checks.boolean("trainable_affine", trainable_affine)
        self.adjustment = check_adjustment(adjustment, virtual_batch_size)

    def build(self, channels: int | Sequence[int], dtype: Any = None) -> None:
        """Create the arrays: ones for gamma and moving_variance, zeros for beta and moving_mean. The first call of the
        layer does this; a second `build` with the same channels resets them.

        Args:
            channels: C, or one extent per axis.
            dtype: of the arrays, unless the constructor got one; None means float32.

        Raises:
            ValueError: `channels` is negative, or differs from the number that the layer was built with.
        """
        shape = checks.extents("channels", channels, self.axis)
        if self.moving_mean is not None and shape != self.moving_mean.shape:
            raise ValueError(f"channels must be {self.channels}, which this layer was built with. Received: {channels}")
        dtype = self.dtype or checks.parameter_dtype(dtype) or np.dtype(np.float32)
        try:
            arrays = {name: self._initial(name, shape, dtype) for name in self._names()}
        except ValueError as error:  # NumPy's: more bytes than an int64 counts
            raise ValueError(f"channels must be as many as an array can have. Received: {channels}") from error
        for name, array in arrays.items():
            setattr(self, name, array)
        self.batches = 0
        self._forget()

    def _initial(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        fill = np.zeros if name in ("beta", "moving_mean", "renorm_mean") else np.ones
        return fill(self._array_shape(name, shape), dtype)

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
        """Normalize x with the statistics of the batch (training) or with the moving statistics (inference).

        Args:
            x: an array that `batch_norm_train` reads, with the layer's channels on `axis`.
            training: whether this is a training call.
            mask, residual: as in `batch_norm_train`. A mask affects statistics only, so it has no effect in inference.

        Returns:
            y in the shape and dtype of x.

        Raises:
            ValueError, TypeError: an argument is wrong; the layer is unchanged (not even built).
            FloatingPointError: nan_policy="raise" and the statistics are not finite; the layer's state is unchanged.
        """
        return self._call(x, training, mask, residual)

    def _call(self, x: Any, training: Any, mask: Any, residual: Any, labels: Any = None) -> Array:
        if device.is_on_device(x):
            y, counts = device.call(self, x, training, mask, residual, labels)
            self.batches = min(self.batches + counts, MOST_BATCHES)
            return y  # type: ignore[no-any-return]
        device.to_host(self)
        x = tensor("x", x)
        axes = Axes.of(self.axis, x)
        training = checks.boolean("training", training) and self.trainable
        if self.moving_mean is not None and axes.shape != self.moving_mean.shape:
            wanted = f"{self.channels} channels on axis {self.axis}, which this layer was built with"
            raise ValueError(f"x must have {wanted}. Received: shape {x.shape}")
        unbuilt = not self.built
        if unbuilt:
            self.build(axes.shape, "float64" if x.dtype == np.float64 else "float32")
        try:
            batch = self._batch(x, axes, mask, residual, labels)
            use_batch = training if self.use_batch_statistics is None else self.use_batch_statistics
            update = training and self.update_statistics
            adjustment = self.adjustment if training else None
            result = forward(batch, self._state(), self._policy(), use_batch, update, adjustment)
        except BaseException:
            if unbuilt:
                for name in self._names():
                    setattr(self, name, None)
            raise
        self.batches = min(self.batches + (update and result.has_values), MOST_BATCHES)
        self._backward = result.backward
        return result.y

    def _batch(self, x: Array, axes: Axes, mask: Any, residual: Any, labels: Any) -> Batch:
        return Batch(
            x, self.axis, axes, self.gamma, self.beta, mask, residual, self.activation, self.negative_slope, labels
        )

    def _state(self) -> dict[str, Array]:
        names = ("moving_mean", "moving_variance")
        return {name: getattr(self, name) for name in (names + RENORM_STATE if self.renorm else names)}

    def _policy(self) -> Policy:
        return Policy(
            self._momentum(),
            self.epsilon,
            self.correction,
            self.nan_policy,
            self.virtual_batch_size,
            self.virtual_batch_grouping,
            Renorm(self.renorm_clipping, self.renorm_momentum) if self.renorm else None,
        )

    def _momentum(self) -> float:
        if self.momentum is not None:
            return self.momentum
        batches = batch_count(self.batches)
        return batches / (batches + 1)

    def backward(self, dy: Any) -> Array:
        """Gradients for the last call. Sets dgamma, dbeta and dresidual, and replaces those of an earlier call.

        After a call that used the moving statistics this is the gradient with constant statistics.

        Args:
            dy: gradient of the loss with respect to y, in the shape and dtype of that call's x.

        Returns:
            dx, in the shape and dtype of x.

        Raises:
            RuntimeError: there was no call since the layer was created, built, loaded, unpickled or copied.
            ValueError, TypeError: dy does not have the shape and dtype of x.
        """
        if self._backward is None:
            raise RuntimeError("backward needs a call of this layer before it: call layer(x, training=True) first")
        dx, dgamma, dbeta, dresidual = self._backward(dy)
        self.dgamma = _in_shape(dgamma, self.gamma) if self.trainable_affine else None
        self.dbeta = _in_shape(dbeta, self.beta) if self.trainable_affine else None
        self.dresidual = dresidual
        return dx

    def _forget(self) -> None:
        self._backward = self.dgamma = self.dbeta = self.dresidual = None

    def recalibrate(self, batches: Any, *, estimator: str = "population") -> Moments:
        """Compute the moving statistics anew from batches of inputs of this layer, in float64.

        With an iterator, one batch is in memory at a time. What the layer does in training (trainable, momentum,
        update_statistics) plays no part. With renorm its three other statistics are set, too; with momentum=None
        `batches` is the number of these batches. A layer that isn't built is built for the first batch.

        Args:
            batches: an iterable of arrays x, of tuples (x, mask), or of `bnfast.Moments` of batches. Empty and fully
                masked batches are left out.
            estimator: "population": mean and variance of all values together. "average": the plain averages of the
                means and of the variances of the batches (of the ghost batches with virtual_batch_size), as training
                averages them.

        Returns:
            The Moments that were set: count, mean and variance in float64, the variance with the layer's correction.

        Raises:
            ValueError, TypeError: an argument is wrong, there are no values, or channels differ.
            FloatingPointError: a mean or variance isn't finite, or doesn't fit the dtype of the layer. In all of these
                cases the layer is unchanged.

        Example:
            >>> import bnfast
            >>> import numpy as np
            >>> layer = bnfast.BatchNormalization()
            >>> layer.recalibrate([np.array([[1.0], [3.0]]), np.array([[5.0], [7.0]])])
            Moments(count=4.0, mean=array([4.]), variance=array([5.]))
        """
        found = statistics(self, batches, estimator, self.epsilon)
        dtype = self.dtype or np.dtype("float64" if found.x_dtype == np.float64 else "float32")
        dtype = dtype if self.moving_mean is None else self.moving_mean.dtype
        with np.errstate(over="ignore"):
            arrays = {name: array.astype(dtype) for name, array in found.arrays.items()}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise FloatingPointError(f"the new statistics don't fit in {dtype.name}")
        if self.moving_mean is None:
            self.build(found.shape if len(found.shape) > 1 else found.shape[0], dtype)
        for name, array in arrays.items():
            getattr(self, name)[...] = array
        self.batches = found.batches
        self._forget()
        return found.moments

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, in plain types: `BatchNormalization(**layer.get_config())` has the same options.
        `adjustment`, which is a function, is a key only if the layer has one."""
        config = {name: getattr(self, name) for name in OPTIONS}
        config["dtype"] = None if self.dtype is None else self.dtype.name
        config["renorm_clipping"] = None if self.renorm_clipping is None else check_clipping(self.renorm_clipping)
        return config if self.adjustment is None else config | {"adjustment": self.adjustment}

    def state_dict(self) -> dict[str, Array]:
        """Copies of the state's arrays by name: gamma and beta (if the layer has them), moving_mean, moving_variance;
        with renorm also moving_stddev, renorm_mean, renorm_stddev; with momentum=None also batches, int64 of shape ().

        Raises:
            RuntimeError: the layer is not built.
        """
        if not self.built:
            raise RuntimeError("the layer has no state before it is built: call it once, or build(channels)")
        counted = {"batches": np.array(batch_count(self.batches), np.int64)} if self.momentum is None else {}
        return {name: device.host_copy(getattr(self, name)) for name in self._names()} | counted

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy the arrays of `state` to the layer, all or none. A layer that is not built takes channels and dtype from
        `state` (a `dtype` given to the constructor must agree). A built layer keeps its arrays and overwrites their
        values.

        Raises:
            ValueError: a key is missing or unknown, a shape is wrong, a variance or standard deviation is negative, or
                batches is not in [0, 2**63).
            TypeError: a dtype is wrong. Dtypes are never converted.
        """
        device.to_host(self)
        if self.momentum is None and isinstance(state, Mapping) and "batches" in state:
            batches = batch_count(state["batches"])
            load_state(self, {name: array for name, array in state.items() if name != "batches"}, self._names())
            self.batches = batches
        else:
            load_state(self, state, (*self._names(), "batches") if self.momentum is None else self._names())
        self._forget()

    def _names(self) -> tuple[str, ...]:
        """The names of the state's arrays, in Keras's order."""
        names = ["gamma"] if self.scale else []
        names += ["beta"] if self.center else []
        names += ["moving_mean", "moving_variance"]
        return (*names, *RENORM_STATE) if self.renorm else tuple(names)

    def _array_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the array `name`, from the shape of a vector."""
        return shape

    def to_keras(self, target: Any = None) -> Any:
        """Convert this layer to a Keras layer, see `bnfast.layers.convert_keras.to_keras`."""
        return convert_keras.to_keras(self, target)

    @classmethod
    def from_keras(cls, source: Any) -> Self:
        """A layer with the options and state of a Keras layer, see `bnfast.layers.convert_keras.from_keras`."""
        return convert_keras.from_keras(cls, source)

    def to_torch(self, target: Any = None) -> Any:
        """Convert this layer to a PyTorch module, see `bnfast.layers.convert_torch.to_torch`."""
        return convert_torch.to_torch(self, target)

    @classmethod
    def from_torch(cls, source: Any, *, axis: int = 1, **settings: Any) -> Self:
        """A layer with the settings and state of a PyTorch module, see `bnfast.layers.convert_torch.from_torch`."""
        return convert_torch.from_torch(cls, source, axis=axis, **settings)

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_backward", "dgamma", "dbeta", "dresidual")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __repr__(self) -> str:
        config = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({config})"


def _in_shape(gradient: Any, parameter: Any) -> Any:
    """The gradient of a parameter in its shape; None without one."""
    if parameter is None or gradient.shape == parameter.shape:
        return None if parameter is None else gradient
    return gradient.reshape(parameter.shape)
