"""bnfast.compat.v1.batch_normalization against tf_keras's function with the same arguments, in TF 1's graph mode."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import tensorflow as tf
from bnfast.compat.v1 import batch_normalization

v1 = tf.compat.v1
KEYS = v1.GraphKeys


@pytest.fixture
def theirs(need: Callable[[str], Any]) -> Any:
    """tf_keras's function. tf.compat.v1.layers is not available, because the tests run with Keras 3."""
    need("tf_keras")
    from tf_keras.src.legacy_tf_layers import normalization

    return normalization.batch_normalization


def adjust(shape: Any) -> Any:
    return tf.fill([shape[0], *[1] * (shape.shape[0] - 1)], 1.5), tf.constant(0.25)


CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "rank 2": ((12, 5), {}),
    "rank 3, axis 1": ((12, 5, 3), {"axis": 1}),
    "fused": ((6, 3, 2, 5), {"fused": None}),
    "fused, axis 1": ((6, 5, 3, 2), {"fused": True, "axis": 1}),
    "rank 5": ((3, 2, 3, 2, 4), {}),
    "rank 4, not fused": ((6, 3, 2, 5), {"fused": False}),
    "bare": ((12, 5), {"center": False, "scale": False}),
    "several axes": ((6, 3, 4, 5), {"axis": [1, 3]}),
    "renorm": ((12, 5), {"renorm": True, "renorm_clipping": {"rmax": 1.2, "rmin": 0.8, "dmax": 0.3}}),
    "ghosts": ((12, 3, 5), {"virtual_batch_size": 4}),
    "ghosts of rank 4": ((12, 3, 2, 5), {"virtual_batch_size": 3}),
    "adjustment": ((12, 3, 5), {"adjustment": adjust}),
    "not trainable": ((12, 5), {"trainable": False}),
    "regularized": (
        (12, 5),
        {"gamma_regularizer": tf.nn.l2_loss, "beta_regularizer": lambda v: 0.5 * tf.reduce_sum(tf.abs(v))},
    ),
}

SETTINGS = [  # without those at which tf_keras's function fails
    (case, tensor, dtype)
    for case in CASES
    for tensor in (False, True)
    for dtype in ("float32", "float64")
    if not (dtype == "float64" and case in ("renorm", "adjustment")) and not (tensor and "ghosts" in case)
]


def run(function: Any, shape: Any, kwargs: dict[str, Any], *, tensor: bool, dtype: str, resource: bool = True) -> Any:
    """Names and values of everything that a program sees of the function, over three training steps and inference."""
    rng = np.random.default_rng(3)
    graph = tf.Graph()
    with graph.as_default(), v1.Session(graph=graph) as session:
        x = v1.placeholder(dtype, [None, *shape[1:]])
        training: Any = v1.placeholder(tf.bool, []) if tensor else True
        with v1.variable_scope("net", use_resource=resource):
            start = {
                "beta_initializer": v1.constant_initializer(0.2),
                "gamma_initializer": v1.constant_initializer(1.5),
                "moving_mean_initializer": v1.constant_initializer(0.3),
                "moving_variance_initializer": v1.constant_initializer(2.0),
            }
            y = function(x, training=training, momentum=0.75, epsilon=0.01, **start, **kwargs)
        named = {variable.name: variable for variable in v1.global_variables()}
        graded = [variable for name, variable in named.items() if "moving" not in name and "renorm" not in name]
        weight = tf.constant(rng.normal(size=shape), dtype)
        gradients = tf.gradients(tf.reduce_sum(y * weight), [x, *graded])
        updates = v1.get_collection(KEYS.UPDATE_OPS)
        seen: list[Any] = [y.name.split("/")[:2], y.shape.as_list(), y.dtype]
        seen += [{name: (variable.shape.as_list(), variable.dtype.base_dtype) for name, variable in named.items()}]
        seen += [[variable.name for variable in v1.trainable_variables()], len(updates)]
        session.run(v1.global_variables_initializer())
        values: list[Any] = []
        for _ in range(3):
            feed: dict[Any, Any] = {x: rng.normal(1, 2, shape)} | ({training: True} if tensor else {})
            values += [session.run([y, *gradients], feed)]  # updates no statistics
            session.run(updates, feed)
            values += [session.run(list(named.values()))]
        for update in updates:  # each moves what it moves in TF 1
            session.run(update, feed)
            values += [session.run(list(named.values()))]
        if tensor:
            feed = {x: rng.normal(1, 2, shape), training: False}
            values += [session.run([y, *gradients, *updates], feed)[: 1 + len(gradients)]]
            values += [session.run(list(named.values()))]
        losses = v1.get_collection(KEYS.REGULARIZATION_LOSSES)
        return seen, [array for step in values for array in step] + session.run(losses)


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize(("case", "tensor", "dtype"), SETTINGS)
def test_equals_tf_keras(theirs: Any, case: str, tensor: bool, dtype: str) -> None:
    shape, kwargs = CASES[case]
    seen, values = run(batch_normalization, shape, kwargs, tensor=tensor, dtype=dtype)
    wanted_seen, wanted = run(theirs, shape, kwargs, tensor=tensor, dtype=dtype)
    assert seen == wanted_seen
    assert len(values) == len(wanted)
    tolerance = 1e-6 if dtype == "float64" else 2e-5  # tf.layers rounds momentum and epsilon to float32
    for actual, right in zip(values, wanted, strict=True):
        np.testing.assert_allclose(actual, right, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("case", ["rank 2", "renorm"])
def test_reference_variables(case: str) -> None:
    """TF 1's reference variables, which assignments change in place. tf_keras's function fails with them here."""
    shape, kwargs = CASES[case]
    ours, wanted = (
        run(batch_normalization, shape, kwargs, tensor=True, dtype="float64", resource=resource)[1]
        for resource in (False, True)
    )
    for actual, right in zip(ours, wanted, strict=True):
        np.testing.assert_array_equal(actual, right)


def scopes(function: Any) -> list[str]:
    with tf.Graph().as_default():
        x = v1.placeholder(tf.float32, [None, 4])
        names = [function(x).name.split("/")[0] for _ in range(2)]
        with v1.variable_scope("outer"):
            names += [function(x, name="bn", reuse=reuse).name.rsplit("/", 2)[0] for reuse in (None, True)]
            names += [function(x, name="auto", reuse=v1.AUTO_REUSE).name.rsplit("/", 2)[0] for _ in range(2)]
        function(x, reuse=True)
        with pytest.raises(ValueError, match="already exists"), v1.variable_scope("outer"):
            function(x, name="bn")
        with pytest.raises(ValueError, match="does not exist"):
            function(x, name="new", reuse=True)
        return [*(variable.name for variable in v1.global_variables()), *names]


def test_scopes(theirs: Any) -> None:
    assert scopes(batch_normalization) == scopes(theirs)


def test_signature(theirs: Any) -> None:
    ours, wanted = (inspect.signature(function).parameters for function in (batch_normalization, theirs))
    assert list(ours) == list(wanted)
    names = [name for name in wanted if not name.endswith("_initializer")]
    assert [ours[name].default for name in names] == [wanted[name].default for name in names]


def test_two_calls_in_one_run_both_update() -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        for value in (1.0, 3.0):
            x = tf.fill([4, 1], value)
            batch_normalization(x, momentum=0.5, training=True, name="bn", reuse=v1.AUTO_REUSE)
        session.run(v1.global_variables_initializer())
        session.run(v1.get_collection(KEYS.UPDATE_OPS))
        mean = session.run(v1.global_variables()[2])[0]
    # both started from 0, or one from the other's result, 0.5 or 1.5; a single update would give 0.5 or 1.5
    assert mean in (2.0, 1.75, 1.25)


@pytest.mark.usefixtures("each_bridge")
def test_control_dependencies_update_the_statistics() -> None:
    x = np.random.default_rng(0).normal(3, 1, (16, 4)).astype("f")
    with tf.Graph().as_default(), v1.Session() as session:
        y = batch_normalization(tf.constant(x), momentum=0.5, training=True)
        with tf.control_dependencies(v1.get_collection(KEYS.UPDATE_OPS)):
            train_op = v1.train.GradientDescentOptimizer(0.1).minimize(tf.reduce_sum(y**2))
        session.run(v1.global_variables_initializer())
        session.run(train_op)
        moved = {variable.name.split("/")[1]: session.run(variable) for variable in v1.global_variables()}
    np.testing.assert_allclose(moved["moving_mean:0"], x.mean(0) / 2, rtol=1e-5)
    np.testing.assert_allclose(moved["moving_variance:0"], 0.5 + x.var(0) / 2, rtol=1e-5)
    assert (moved["gamma:0"] != 1).all()


@pytest.mark.usefixtures("each_bridge")
def test_renorm_clipping_may_be_tensors() -> None:
    x = np.random.default_rng(1).normal(2, 3, (16, 4)).astype("f")
    with tf.Graph().as_default(), v1.Session() as session:
        most = v1.placeholder(tf.float32, [])
        clipping = {"rmin": 1 / most, "rmax": most, "dmax": most - 1}
        y = batch_normalization(tf.constant(x), training=True, renorm=True, renorm_clipping=clipping)
        session.run(v1.global_variables_initializer())
        plain, clipped = session.run(y, {most: 1.0}), session.run(y, {most: 1.5})
    xhat = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3)
    np.testing.assert_allclose(plain, xhat, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(clipped, xhat * 1.5 + 0.5, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("resource", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"virtual_batch_size": 4}, {"renorm": True}], ids=str)
def test_momentum_and_epsilon_may_be_placeholders_and_variables(kwargs: dict[str, Any], resource: bool) -> None:
    x = np.random.default_rng(1).normal(2, 3, (16, 4))

    def run(momentum: Any, epsilon: Any, feeds: list[dict[Any, float]]) -> list[np.ndarray]:
        y = batch_normalization(tf.constant(x), momentum=momentum, epsilon=epsilon, training=True, **kwargs)
        moving = [v for v in v1.global_variables() if "moving" in v.name or "renorm" in v.name]
        updates = v1.get_collection(KEYS.UPDATE_OPS)
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            found = []
            for feed in feeds:
                found.append(session.run([y, *tf.gradients(y**3, v1.trainable_variables()[-2:])], feed))
                session.run(updates, feed)
                found.append(session.run(moving))
        return [array for arrays in found for array in arrays]

    values = [0.9, 0.25]
    with tf.Graph().as_default(), v1.variable_scope("net", use_resource=resource):
        momentum = v1.placeholder(tf.float64, [])
        epsilon = v1.get_variable("small", [], tf.float32, v1.constant_initializer(0.5), trainable=False)
        found = run(momentum, epsilon, [{momentum: value} for value in values])
    with tf.Graph().as_default():
        wanted = run(values[0], 0.5, [{}])
    for actual, right in zip(found[: len(wanted)], wanted, strict=True):
        np.testing.assert_allclose(actual, right, rtol=1e-12, atol=1e-12)
    first, second = found[3], found[len(wanted) + 3]  # moving_mean, after y and two gradients
    np.testing.assert_allclose(second, first * values[1] + first / (1 - values[0]) * (1 - values[1]), rtol=1e-10)
    with tf.Graph().as_default(), v1.Session() as session:
        momentum = v1.placeholder(tf.float32, [])
        batch_normalization(tf.constant(x), momentum=momentum, training=True)
        session.run(v1.global_variables_initializer())
        with pytest.raises(tf.errors.InvalidArgumentError, match="momentum must"):
            session.run(v1.get_collection(KEYS.UPDATE_OPS), {momentum: 1.5})


def test_constraints_names_and_float16() -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        x = tf.constant(np.random.default_rng(2).normal(size=(16, 4)), tf.float16)
        kwargs: dict[str, Any] = {"gamma_constraint": "non_neg", "beta_initializer": "ones", "gamma_regularizer": "l2"}
        y = batch_normalization(x, training=True, **kwargs)
        gamma, beta = v1.trainable_variables()
        session.run(v1.global_variables_initializer())
        value, shift, loss = session.run([y, beta, v1.get_collection(KEYS.REGULARIZATION_LOSSES)[0]])
        assert (value.dtype, gamma.dtype.base_dtype, shift.tolist()) == (np.float16, tf.float32, [1] * 4)
        np.testing.assert_allclose(loss, 0.04, rtol=1e-5)
        descent = v1.train.GradientDescentOptimizer(100.0).minimize(tf.reduce_sum(gamma))
        session.run(descent)
        assert session.run(gamma).tolist() == [0] * 4


@pytest.mark.parametrize(
    ("error", "match", "kwargs"),
    [
        (ValueError, "momentum must be in", {"momentum": 1.5}),
        (ValueError, "epsilon must be finite", {"epsilon": -1.0}),
        (TypeError, "momentum must be a number or a scalar tensor", {"momentum": "much"}),
        (ValueError, r"epsilon must be a number or a scalar tensor. Received: shape \(1,\)", {"epsilon": tf.zeros(1)}),
        (TypeError, "training must be a bool", {"training": "yes"}),
        (TypeError, "center must be True or False", {"center": 3}),
        (TypeError, "fused must be True or False", {"fused": "yes"}),
        (ValueError, "axis must be in", {"axis": 2}),
        (ValueError, "axis must not be 0", {"axis": 0, "virtual_batch_size": 2}),
        (ValueError, "renorm_clipping must have keys", {"renorm": True, "renorm_clipping": {"max": 1.0}}),
        (ValueError, "adjustment must be None", {"adjustment": adjust, "virtual_batch_size": 2}),
    ],
)
def test_errors(error: Any, match: str, kwargs: dict[str, Any]) -> None:
    with tf.Graph().as_default():
        x = tf.ones([4, 3])
        with pytest.raises(error, match=match):
            batch_normalization(x, **kwargs)
        assert not v1.global_variables()
        with pytest.raises(TypeError, match="inputs must be of a float dtype"):
            batch_normalization(tf.constant([[1]]))


def test_a_tensor_of_unknown_rank_or_that_is_no_boolean() -> None:
    with tf.Graph().as_default():
        with pytest.raises(ValueError, match=r"^inputs must have a known rank. Received: a tensor of unknown shape$"):
            batch_normalization(v1.placeholder(tf.float32))
        with pytest.raises(TypeError, match=r"^training must be a bool or a boolean tensor. Received: dtype float32$"):
            batch_normalization(tf.ones([4, 3]), training=tf.constant(1.0))
        assert not v1.global_variables()


def test_initializers_of_none_are_the_scopes() -> None:
    names = ("beta", "gamma", "moving_mean", "moving_variance")
    with tf.Graph().as_default(), v1.Session() as session:
        with v1.variable_scope("net", initializer=v1.constant_initializer(4.0)):
            kwargs = dict.fromkeys(f"{name}_initializer" for name in names)
            y = batch_normalization(tf.constant([[6.0]]), epsilon=0.0, **kwargs)
            with pytest.raises(
                TypeError, match=r"^moving_variance_initializer must be an initializer with renorm=True"
            ):
                batch_normalization(tf.ones([4, 3]), renorm=True, name="renorm", **kwargs)
        session.run(v1.global_variables_initializer())
        assert len(v1.global_variables()) == 4
        assert session.run(y).tolist() == [[(6 - 4) / 2 * 4 + 4]]


def test_eager_execution_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs a graph"):
        batch_normalization(tf.ones([4, 3]))


@pytest.mark.usefixtures("each_bridge")
def test_with_tensorflow_1_behavior() -> None:
    """disable_v2_behavior(): reference variables and TF 1's control flow in the whole process."""
    code = """
import tensorflow as tf, numpy as np
v1 = tf.compat.v1
v1.disable_v2_behavior()
from bnfast.compat.v1 import batch_normalization
x, training = v1.placeholder(tf.float32, [None, 3]), v1.placeholder(tf.bool, [])
y = batch_normalization(x, momentum=0.5, training=training)
with tf.control_dependencies(v1.get_collection(v1.GraphKeys.UPDATE_OPS)):
    step = v1.train.GradientDescentOptimizer(0.1).minimize(tf.reduce_sum(y * y * x))
with v1.Session() as session:
    session.run(v1.global_variables_initializer())
    batch = np.float32([[1, 2, 3], [3, 6, 9]])
    session.run(step, {x: batch, training: False})
    before = session.run(v1.global_variables()[2])
    session.run(step, {x: batch, training: True})
    print(before.tolist(), session.run(v1.global_variables()[2]).tolist())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split("\n")[0] == "[0.0, 0.0, 0.0] [1.0, 2.0, 3.0]", result.stderr[-2000:]


def test_bnfast_alone_imports_no_tensorflow() -> None:
    code = "import sys, bnfast, bnfast.compat; print('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
