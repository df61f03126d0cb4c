"""`bnfast.keras.BatchNormalization`: keras.layers.BatchNormalization, trained by bnfast's kernels.

Training goes through `bridge` (one op forward, one backward), inference through `inference` (TensorFlow ops
only, so that an exported model doesn't need bnfast). Weights, their names and order, config, dtype policies and the
meaning of `training` and `trainable` are Keras's own. Two things differ, on purpose: a mask is read along the right
axes for every `axis`, and an empty or fully masked batch leaves the moving statistics as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from ...tensorflow.axes import Axes, mask_along
from ...tensorflow.reference import Batch, Options
from ...tensorflow.training import adjustment as adjustments
from ...tensorflow.training import ghosts, synchronized
from ...tensorflow.training import mode as freezing
from ...tensorflow.training import renorm as renorms
from ...tensorflow.training.step import Policy, parameter
from . import activation as activations
from . import arguments

_logger = logging.getLogger("bnfast")
_VECTORS = ("gamma", "beta", "moving_mean", "moving_variance")


@keras.saving.register_keras_serializable(package="bnfast")
class BatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """Batch normalization with the arguments, weights and results of `keras.layers.BatchNormalization`.

    In training mode, over all axes but `axis`, and `moving_mean` and `moving_variance` move towards mean and variance:

        y = activation(gamma*(x - mean)/sqrt(variance + epsilon) + beta)
        moving = moving*momentum + batch*(1 - momentum)

    In inference mode, which includes any call with `trainable = False`, the moving statistics stand for the batch's.
    Three switches freeze a part of that, whatever `training` says to the layers around (read at every call; traced
    functions and compiled models keep what they were traced with):

        use_batch_statistics  update_statistics   y uses                        moving statistics
        None (default)        True (default)      batch's in training           move in training
        None                  False               batch's in training           never move
        False                 True                moving ones                   move in training
        False                 False               moving ones                   never move
        True                  True                batch's, also in inference    move in training
        True                  False               batch's, also in inference    never move

    "In training" means training=True and layer.trainable. trainable_affine=False makes gamma and beta weights that
    aren't trained, which layer.trainable doesn't undo. Keras's usual freeze, trainable = False, is the first row in
    inference mode. In (False, True) y and the moving statistics come of different passes: x is read once more.

    renorm=True is Keras's: gamma*(xhat*r + d) + beta in training, with its weights and its order of updates. The values
    of renorm_clipping may be scalar `tf.Variable`s too: assigning to one takes effect without retracing. A config holds
    the numbers they are at that time, and their order (rmin <= rmax) is checked once, here.

    axis may name several axes, as in tf.keras 2: axis=[1, 2] normalizes every pair of indices on its own, over the
    others. Weights then have the rank of inputs, with extents of 1 off these axes, and a mask is inputs.shape without
    them. Axes side by side cost nothing; others cost a copy of x, y, dy and dx.

    Args: all of Keras's (axis, momentum, epsilon, center, scale, initializers, regularizers, constraints, dtype, name
    ...), `fused` (Keras 2's, kept and read by nothing), and
        activation: None, a name, a function or a layer instance. relu, relu6 and leaky_relu are fused into the kernels
            (also as keras.activations functions, ReLU, LeakyReLU and Activation layers); any other is applied after.
        momentum: None makes moving_mean and moving_variance the plain averages over all batches so far, empty ones
            aside; the weight `batches` counts them.
        correction: 1 puts variance*W/(W - 1), the sample variance, into moving_variance (PyTorch's habit), 0 the
            population variance (Keras's). y is the same. Not with renorm.
        nan_policy: "propagate", or "skip_update": where a channel's mean or variance isn't finite, y is what it is but
            the channel's moving statistics stay. (`batches` counts the batch for all channels.)
        update_statistics, use_batch_statistics, trainable_affine: see above.
        virtual_batch_size: normalize every so many samples (axis 0) on their own, as ghost batches; the moving
            statistics take the mean of the ghosts' statistics. It must divide the batch. Not with renorm.
        virtual_batch_grouping: "contiguous": a ghost is a slice of the batch; "strided": of G ghosts number g holds
            samples g, g + G, ..., as in TF 1 and tf.keras 2.
        adjustment: a function of the shape of inputs (a tensor) that gives (scale, bias), which broadcast to them; in
            training y is activation((xhat*scale + bias)*gamma + beta), as in TF 1. A config can't hold it: it is left
            out, with a line in the log `bnfast`. Not with virtual_batch_size.
        synchronized: under a tf.distribute strategy the batch is that of all replicas, whose shards may be of any size.
            Without one, or with one replica, the layer is what it is without. Replicas talk in each training call (not
            from inside a tf.cond or tf.while_loop). Not with renorm, virtual_batch_size or adjustment.
        bridge: how TensorFlow reaches the kernels in training: "op" (TensorFlow ops of bnfast's own),
            "numpy_function" (a Python callback each way), or "auto": "op" where it loads, else numpy_function and one
            line in the log `bnfast`. The environment's BNFAST_BRIDGE decides for "auto".
        replaces: what this layer was made from, as `accelerate` writes it and `to_keras` reads it: the names "norm"
            and "add", and "place", the batch norm's among Add's inputs. "bias" names the layer before, whose output
            nothing but this layer reads: its bias, added last, is left out in training (see `bnfast.keras.accelerate`).

    Call arguments:
        inputs: float tensor of any rank; integers are computed in float32, as in Keras.
        training: None, True, False or a boolean tensor.
        mask: inputs.shape without the channel axis, or with extents of 1; zero or False leaves an entry out of the
            statistics. The mask that Keras attached to inputs (Masking) lies along inputs.shape[:-1], whatever `axis`
            is, and so does any other that fits nothing else.

    Raises:
        RuntimeError: Keras runs on a backend other than TensorFlow. In training, bridge="op" where the ops can't
            be loaded: a saved layer can be opened, and used for inference, all the same.
        ValueError, TypeError: an argument out of range or of the wrong type; the message says which.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167.
    """

    # Defaults: also those of a layer of Keras's that becomes one of these where it sits (inplace.py).
    correction = 0
    nan_policy = "propagate"
    update_statistics = trainable_affine = True
    use_batch_statistics: bool | None = None
    fused: bool | None = None
    virtual_batch_size: int | None = None
    virtual_batch_grouping = "contiguous"
    adjustment: adjustments.Adjustment | None = None
    bridge = "auto"
    momentum: Any
    _weight_shape: tuple[int, ...] | None = None  # where it isn't (C,)

    def __init__(
        self,
        axis: Any = -1,
        momentum: float | None = 0.99,
        *args: Any,
        activation: Any = None,
        correction: int = 0,
        nan_policy: str = "propagate",
        update_statistics: bool = True,
        use_batch_statistics: bool | None = None,
        trainable_affine: bool = True,
        virtual_batch_size: int | None = None,
        virtual_batch_grouping: str = "contiguous",
        adjustment: adjustments.Adjustment | None = None,
        bridge: str = "auto",
        fused: bool | None = None,
        replaces: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(
                "bnfast.keras.BatchNormalization needs the TensorFlow backend of Keras (KERAS_BACKEND=tensorflow). "
                f"Received: {keras.backend.backend()}"
            )
        if kwargs.get("renorm"):
            renorms.check(kwargs.get("renorm_clipping"), kwargs.get("renorm_momentum", 0.99))
        axes = [arguments.one_axis(one) for one in axis] if isinstance(axis, (list, tuple)) and len(axis) > 1 else axis
        first = arguments.one_axis(axes[0] if axes is not axis else axis)
        super().__init__(first, 0.0 if momentum is None else momentum, *args, **kwargs)
        if axes is not axis:
            self.axis = axes
        arguments.check(self)
        own = arguments.own(
            correction=correction,
            nan_policy=nan_policy,
            update_statistics=update_statistics,
            use_batch_statistics=use_batch_statistics,
            trainable_affine=trainable_affine,
            virtual_batch_size=virtual_batch_size,
            virtual_batch_grouping=virtual_batch_grouping,
            adjustment=adjustment,
            bridge=bridge,
            fused=fused,
            renorm=self._renorm is not None,
            synchronized=self.synchronized,
        )
        for name, value in own.items():
            setattr(self, name, value)
        self.momentum = None if momentum is None else self.momentum
        self.activation = activations.get(activation)
        self.replaces = dict(replaces or {})
        self.supports_jit = False  # XLA has no kernel for either bridge

    def build(self, input_shape: Any) -> None:
        axes = Axes.of(self._axes, input_shape)
        if self.virtual_batch_size is not None and 0 in axes.axes:
            raise ValueError(f"axis must not be 0, the batch's, with virtual_batch_size. Received: axis={self.axis}")
        if isinstance(self.axis, int):
            super().build(input_shape)
        else:
            given, self._weight_shape = self.axis, axes.weight_shape(input_shape)
            self.axis = given[0]
            try:
                super().build(input_shape)
            finally:
                self.axis = given
            self.input_spec = keras.layers.InputSpec(ndim=axes.rank, axes={i: input_shape[i] for i in axes.axes})
        if self.momentum is None:
            self.batches = self.add_weight(
                shape=(), initializer="zeros", dtype="int64", name="batches", trainable=False, autocast=False
            )
        if isinstance(self.activation, keras.layers.Layer) and not self.activation.built:
            self.activation.build(input_shape)

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("name") in ("gamma", "beta") and not self.trainable_affine:
            kwargs["trainable"] = False
        if self._weight_shape is not None and kwargs.get("name") in (*_VECTORS, *renorms.NAMES):
            kwargs["shape"] = self._weight_shape
        return super().add_weight(*args, **kwargs)

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return self._call(inputs, None, training, mask)

    def _call(self, inputs: Any, residual: Any, training: Any, mask: Any, affine: bool = True) -> Any:
        """y; without affine xhat, which neither gamma and beta nor the activation were applied to."""
        x = tf.convert_to_tensor(inputs)
        if x.dtype not in (tf.float16, tf.bfloat16):
            x = tf.cast(x, keras.backend.result_type(x.dtype.name, "float32"))
        attached = getattr(inputs, "_keras_mask", None)
        if mask is None and tf.is_tensor(training):  # Keras hands masks on to calls with one tensor argument only
            mask = attached
        residual = None if residual is None else tf.cast(residual, x.dtype)
        if isinstance(self.axis, int):
            places = (-1, self.axis) if mask is attached else (self.axis, -1)
            weights = None if mask is None else mask_along(mask, x, places)
            y = self._normalize(x, residual, training, weights, self.axis, lambda: self._drawn(x), affine)
        else:
            axes = Axes.of(self._axes, x.shape)
            weights = None if mask is None else axes.merge(axes.mask(mask, x, mask is attached))
            residual = None if residual is None else axes.merge(residual)

            def drawn() -> Any:
                return [axes.merge(tf.broadcast_to(tensor, tf.shape(x))) for tensor in self._drawn(x)]

            y = axes.split(self._normalize(axes.merge(x), residual, training, weights, axes.place, drawn, affine), x)
        y = tf.cast(y, self.compute_dtype)
        return y if self._fused or not affine else tf.cast(self.activation(y), self.compute_dtype)

    def _drawn(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        assert self.adjustment is not None
        return adjustments.draw(self.adjustment, x)

    def _normalize(
        self,
        x: tf.Tensor,
        residual: tf.Tensor | None,
        training: Any,
        weights: tf.Tensor | None,
        axis: int,
        drawn: Callable[[], Any],
        affine: bool,
    ) -> tf.Tensor:
        gamma = parameter(self.gamma) if self.scale and affine else None
        beta = parameter(self.beta) if self.center and affine else None
        state = {name: parameter(getattr(self, name)) for name in self._statistics}
        fused = (self._fused if affine else None) or activations.Fused(None)
        trains = freezing.trains(training, self.trainable)
        y, moved = freezing.normalize(
            Batch(x, gamma, beta, weights, residual),
            state,
            Options(axis, self.epsilon, *fused),
            self._policy,
            freezing.Switches(trains, self.use_batch_statistics, self.update_statistics),
            None if self.adjustment is None else drawn,
        )
        if trains is not False and self.update_statistics:
            for name, value in moved.items():
                variable = getattr(self, name)
                variable.assign(tf.reshape(value, variable.shape))
        return y

    @property
    def _axes(self) -> list[int]:
        return [self.axis] if isinstance(self.axis, int) else list(self.axis)

    @property
    def _statistics(self) -> tuple[str, ...]:
        """The names of the weights that training moves."""
        counted = ("batches",) if self.momentum is None else ()
        return ("moving_mean", "moving_variance", *(renorms.NAMES if self._renorm else ()), *counted)

    @property
    def _renorm(self) -> renorms.Renorm | None:
        if not getattr(self, "renorm", False):  # Keras before 3.14 has none
            return None
        return renorms.Renorm(self.renorm_clipping, self.renorm_momentum)

    @property
    def _policy(self) -> Policy:
        size = self.virtual_batch_size
        groups = None if size is None else ghosts.Ghosts(size, self.virtual_batch_grouping)
        together = self.synchronized and synchronized.replicas() > 1
        return Policy(
            self.momentum,
            self.correction,
            self.nan_policy,
            self._renorm,
            groups,
            self.bridge,
            together,
            "bias" in self.replaces,
        )

    @property
    def _fused(self) -> activations.Fused | None:
        return activations.fuse(self.activation, self.compute_dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        shape = super().compute_output_shape(input_shape)
        if isinstance(self.activation, keras.layers.Layer):
            shape = self.activation.compute_output_shape(shape)
        return shape

    def not_in_config(self) -> dict[str, Any]:
        """Arguments that a config can't hold as they are: a copy of the layer in the same process takes them."""
        live = {"adjustment": self.adjustment, "renorm_clipping": getattr(self, "renorm_clipping", None)}
        return {name: value for name, value in live.items() if value}

    def get_config(self) -> dict[str, Any]:
        config = {**super().get_config(), "activation": keras.activations.serialize(self.activation)}
        config["axis"] = self.axis if isinstance(self.axis, int) else list(self.axis)
        if "renorm_clipping" in config:
            config["renorm_clipping"] = renorms.plain_clipping(config["renorm_clipping"])
        if self.adjustment is not None:
            _logger.warning("the adjustment of layer %s is left out of its config", self.name)
        own = {name: getattr(self, name) for name in arguments.OWN}
        words = {name: value for name, value in own.items() if value != getattr(BatchNormalization, name)}
        return {**config, **words, **({"replaces": dict(self.replaces)} if self.replaces else {})}
