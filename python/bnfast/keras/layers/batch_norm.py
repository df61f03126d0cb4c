"""`bnfast.keras.BatchNormalization`: keras.layers.BatchNormalization, trained by bnfast's kernels.

In training `call` runs one kernel forward and one backward; in inference, what is exported are the framework's own ops,
so that an exported model doesn't need bnfast. Weights, their names and order, config, dtype policies and the meaning of
`training` and `trainable` are Keras's own. Two things differ on purpose: a mask is read along the right axes for every
`axis`, and an empty or fully masked batch leaves the moving statistics unchanged.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import keras

from . import activation as activations
from . import arguments, masks, reader
from .framework import (
    FUSES,
    ON_TENSORFLOW,
    Axes,
    Batch,
    Mode,
    Options,
    Policy,
    as_input,
    count_dtype,
    folding,
    fusion,
    ghosts,
    is_training,
    note_updates,
    parameter,
    replicas,
    step,
    supports_jit,
)
from .framework import (
    adjustment as adjustments,
)
from .framework import (
    renorm as renorms,
)
from .fusion import has_other_readers, trace_of
from .fusion import install as install_fusion

KERAS: Any = keras.layers.BatchNormalization  # the class itself, whatever that name is patched to later

_KERAS_HAS_RENORM = "renorm" in inspect.signature(KERAS.__init__).parameters  # since Keras 3.14
_logger = logging.getLogger("bnfast")
_VECTORS = ("gamma", "beta", "moving_mean", "moving_variance")


@keras.saving.register_keras_serializable(package="bnfast")
class BatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """Batch normalization with the arguments, weights and results of `keras.layers.BatchNormalization`.

    In training mode the mean and variance are taken over all axes but `axis`, and the moving statistics are updated:

        y = activation(gamma*(x - mean)/sqrt(variance + epsilon) + beta)
        moving = moving*momentum + batch*(1 - momentum)

    In inference mode, and in every call with `trainable = False`, the moving statistics replace the batch's. Three
    switches freeze parts of this, whatever `training` is for the layers around. They are read at every call; a traced
    function or compiled model keeps the values it was traced with.

        use_batch_statistics  update_statistics   y is normalized with              moving statistics
        None (default)        True (default)      the batch's in training           are updated in training
        None                  False               the batch's in training           are never updated
        False                 True                the moving ones                   are updated in training
        False                 False               the moving ones                   are never updated
        True                  True                the batch's, in inference, too    are updated in training
        True                  False               the batch's, in inference, too    are never updated

    "In training" means training=True and layer.trainable. trainable_affine=False makes gamma and beta non-trainable
    weights, which layer.trainable doesn't undo. Keras's usual freeze, trainable = False, is the first row in inference
    mode. In the third row y and the moving statistics come from separate passes, so x is read once more.

    renorm=True works as in Keras: y = gamma*(xhat*r + d) + beta in training, with Keras's weights and order of updates.
    The values of renorm_clipping may also be scalar `tf.Variable`s: assigning to one takes effect without retracing.
    (Off TensorFlow they may be scalar tensors.) A config holds their values at that time. Their order (rmin <= rmax) is
    checked once, by the constructor.

    axis may name several axes, as in tf.keras 2: axis=[1, 2] normalizes every pair of indices separately, over the
    other axes. The weights then have the rank of inputs, with extent 1 off these axes, and a mask has the shape of
    inputs without them. Adjacent axes cost nothing more; others cost a copy of x, y, dy and dx.

    Args:
        axis: the channel axis, an int, or several: see above.
        center, scale: whether to have beta, gamma.
        beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer: of the weights, which
            have shape (C,) and are float32 (with dtype="float64": float64).
        beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint: as in any layer of Keras.
        renorm, renorm_clipping, renorm_momentum: batch renormalization, see above. It needs Keras 3.14.
        fused: Keras 2's argument. True is refused where Keras 2 refuses it; else it is only stored.
        kwargs: those of keras.layers.Layer: name, dtype, trainable, activity_regularizer ...
        activation: None, a name, a function or a layer instance. Fused into the kernels are relu, relu6, leaky_relu,
            silu (swish), hard_silu (hard_swish), sigmoid, hard_sigmoid, tanh, gelu, elu, selu, softplus and mish, also
            as keras.activations functions and as ReLU, LeakyReLU and Activation layers. Any other activation is applied
            after the kernel.
        momentum: a number in [0, 1], or a scalar tensor or variable, which every call reads: assigning to a variable
            takes effect without retracing. A config holds its value at that time. It isn't a weight of the layer and
            gets no gradient. None makes moving_mean and moving_variance the plain averages over all batches so far. The
            weight `batches` counts the batches; empty ones aren't counted.
        epsilon: a finite number >= 0, or a scalar tensor or variable, as for momentum.
        correction: 1 puts variance*W/(W - 1), the sample variance, into moving_variance, as PyTorch does; 0 the
            population variance, as Keras does. y is the same. Not with renorm.
        nan_policy: "propagate", or "skip_update": the moving statistics of a channel whose mean or variance isn't
            finite are not updated; y keeps the non-finite values. (`batches` counts the batch for all channels.)
        update_statistics, use_batch_statistics, trainable_affine: see above.
        virtual_batch_size: normalize every group of this many samples (axis 0) separately, as ghost batches. The moving
            statistics are updated with the mean of the ghosts' statistics. It must divide the batch. Not with renorm.
        virtual_batch_grouping: "contiguous": a ghost is a slice of the batch; "strided": of G ghosts, ghost g holds
            samples g, g + G, ..., as in TF 1 and tf.keras 2.
        adjustment: a function of the shape of inputs (a tensor) that returns (scale, bias), which broadcast to inputs.
            In training y is activation((xhat*scale + bias)*gamma + beta), as in TF 1. A config can't hold the function:
            it is left out, and a warning goes to the logger `bnfast`. Not with virtual_batch_size.
        synchronized: on TensorFlow alone; under a tf.distribute strategy, normalize over the samples of all replicas,
            whose shards may have any size. Without a strategy, or with one replica, it has no effect. Replicas
            communicate in every training call, which must not be inside a tf.cond or tf.while_loop. Not with renorm,
            virtual_batch_size or adjustment.
        bridge: how TensorFlow calls the kernels in training (other backends store the word and don't read it): "op"
            (bnfast's own TensorFlow op), "numpy_function" (a Python callback each way), "tensorflow" (not the kernels
            but TensorFlow's own ops, the fused one where it fits), or "auto": where TensorFlow sees a GPU, its own ops
            and one warning in the logger `bnfast`, because the kernels run on the CPU alone; elsewhere the op if it
            loads, else numpy_function and one warning. The environment variable BNFAST_BRIDGE decides for "auto". XLA
            compiles the layer on TensorFlow's own ops only.

    Call arguments:
        inputs: float tensor of any rank; integers are computed in float32, as in Keras.
        training: None, True, False or a boolean tensor.
        mask: inputs.shape without the channel axis, or with extents of 1; zero or False leaves an entry out of the
            statistics. A mask that Keras attached to inputs (Masking) lies along inputs.shape[:-1] whatever `axis` is,
            and so does any other mask that fits no other way.

    Raises:
        RuntimeError: in training only, bridge="op" and the op can't be loaded. A saved layer can still be loaded and
            used for inference.
        ValueError, TypeError: an argument is out of range or of the wrong type; the message names it.

    Example:
        >>> import numpy as np
        >>> from bnfast.keras import BatchNormalization
        >>> layer = BatchNormalization(momentum=0.5, epsilon=0.0, activation="relu")
        >>> x = np.array([[1.0], [5.0]], "float32")
        >>> layer(x, training=True).numpy()
        array([[0.],
               [1.]], dtype=float32)
        >>> layer.moving_mean.numpy(), layer.moving_variance.numpy()
        (array([1.5], dtype=float32), array([2.5], dtype=float32))

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167.
    """

    momentum: Any
    epsilon: Any
    _weight_shape: tuple[int, ...] | None = None  # if not (C,)
    _bnfast_trace: fusion.Trace | None = None  # of the last call that may train

    def __init__(
        self,
        axis: Any = -1,
        momentum: Any = 0.99,
        epsilon: Any = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: Mapping[str, Any] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
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
        **kwargs: Any,
    ) -> None:
        if renorm and not _KERAS_HAS_RENORM:
            raise ValueError(f"renorm needs Keras 3.14 or newer. Received: renorm=True with Keras {keras.__version__}")
        if renorm or not isinstance(renorm_clipping, Mapping | None):  # get_config reads it without renorm, too
            renorms.check(renorm_clipping, renorm_momentum)
        if renorm or _KERAS_HAS_RENORM:
            kwargs |= {"renorm": renorm, "renorm_clipping": renorm_clipping, "renorm_momentum": renorm_momentum}
        axes = [arguments.one_axis(one) for one in axis] if isinstance(axis, (list, tuple)) and len(axis) > 1 else axis
        first = arguments.one_axis(axes[0] if axes is not axis else axis)
        momentum = None if momentum is None else arguments.checked("momentum", momentum)
        epsilon = arguments.checked("epsilon", epsilon)
        super().__init__(
            axis=first,
            momentum=0.0,  # Keras would make floats of them
            epsilon=0.0,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            synchronized=synchronized,
            **kwargs,
        )
        self.momentum, self.epsilon = momentum, epsilon
        if axes is not axis:
            self.axis = axes
        self._hold(
            arguments.validated_features(
                activation=activation,
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
                axis=axis,
                renorm=self._renorm is not None,
                synchronized=self.synchronized,
            )
        )
        self.supports_jit = supports_jit(self._features.bridge)
        install_fusion()

    def _hold(self, features: arguments.Features) -> None:
        for name, value in features._asdict().items():
            setattr(self, name, value)

    @property
    def _features(self) -> arguments.Features:
        return arguments.Features(*(getattr(self, name) for name in arguments.Features._fields))

    def build(self, input_shape: Any) -> None:
        axes, features = Axes.of(self._axes, input_shape), self._features
        if features.virtual_batch_size is not None and 0 in axes.axes:
            raise ValueError(f"axis must not be 0, the batch's, with virtual_batch_size. Received: axis={self.axis}")
        if features.fused:
            arguments.check_fused_shape(self._axes[0], axes.rank)
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
                shape=(), initializer="zeros", dtype=count_dtype(), name="batches", trainable=False, autocast=False
            )
        if isinstance(features.activation, keras.layers.Layer) and not features.activation.built:
            features.activation.build(input_shape)

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("name") in ("gamma", "beta") and not self._features.trainable_affine:
            kwargs["trainable"] = False
        if self._weight_shape is not None and kwargs.get("name") in (*_VECTORS, *renorms.NAMES):
            kwargs["shape"] = self._weight_shape
        return super().add_weight(*args, **kwargs)

    save_assets = reader.save_assets

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        arguments, finish = self._prepare(inputs, training, mask)
        return finish(*step(*arguments))

    def _prepare(
        self, inputs: Any, training: Any, mask: Any, residual: Any = None, affine: bool = True
    ) -> tuple[tuple[Any, ...], Callable[[Any, Any], Any]]:
        """The arguments of `step`, and the function that turns its results into the layer's output.

        Without `affine` that output is xhat: gamma, beta and the activation are left out.
        """
        features = self._features
        x = as_input(inputs, getattr(self.input_spec, "ndim", None))
        if ON_TENSORFLOW and has_other_readers(self):
            folding.keep(x)
        axes = Axes.of(self._axes, x.shape, known=len(self._axes) > 1)
        if mask is None and keras.ops.is_tensor(training):  # Keras passes masks only to calls with one tensor argument
            mask = masks.attached(inputs)
        batch = Batch(
            axes.merge(x),
            parameter(self.gamma) if self.scale and affine else None,
            parameter(self.beta) if self.center and affine else None,
            None if mask is None else axes.merge(axes.mask(mask, x, masks.is_attached(mask, inputs, self))),
            None if residual is None else axes.merge(keras.ops.cast(residual, x.dtype)),
        )
        state = {name: parameter(getattr(self, name)) for name in self._statistics}
        built_in = self._built_in(features)
        fused = (built_in if affine else None) or activations.Fused(None)
        options = Options(axes.place, arguments.read(self, "epsilon"), *fused)
        mode = Mode(is_training(training, self.trainable), features.use_batch_statistics, features.update_statistics)
        draw = None if features.adjustment is None else partial(adjustments.draw_merged, features.adjustment, x, axes)

        def finish(y: Any, new: Any) -> Any:
            if mode.update is not False:
                for name, value in new.items():
                    variable = getattr(self, name)
                    same = not ON_TENSORFLOW and tuple(value.shape) == tuple(variable.shape)  # a graph may not know
                    variable.assign(value if same else keras.ops.reshape(value, variable.shape))
                if trace is not None:
                    note_updates(y, [self.moving_mean, self.moving_variance])
            y = axes.split(y, x)
            if keras.backend.standardize_dtype(y.dtype) != self.compute_dtype:
                y = keras.ops.cast(y, self.compute_dtype)
            if built_in or not affine:
                return y
            return keras.ops.cast(features.activation(y), self.compute_dtype)

        trace = self._new_trace(mode, features) if residual is None and affine else None
        return (batch, state, options, self._policy(features, trace), mode, draw), finish

    @property
    def _axes(self) -> list[int]:
        return [self.axis] if isinstance(self.axis, int) else list(self.axis)

    @property
    def _statistics(self) -> tuple[str, ...]:
        """The names of the weights that training updates without gradients."""
        counted = ("batches",) if self.momentum is None else ()
        return ("moving_mean", "moving_variance", *(renorms.NAMES if self._renorm else ()), *counted)

    @property
    def _renorm(self) -> renorms.Renorm | None:
        if not getattr(self, "renorm", False):  # Keras before 3.14 has no renorm
            return None
        return renorms.Renorm(self.renorm_clipping, self.renorm_momentum)

    def _policy(self, features: arguments.Features, trace: fusion.Trace | None) -> Policy:
        size = features.virtual_batch_size
        groups = None if size is None else ghosts.Ghosts(size, features.virtual_batch_grouping)
        several = self.synchronized and replicas() > 1
        return Policy(
            arguments.read(self, "momentum"),
            features.correction,
            features.nan_policy,
            self._renorm,
            groups,
            features.bridge,
            several,
            trace,
        )

    def _new_trace(self, mode: Mode, features: arguments.Features) -> fusion.Trace | None:
        """Where a call notes what is fused with it; None if nothing may be, as its output is needed."""
        if not FUSES:
            return None
        trace = trace_of(self)
        if mode.is_training is not False:
            self._bnfast_trace = trace
        alone = self.activity_regularizer is None and features.activation is keras.activations.linear
        return trace if alone else None

    def _built_in(self, features: arguments.Features) -> activations.Fused | None:
        """The activation that the kernel computes; None if it is applied after the kernel."""
        return activations.fuse(features.activation, self.compute_dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        shape, activation = super().compute_output_shape(input_shape), self._features.activation
        if isinstance(activation, keras.layers.Layer):
            shape = activation.compute_output_shape(shape)
        return shape

    def get_config(self) -> dict[str, Any]:
        config = {**super().get_config(), **arguments.current(self)}
        config["activation"] = keras.activations.serialize(self._features.activation)
        config["axis"] = self.axis if isinstance(self.axis, int) else list(self.axis)
        if "renorm_clipping" in config:
            config["renorm_clipping"] = renorms.plain_clipping(config["renorm_clipping"])
        if self._features.adjustment is not None:
            _logger.warning("the adjustment of layer %s is left out of its config", self.name)
        own = self._features._replace(activation=keras.activations.linear, adjustment=None)._asdict()
        default = arguments.Features()._asdict()
        return {**config, **{name: value for name, value in own.items() if value != default[name]}}


def features_of(layer: Any) -> arguments.Features:
    """What a batch norm does beyond Keras's: nothing, for Keras's own layer, whatever attributes a script gave it."""
    return layer._features if isinstance(layer, BatchNormalization) else arguments.Features()
