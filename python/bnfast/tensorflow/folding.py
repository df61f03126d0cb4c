"""Inference while a graph is traced: a batch norm after a convolution or matrix product scales the kernel of that op.

    a = gamma/sqrt(variance + epsilon), b = beta - a*mean
    a*(x @ kernel + bias) + b = x @ (kernel*a) + (bias*a + b)

The op that made x is emitted once more with the scaled kernel, so the pass over x that normalizes it is gone. The
kernel is scaled when the graph runs: a multiplication per weight and call. x stays in the graph for other readers and
is pruned if there are none. Gradients are those of the formula on x. TensorFlow's own ops only, so an exported graph
needs no bnfast. Only float32 and float64: a half type would round the scaled kernel too coarsely.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from . import scalars
from .batch import Batch, Options, per_channel
from .custom_gradient import custom_gradient
from .pullback import inside, pullback

_SHARED = "_bnfast_has_other_readers"  # the attribute of a tensor
_KERNELS = ("Conv2D", "Conv3D", "DepthwiseConv2dNative", "MatMul")

Infer = Callable[[Batch, tuple[tf.Tensor, tf.Tensor], Options], tf.Tensor]


def keep(x: tf.Tensor) -> None:
    """Marks x as a tensor that something else will read, so that its product isn't folded."""
    if not tf.executing_eagerly():
        setattr(x, _SHARED, True)


def softplus(x: Any) -> tf.Tensor | None:
    """log(1 + e^x) without TensorFlow's Softplus, where x is the sum of a convolution with a bias and something else.

    TensorFlow (2.21) makes one op of such a sum and x*tanh(softplus(x)), and then has no kernel for it: "Fusion is not
    implemented: [BiasAdd,Add,Mish]". Folding puts the convolution and the sum together, so a model would fail that ran
    before. None for any other tensor.
    """
    if not isinstance(x, tf.Tensor) or not tf.inside_function() or _origin(x).type not in ("Add", "AddV2"):
        return None
    terms = [_origin(term) for term in _origin(x).inputs]
    if not any(term.type == "BiasAdd" and _origin(term.inputs[0]).type in ("Conv2D", "Conv3D") for term in terms):
        return None
    # Beyond the limit e^-x is below the rounding of x, in float64 too. In float16 e^12 is infinite.
    limit = tf.constant(8 if x.dtype == tf.float16 else 40, x.dtype)
    few = tf.where(x > limit, limit, x)  # not tf.minimum: the gradient of NaN is NaN
    return tf.where(x > limit, x, tf.math.log1p(tf.exp(few)))


def _origin(tensor: tf.Tensor) -> Any:
    """The op that made a tensor; those that only pass it on don't count."""
    while tensor.op.type in ("Identity", "IdentityN", "StopGradient"):
        tensor = tensor.op.inputs[tensor.value_index]
    return tensor.op


def fold(batch: Batch, moving: tuple[tf.Tensor, tf.Tensor], options: Options, infer: Infer) -> tf.Tensor | None:
    """y without residual and activation, or None if no op of these kinds made x in this graph.

    infer: the function of the same arguments on x, whose gradients y has.
    """
    found = _made_by(batch.x, options.axis)
    if found is None:
        return None
    product, bias = found
    names = [name for name in ("x", "gamma", "beta") if getattr(batch, name) is not None]
    given = [inside(tensor) for tensor in (*(getattr(batch, name) for name in names), *moving)]

    def unfolded(*vectors: tf.Tensor) -> list[tf.Tensor]:
        return [infer(Batch(**dict(zip(names, (given[0], *vectors), strict=False))), vectors[-2:], options)]

    def forward(*tensors: tf.Tensor) -> Any:
        a, shift = _affine(batch, moving, options)

        def backward(dy: tf.Tensor) -> Any:
            # dx doesn't read x: if nobody wants the gradients of the vectors, the first product is pruned here, too.
            dx = dy * tf.cast(per_channel(a, dy, options.axis % dy.shape.rank), dy.dtype)
            return (dx, *pullback(unfolded, given[1:], [dy]))

        return _scaled(product, bias, a, shift), backward

    y = custom_gradient(forward, *given)
    y.set_shape(batch.x.shape)
    return y


def _made_by(x: tf.Tensor, axis: int) -> tuple[Any, tf.Tensor | None] | None:
    """The op that made x, and the bias added to its output."""
    if (
        not tf.inside_function()
        or x.graph is not tf.compat.v1.get_default_graph()
        or x.consumers()
        or hasattr(x, _SHARED)
    ):
        return None
    product, bias = x.op, None
    if product.type == "BiasAdd":
        if _channels(product, x.shape.rank) != axis % x.shape.rank:
            return None
        bias, product = product.inputs[1], product.inputs[0].op
    if product.type not in _KERNELS or x.dtype not in (tf.float32, tf.float64) or x.shape.rank is None:
        return None
    if product.type == "MatMul" and (product.get_attr("transpose_b") or product.get_attr("transpose_a")):
        return None
    return (product, bias) if _channels(product, x.shape.rank) == axis % x.shape.rank else None


def _channels(op: Any, rank: int) -> int:
    if op.type == "MatMul":
        return 1
    return 1 if op.get_attr("data_format") in (b"NCHW", b"NCDHW") else rank - 1


def _affine(batch: Batch, moving: tuple[tf.Tensor, tf.Tensor], options: Options) -> tuple[tf.Tensor, tf.Tensor]:
    """a and b of the formula, of shape (C,)."""
    mean, variance = moving
    a = tf.math.rsqrt(variance + scalars.like(options.epsilon, variance))
    a = a if batch.gamma is None else a * batch.gamma
    return a, -a * mean if batch.beta is None else batch.beta - a * mean


def _scaled(product: Any, bias: tf.Tensor | None, a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    kernel = product.inputs[1]
    a, b = tf.cast(a, kernel.dtype), tf.cast(b, kernel.dtype)
    b = b if bias is None else bias * a + b
    if product.type == "DepthwiseConv2dNative":
        a = tf.reshape(a, tf.shape(kernel)[-2:])
    names = [attribute.name for attribute in product.op_def.attr if attribute.name not in ("T", "grad_a", "grad_b")]
    attributes = {name: product.get_attr(name) for name in names}
    inputs = dict(zip((argument.name for argument in product.op_def.input_arg), product.inputs, strict=True))
    inputs[product.op_def.input_arg[1].name] = kernel * a
    y = getattr(tf.raw_ops, product.type)(**inputs, **attributes)
    channels_first = _channels(product, y.shape.rank) == 1 and product.type != "MatMul"
    return tf.nn.bias_add(y, b, "NC..." if channels_first else "N...C")
