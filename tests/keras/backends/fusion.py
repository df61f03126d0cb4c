"""What follows a batch norm may be fused with it while a program is traced: models train as Keras's own do, on every
backend; and on JAX: what is fused, what isn't, and that no unfused call stays in the program."""

import re

import bnfast.keras as bk
import keras
import numpy as np
import pytest
from keras import layers, ops

BACKEND = keras.backend.backend()
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="fusion on JAX")
rng = np.random.default_rng(3)
X = rng.normal(0.3, 1.2, (6, 5, 5, 4)).astype(np.float32)
LABELS = np.arange(6) % 3


def relu(x):
    return layers.ReLU()(x)


def convolution(x, filters=4):
    return layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)


def norm(x, **kwargs):
    return layers.BatchNormalization(**kwargs)(x)


def plain(x):
    return relu(norm(x))


def relu6(x):
    return layers.ReLU(max_value=6.0)(norm(x))


def silu(x):
    return layers.Activation("silu")(norm(x))


def leaky(x):
    return layers.LeakyReLU(0.1)(norm(x))


def residual(x):
    return relu(layers.Add()([norm(x), x]))


def residual_of_norms(x):
    return relu(layers.add([norm(convolution(x)), norm(x)]))


def branches(x):
    y = norm(x)
    return layers.Concatenate()([relu(y), convolution(y)])


def sum_with_itself(x):
    y = norm(x)
    return relu(layers.Add()([y, convolution(y)]))


def two_activations(x):
    y = norm(x)
    return layers.Add()([relu(y), layers.Activation("silu")(y)])


def gated(x):
    y = norm(x)
    return layers.Multiply()([y, layers.Activation("sigmoid")(y)])


def shared(x):
    layer, activation = layers.BatchNormalization(), layers.ReLU()
    first = activation(layer(x))
    return layers.Add()([first, activation(layer(convolution(first)))])


def shared_before_activations(x):
    layer = layers.BatchNormalization()
    first, second = layer(x), layer(convolution(x))
    return layers.Add()([relu(first), relu(second)])


def half_frozen(x):
    return relu(norm(relu(norm(x, trainable=False))))


def broadcast_add(x):
    return relu(layers.Add()([norm(x), layers.GlobalAveragePooling2D(keepdims=True)(x)]))


def in_a_model(x):
    inner = keras.Input(x.shape[1:])
    return relu(keras.Model(inner, norm(inner))(x))


BODIES = [
    plain,
    relu6,
    silu,
    leaky,
    residual,
    residual_of_norms,
    branches,
    sum_with_itself,
    two_activations,
    gated,
    shared,
    shared_before_activations,
    half_frozen,
    broadcast_add,
    in_a_model,
]
FUSED = {
    plain: ["relu"],
    relu6: ["relu6"],
    silu: ["silu"],
    leaky: [""],
    residual: ["add + relu"],
    branches: [""],
    sum_with_itself: [""],
    two_activations: [""],
    gated: [""],
    shared_before_activations: ["relu"],  # the second call: the first one's statistics are no longer the layer's
    half_frozen: ["", "relu"],
    broadcast_add: [""],
}


def model_of(body):
    keras.utils.set_random_seed(5)
    inputs = keras.Input(X.shape[1:])
    x = body(convolution(inputs))
    made = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))
    for layer in made.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.gamma.assign(rng.uniform(0.5, 1.5, layer.gamma.shape))
            layer.beta.assign(rng.normal(0, 0.5, layer.beta.shape))
    return made


def fit(model, batches=3, jit=True):
    model.compile(keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(True), jit_compile=jit)
    return [float(model.train_on_batch(X, LABELS)) for _ in range(batches)]


def assert_alike(ours, theirs, tolerance=2e-4):
    assert [v.path for v in ours.weights] == [v.path for v in theirs.weights]
    for one, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_trains_as_keras_does(body):
    theirs = model_of(body)
    ours = bk.accelerate(theirs, verbose=False)
    jit = BACKEND == "jax"
    np.testing.assert_allclose(fit(ours, jit=jit), fit(theirs, jit=jit), rtol=1e-4)
    assert_alike(ours, theirs)
    if BACKEND == "jax" and body in FUSED:
        assert [row.fused for row in bk.report(ours).rows] == FUSED[body]


class Block(keras.Model):
    """A subclassed model: nothing knows what reads its batch norm."""

    def __init__(self, read_again):
        super().__init__()
        self.norm, self.head, self.read_again = layers.BatchNormalization(), layers.Dense(3), read_again

    def call(self, x, training=None):
        y = self.norm(x, training=training)
        z = ops.relu(ops.add(y, x))
        if self.read_again:
            z = z + ops.sin(y) + ops.tanh(y) * y
        return self.head(ops.mean(z, (1, 2)))


@pytest.mark.parametrize("read_again", [False, True])
def test_a_subclassed_model_whose_tensor_is_read_again(read_again):
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(5)
        models.append(Block(read_again))
        models[-1](X)
    ours, theirs = models
    bk.accelerate(ours, inplace=True, verbose=False)
    jit = BACKEND == "jax"
    np.testing.assert_allclose(fit(ours, jit=jit), fit(theirs, jit=jit), rtol=1e-4)
    for one, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_other_dtypes(policy):
    keras.config.set_dtype_policy(policy)
    try:
        theirs = model_of(residual)
        ours = bk.accelerate(theirs, verbose=False)
    finally:
        keras.config.set_dtype_policy("float32")
    jit = BACKEND == "jax"
    np.testing.assert_allclose(fit(ours, jit=jit), fit(theirs, jit=jit), rtol=2e-2)
    assert_alike(ours, theirs, 3e-2)


# ---- JAX -------------------------------------------------------------------------------------------------------------


def loss_of(model):
    def loss(trainable, others, x):
        y, others = model.stateless_call(trainable, others, x, training=True)
        return ops.sum(ops.sin(y)), others

    return loss


def state_of(model):
    return [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]


def calls(function, *arguments):
    """How often the compiled program calls the forward and the backward kernel, and with which activations."""
    import jax

    lowered = jax.jit(function).lower(*arguments)
    compiled = lowered.compile().as_text()
    counts = [compiled.count(f'custom_call_target="bnfast_{name}"') for name in ("train", "grad")]
    activations = re.findall(r"custom_call @bnfast_train\(.*?activation = (\d+)", lowered.as_text())
    return *counts, [int(one) for one in activations]


@on_jax
@pytest.mark.parametrize(
    ("body", "forward", "backward"),
    [
        (plain, 1, 1),
        (residual, 1, 1),
        (residual_of_norms, 2, 2),
        (shared, 2, 2),
        (shared_before_activations, 2, 2),
        (branches, 1, 1),
        (leaky, 1, 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_unfused_call_vanishes(body, forward, backward):
    import jax

    ours = bk.accelerate(model_of(body), verbose=False)
    step = jax.value_and_grad(loss_of(ours), has_aux=True)
    found = calls(step, *state_of(ours), X)
    assert found[:2] == (forward, backward)
    assert any(found[2]) == any(row.fused for row in bk.report(ours).rows)
    compiled = jax.jit(loss_of(ours)).lower(*state_of(ours), X).compile().as_text()
    assert compiled.count('custom_call_target="bnfast_train"') == forward, "without a gradient"


def twins(body):
    theirs = model_of(body)
    ours = bk.accelerate(theirs, verbose=False)
    return ours, theirs


def assert_same_tree(ours, theirs, tolerance=2e-4):
    import jax

    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def in_halves(function):
    return lambda t, n, x: function(t, n, x.reshape(2, 3, *x.shape[1:]))


def scanned(gradient):
    import jax

    def loop(trainable, others, x):
        def body(others, x):
            (value, others), gradients = gradient(trainable, others, x)
            return others, (value, gradients)

        return jax.lax.scan(body, others, x)

    return loop


def penalized(loss):
    import jax

    def penalty(trainable, others, x):
        slope = jax.grad(lambda x: loss(trainable, others, x)[0])(x)
        return (slope**2).sum()

    return penalty


def transformed(kind, model):
    import jax

    loss = loss_of(model)
    gradient = jax.value_and_grad(loss, has_aux=True)
    over_halves = in_halves(jax.vmap(gradient, (None, None, 0)))
    return {
        "jit": jax.jit(gradient),
        "eager": gradient,
        "grad of jit": jax.value_and_grad(jax.jit(loss), has_aux=True),
        "checkpoint": jax.jit(jax.value_and_grad(jax.checkpoint(loss), has_aux=True)),
        "vmap": jax.jit(over_halves),
        "eager vmap": over_halves,
        "scan": jax.jit(in_halves(scanned(gradient))),
        "cond": jax.jit(lambda t, n, x: jax.lax.cond(x.sum() > 0, gradient, gradient, t, n, x)),
        "second order": jax.jit(jax.grad(penalized(loss), (0, 2))),
    }[kind]


KINDS = ["jit", "eager", "grad of jit", "checkpoint", "vmap", "eager vmap", "scan", "cond", "second order"]


@on_jax
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", [residual, branches, shared], ids=lambda body: body.__name__)
def test_transformations(kind, body):
    import jax

    ours, theirs = twins(body)
    with jax.checking_leaks():
        found = transformed(kind, ours)(*state_of(ours), X)
    assert_same_tree(found, transformed(kind, theirs)(*state_of(theirs), X), 2e-3 if kind == "second order" else 3e-4)
    fused = [bool(row.fused) for row in bk.report(ours).rows]
    assert any(fused) == (body is not branches and not kind.startswith("eager"))


@on_jax
def test_no_mark_outlives_its_trace():
    import gc

    import jax
    from bnfast.keras.layers.portable import jax_fusion

    block = Block(True)
    block(X)
    models = [bk.accelerate(block, inplace=True, verbose=False)]
    for body in (residual, residual_of_norms, shared_before_activations):
        models.append(twins(body)[0])
    for model in models:
        jax.jit(jax.value_and_grad(loss_of(model), has_aux=True))(*state_of(model), X)
        gc.collect()
        assert jax_fusion._stages == {}


class Across(keras.layers.Layer):
    """Reads a batch norm's output in another scope, in a loop, in a checkpoint, and in a function of its own."""

    def __init__(self, way, norm):
        super().__init__()
        self.way, self.norm = way, norm

    def call(self, x, training=None):
        import jax

        y = self.norm(x, training=training)
        if self.way == "loop":
            return jax.lax.fori_loop(0, 3, lambda i, total: total + ops.relu(y), ops.zeros_like(y))
        if self.way == "checkpoint":
            return jax.checkpoint(lambda scale: ops.relu(y) * scale)(ops.ones(()))
        if self.way == "jit":
            return jax.jit(lambda: ops.relu(y))()
        if self.way == "statistics":  # read between the batch norm and the activation
            return ops.relu(y) + ops.mean(ops.convert_to_tensor(self.norm.moving_mean))
        raise ValueError(self.way)


@on_jax
@pytest.mark.parametrize("way", ["loop", "checkpoint", "jit", "statistics"])
def test_an_activation_in_another_trace(way):
    import jax

    results = []
    for make in (bk.BatchNormalization, layers.BatchNormalization):
        layer = Across(way, make(momentum=0.5))
        layer(X)
        step = jax.jit(jax.value_and_grad(loss_of(layer), has_aux=True))
        with jax.checking_leaks():
            results.append(step(*state_of(layer), X))
    assert_same_tree(*results)


@on_jax
def test_an_activation_in_another_scope():
    """The statistics that a stateless call has returned stay those of its own call; y and gradients are right."""
    import jax

    results = []
    for make in (bk.BatchNormalization, layers.BatchNormalization):
        layer = make(momentum=0.5)
        layer.build(X.shape)

        def loss(trainable, others, x, layer=layer):
            y, others = layer.stateless_call(trainable, others, x, training=True)
            with keras.StatelessScope():
                z = ops.relu(y)
            return ops.sum(ops.sin(ops.relu(y)) * z), others

        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(*state_of(layer), X))
        np.testing.assert_array_equal(layer.moving_mean, 0)
    assert_same_tree(*results)


@on_jax
def test_the_derivative_at_the_kinks():
    """gamma = 0 puts every value on the kink of beta: the gradients are those of JAX's own activations there."""
    import jax

    for name in ("relu", "relu6", "silu", "hard_silu", "elu", "gelu", "mish", "leaky_relu", "selu"):
        results = []
        for make in (bk.BatchNormalization, layers.BatchNormalization):
            layer = make(gamma_initializer="zeros")
            layer.build(X.shape)
            layer.beta.assign([0.0, 6.0, 3.0, -3.0])

            def loss(trainable, x, layer=layer, name=name):
                others = [v.value for v in layer.non_trainable_variables]
                y, _ = layer.stateless_call(trainable, others, x, training=True)
                return ops.sum(getattr(keras.activations, name)(y) * x)

            results.append(jax.jit(jax.grad(loss))([v.value for v in layer.trainable_variables], X))
        assert_same_tree(*results, 1e-3)


@on_jax
def test_own_ops_hold_no_call_of_ours():
    import bnfast.jax
    import jax

    ours, theirs = twins(residual)
    with bnfast.jax.own_ops():
        step = jax.jit(jax.value_and_grad(loss_of(ours), has_aux=True))
        assert "bnfast" not in step.lower(*state_of(ours), X).as_text()
        assert_same_tree(
            step(*state_of(ours), X), jax.value_and_grad(loss_of(theirs), has_aux=True)(*state_of(theirs), X)
        )


@on_jax
def test_update_statistics_false_and_an_activity_regularizer():
    import jax

    for kwargs, fused in (({"update_statistics": False}, ("relu",)), ({"activity_regularizer": "l2"}, ())):
        inputs = keras.Input(X.shape[1:])
        layer = bk.BatchNormalization(**kwargs)
        model = keras.Model(inputs, layers.ReLU()(layer(inputs)))
        jax.jit(jax.value_and_grad(loss_of(model), has_aux=True))(*state_of(model), X)
        assert layer._bnfast_trace.fused == fused
