"""Layer, group and instance normalization layers against Keras's, on TensorFlow's ops and on the kernels."""

from collections.abc import Iterator
from typing import Any

import bnfast
import numpy as np
import pytest

pytest.importorskip("tensorflow")
import tensorflow as tf
from bnfast.keras import GroupNormalization, InstanceNormalization, LayerNormalization
from bnfast.tensorflow import group_norm
from keras import layers as L
from norms_cases import CASES, NAMES, ONE_EACH, assert_close, force_implementation, gradients, pair, record_kernel_calls


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return record_kernel_calls(monkeypatch)


@pytest.fixture(params=["ops", "kernels"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from force_implementation(request.param, monkeypatch)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_norm, "SMALL_BYTES", 0)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(("kind", "shape", "kwargs"), CASES, ids=NAMES)
def test_results_and_gradients_equal_keras(
    kind: Any, shape: Any, kwargs: Any, graph: bool, dtype: str, implementation: str, rng: np.random.Generator
) -> None:
    ours, keras_layer = pair(kind, shape, kwargs, dtype=dtype)
    x, dy = (tf.constant(rng.normal(1, 2, shape), dtype) for _ in range(2))
    run = tf.function(gradients) if graph else gradients
    assert_close(run(ours, x, dy), gradients(keras_layer, x, dy), {"float64": 1e-11, "float32": 1e-5}[dtype])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("kind", "shape", "kwargs"), ONE_EACH, ids=["layer", "group", "instance"])
def test_dtypes_equal_keras(
    kind: Any, shape: Any, kwargs: Any, dtype: str, policy: str, implementation: str, rng: np.random.Generator
) -> None:
    """These layers do not cast their inputs. They compute in float32 or float64 and cast the outputs."""
    ours, keras_layer = pair(kind, shape, kwargs, dtype=policy)
    x, dy = (tf.constant(rng.normal(1, 2, shape), dtype) for _ in range(2))
    actual, wanted = gradients(ours, x, dy), gradients(keras_layer, x, dy)
    half = {"bfloat16"} & {dtype, policy.removeprefix("mixed_")}, {"float16"} & {dtype, policy.removeprefix("mixed_")}
    assert_close(actual, wanted, 2e-2 if half[0] else 2e-3 if half[1] else 1e-5)


@pytest.mark.parametrize(("kind", "shape", "kwargs"), ONE_EACH, ids=["layer", "group", "instance"])
def test_integers_are_left_to_keras(kind: Any, shape: Any, kwargs: Any, kernels: None, rng: Any) -> None:
    ours, keras_layer = pair(kind, shape, kwargs)
    x = tf.constant(rng.integers(-9, 9, shape))
    y = ours(x, training=True)
    assert y.dtype == tf.float32
    np.testing.assert_array_equal(y, keras_layer(x))


def test_rms_scaling_is_left_to_keras(kernels: None, rng: Any) -> None:
    with pytest.warns(UserWarning, match="rms_scaling"):
        ours, keras_layer = pair(LayerNormalization, (3, 4), {"rms_scaling": True})
    x = tf.constant(rng.normal(1, 2, (3, 4)), tf.float32)
    with pytest.warns(UserWarning, match="rms_scaling"):
        np.testing.assert_array_equal(ours(x, training=True), keras_layer(x))
    assert ours.get_config()["rms_scaling"] is True


LARGE = (64, 8, 8, 64)  # 1 MiB of float32


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    ("kind", "name", "least"), [(LayerNormalization, "layer_norm", 64), (InstanceNormalization, "group_norm", 16)]
)
def test_choice_of_implementation(kind: Any, name: str, least: int, graph: bool, calls: list[str]) -> None:
    layer = kind()
    run = tf.function(gradients) if graph else gradients

    def ran(shape: Any, training: Any) -> list[str]:
        calls.clear()
        x = tf.ones(shape)
        run(layer, x, x, training)
        return sorted(calls)

    enough = (least, *LARGE[1:])
    assert ran(enough, True) == ran(enough, tf.constant(True)) == [name, name + "_grad"]
    assert ran((least - 1, *LARGE[1:]), True) == ran(enough, False) == ran(enough, None) == []
    assert not layer.supports_jit


@pytest.mark.parametrize("kind", [LayerNormalization, InstanceNormalization])
def test_graph_outputs_are_allocated_by_tensorflow(kind: Any, calls: list[str]) -> None:
    layer, x = kind(), tf.random.normal(LARGE, seed=3)
    layer.build(LARGE)
    before = bnfast.memory_statistics()["in_use_bytes"]
    y, dx, *_ = tf.function(gradients)(layer, x, x)
    assert bnfast.memory_statistics()["in_use_bytes"] - before < x.dtype.size * tf.size(x) / 4
    assert len(calls) == 2
    assert y.shape == dx.shape == x.shape


@pytest.mark.parametrize(("rest", "large"), [((16, 16, 8), True), ((8, 8, 8), False), ((None, 16, 8), True)], ids=str)
def test_a_batch_of_unknown_size_counts_as_32(rest: Any, large: bool, calls: list[str]) -> None:
    """32 samples are assumed to choose the implementation; results equal Keras's for any batch, also an empty one."""
    ours, keras_layer = pair(GroupNormalization, (None, *rest), {"groups": 4})
    x = tf.random.normal((3, 16 if rest[0] is None else rest[0], *rest[1:]), seed=1)
    run = tf.function(
        lambda x, dy: gradients(ours, x, dy), input_signature=[tf.TensorSpec((None, *rest))] * 2, autograph=False
    )
    assert_close(run(x, x), gradients(keras_layer, x, x), 1e-5)
    assert bool(calls) == large
    assert_close(run(x[:0], x[:0]), gradients(keras_layer, x[:0], x[:0]), 0)
    assert run.get_concrete_function().structured_outputs[0].shape.as_list() == [None, *rest]


def test_training_as_a_tensor(calls: list[str]) -> None:
    layer, x = LayerNormalization(), tf.random.normal(LARGE, seed=2)
    run = tf.function(lambda x, training: layer(x, training=training), autograph=False)
    np.testing.assert_array_equal(run(x, tf.constant(True)), run(x, tf.constant(False)))
    assert calls == ["layer_norm"] * 2


@pytest.mark.parametrize(("kind", "shape", "kwargs"), ONE_EACH, ids=["layer", "group", "instance"])
def test_second_order(kind: Any, shape: Any, kwargs: Any, implementation: str, rng: np.random.Generator) -> None:
    """Against plain reductions: Keras's second derivatives lack a term, because tf.nn.moments stops a gradient."""
    ours, _ = pair(kind, shape, kwargs, dtype="float64")
    x, dy, v = (tf.constant(rng.normal(1, 2, shape)) for _ in range(3))

    def plain(x: Any, gamma: Any = 1.0, beta: Any = 0.0) -> Any:
        if kind is LayerNormalization:
            wide, over, extents = x, [1, 3], [1, 4, 1, 6]
        elif kind is GroupNormalization:
            wide, over, extents = tf.reshape(x, [3, 4, 5, 2, 3]), [1, 2, 4], [1, 1, 1, 2, 3]
        else:
            wide, over, extents = x, [2, 3], [1, 6, 1, 1]
        gamma, beta = (tf.reshape(w, extents) if tf.is_tensor(w) else w for w in (gamma, beta))
        centered = wide - tf.reduce_mean(wide, over, keepdims=True)
        variance = tf.reduce_mean(centered * centered, over, keepdims=True)
        return tf.reshape(gamma * centered * (variance + ours.epsilon) ** -0.5 + beta, x.shape)

    def twice(function: Any, weights: list[Any]) -> Any:
        sources = [x, dy, *weights]
        with tf.GradientTape() as outer:
            outer.watch(sources)
            with tf.GradientTape() as inner:
                inner.watch(sources)
                y = function(x)
            first = inner.gradient(y, [x, *weights], output_gradients=dy)
            loss = tf.reduce_sum(first[0] * v) + sum(tf.reduce_sum(tf.sin(g)) for g in first[1:])
        return [*first, *outer.gradient(loss, sources, unconnected_gradients="zero")]

    values = [weight.value for weight in ours.weights]
    names = [weight.name for weight in ours.weights]
    wanted = twice(lambda x: plain(x, **dict(zip(names, values, strict=True))), values)
    assert_close(twice(lambda x: ours(x, training=True), values), wanted, 1e-10)
    assert_close(tf.function(lambda: twice(lambda x: ours(x, training=True), values))(), wanted, 1e-10)


@pytest.mark.parametrize("kind", [LayerNormalization, InstanceNormalization])
def test_masks_are_propagated(kind: Any, implementation: str) -> None:
    x = np.ones((2, 4, 3), np.float32)
    x[:, 2:] = 0
    masked = L.Masking()(x)
    y = kind()(masked, training=True)
    np.testing.assert_array_equal(y._keras_mask, masked._keras_mask)


def test_frozen_layers_propagate_gradients(implementation: str, rng: Any) -> None:
    ours, keras_layer = pair(GroupNormalization, (3, 4, 6), {"groups": 2}, dtype="float64")
    ours.trainable = False
    assert ours.trainable_weights == []
    x, dy = (tf.constant(rng.normal(1, 2, (3, 4, 6))) for _ in range(2))
    assert_close(gradients(ours, x, dy), gradients(keras_layer, x, dy), 1e-11)


def test_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next op reads the memory that the kernel wrote, in graph and in eager mode."""
    seen: list[tuple[int, int]] = []
    function = bnfast.functional.layer_norm

    def pointer(array: Any) -> int:
        return int(array.__array_interface__["data"][0])

    def layer_norm(x: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(x, *args, **kwargs)
        seen.append((pointer(x), pointer(result.y)))
        return result

    monkeypatch.setattr(bnfast.functional, "layer_norm", layer_norm)
    layer, x = LayerNormalization(), tf.random.normal((16, 64, 64, 64), seed=1)
    layer.build(x.shape)

    def run(x: Any) -> Any:
        y = layer(x, training=True)
        if tf.executing_eagerly():
            return np.int64([pointer(np.asarray(memoryview(t))) for t in (x, y)])
        return tf.numpy_function(lambda x, y: np.int64([pointer(x), pointer(y)]), [x, y], tf.int64)

    for call in (run, tf.function(run, autograph=False)):
        assert tuple(np.asarray(call(x))) == seen[-1]


def test_errors() -> None:
    for kind in (LayerNormalization, GroupNormalization, InstanceNormalization):
        with pytest.raises(ValueError, match=r"epsilon must be finite and >= 0. Received: -1"):
            kind(epsilon=-1)
    with pytest.raises(TypeError, match=r"accepts no groups: it always has C\. Received: 4"):
        InstanceNormalization(groups=4)
    with pytest.raises(ValueError, match="groups"):
        GroupNormalization(0)
    with pytest.raises(ValueError, match="cannot be more than the number of channels"):
        GroupNormalization(8).build((2, 4))
    with pytest.raises(TypeError, match="'axis'"):
        LayerNormalization(axis="1")
    with pytest.raises(ValueError, match="defined dimension"):
        InstanceNormalization().build((2, 4, None))
