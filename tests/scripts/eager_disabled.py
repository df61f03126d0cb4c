"""Keras's layer and ours in a TF 1 program: no eager execution, placeholders, Session.run, explicit assign ops."""

import bnfast.keras
import keras
import numpy as np
import tensorflow as tf

v1 = tf.compat.v1
v1.disable_eager_execution()
CLASSES = (keras.layers.BatchNormalization, bnfast.keras.BatchNormalization)
RENORM = {"renorm": True, "renorm_clipping": {"rmin": 0.8, "rmax": 1.25, "dmax": 0.2}, "renorm_momentum": 0.75}
CASES = {
    "rank 2": ((None, 5), "float32", {}),
    "axis 1": ((None, 3, 4, 4), "float32", {"axis": 1}),
    "float64, no gamma": ((None, 4, 4, 3), "float64", {"scale": False, "dtype": "float64"}),
    "integers": ((None, 5), "int32", {}),
    "renorm": ((None, 5), "float32", RENORM if "renorm" in CLASSES[0]().get_config() else {}),
}


def assigns(graph, before):
    """The assign ops added to the graph since `before`: the updates of a call. Fetching y alone does not run them."""
    return [op for op in graph.get_operations() if op not in before and op.type == "AssignVariableOp"]


def batch(shape, dtype, step):
    rng = np.random.default_rng(step)
    x = rng.normal(1, 3, (8, *shape[1:]))
    return (x * 10).astype(dtype) if dtype == "int32" else x.astype(dtype)


def run(make, shape, dtype, kwargs):
    """Everything a program sees of a layer: y, gradients and weights, over three training steps, then inference."""
    seen = []
    with v1.Graph().as_default() as graph, v1.Session() as session:
        x = v1.placeholder(dtype, shape)
        layer = make(momentum=0.75, **kwargs)
        layer.build(shape)
        before = set(graph.get_operations())
        y = layer(x, training=True)
        updates = assigns(graph, before)
        z = layer(x, training=False)
        assert assigns(graph, before) == updates, "inference updates nothing"
        assert len(updates) == len(layer.non_trainable_variables)
        weights = [variable.value for variable in layer.trainable_variables]
        wanted = weights if dtype == "int32" else [x, *weights]
        dy = tf.cast(tf.range(tf.size(y)), y.dtype)
        gradients = [v1.gradients(tf.reshape(out, [-1]), wanted, grad_ys=dy) for out in (y, z)]
        state = [variable.value for variable in layer.variables]
        session.run(v1.global_variables_initializer())
        session.run(y, {x: batch(shape, dtype, 9)})
        seen.append(session.run(state))  # unchanged, because no update was fetched
        for step in range(3):
            seen += session.run([y, gradients[0], updates], {x: batch(shape, dtype, step)})[:2]
            seen.append(session.run(state))
        seen += session.run([z, gradients[1]], {x: batch(shape, dtype, 3)})
        seen.append(session.run(state))
    return [array for item in seen for array in (item if isinstance(item, list) else [item])]


def training_by_placeholder():
    """`training` as a placeholder, which Keras's layer does not support: equal to calls with True and False."""
    with v1.Graph().as_default() as graph, v1.Session() as session:
        x, training = v1.placeholder("float32", (None, 5)), v1.placeholder("bool", ())
        layer = bnfast.keras.BatchNormalization(momentum=0.75)
        wanted = [layer(x, training=False), layer(x, training=True)]
        before = set(graph.get_operations())
        y = layer(x, training=training)
        updates = assigns(graph, before)
        session.run(v1.global_variables_initializer())
        for value in (False, True):
            given = {x: batch((None, 5), "float32", 5), training: value}
            mean = session.run(layer.moving_mean.value)
            np.testing.assert_array_equal(session.run(y, given), session.run(wanted[value], given))
            session.run(updates, given)
            assert np.array_equal(session.run(layer.moving_mean.value), mean) != value


for name, case in CASES.items():
    theirs, ours = (run(make, *case) for make in CLASSES)
    assert len(theirs) == len(ours)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype, (name, index)
        rtol = 1e-9 if a.dtype == np.float64 else 2e-4
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1, np.abs(b).max()), err_msg=f"{name}, {index}")
training_by_placeholder()
print(f"{len(CASES)} cases and a placeholder for training")
