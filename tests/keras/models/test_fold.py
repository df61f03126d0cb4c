"""fold: every kind of layer before and after a batch norm, norms that are kept, and whole models."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import bnfast.keras
import families
import keras
from bnfast.keras import BatchNormalization, BatchNormalizationAdd, fold
from fold_cases import AFTER, SHAPES, Keras, chain, check_fold, fresh_names, norms, randomize
from keras import layers

__all__ = ["fresh_names"]

BEFORE: dict[str, tuple[int, Callable[[], Any]]] = {
    "Dense": (0, lambda: layers.Dense(4)),
    "Dense on sequences": (1, lambda: layers.Dense(4, use_bias=False)),
    "causal Conv1D": (1, lambda: layers.Conv1D(4, 3, padding="causal", dilation_rate=2)),
    "Conv2D": (2, lambda: layers.Conv2D(4, 3, padding="same", strides=2, use_bias=False)),
    "grouped Conv2D": (2, lambda: layers.Conv2D(4, 3, groups=2)),
    "Conv3D": (3, lambda: layers.Conv3D(4, 2)),
    "DepthwiseConv1D": (1, lambda: layers.DepthwiseConv1D(3, depth_multiplier=2, use_bias=False)),
    "DepthwiseConv2D": (2, lambda: layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2)),
    "SeparableConv1D": (1, lambda: layers.SeparableConv1D(4, 3, depth_multiplier=2)),
    "SeparableConv2D": (2, lambda: layers.SeparableConv2D(4, 3, padding="same", use_bias=False)),
    "Conv1DTranspose": (1, lambda: layers.Conv1DTranspose(4, 3, strides=2)),
    "Conv2DTranspose": (2, lambda: layers.Conv2DTranspose(4, 3, strides=2, padding="same", use_bias=False)),
    "Conv3DTranspose": (3, lambda: layers.Conv3DTranspose(4, 2)),
}


@pytest.mark.parametrize("name", BEFORE)
def test_into_the_layer_before(name: str) -> None:
    rank, make = BEFORE[name]
    folded = check_fold(chain(SHAPES[rank], make(), Keras(), layers.ReLU()))
    assert [type(layer) for layer in folded.layers[1:]] == [type(make()), layers.ReLU]
    assert folded.layers[1].use_bias


@pytest.mark.parametrize("name", AFTER)
def test_into_the_layer_after(name: str) -> None:
    rank, make = AFTER[name]
    folded = check_fold(chain(SHAPES[rank], layers.ReLU(), Keras(), make()))
    assert [type(layer) for layer in folded.layers[1:]] == [layers.ReLU, type(make())]


def test_several_norms_around_one_layer() -> None:
    folded = check_fold(chain((6,), Keras(), layers.Dense(5), Keras(scale=False), Keras(center=False), layers.ReLU()))
    assert [type(layer) for layer in folded.layers[1:]] == [layers.Dense, layers.ReLU]


@pytest.mark.usefixtures("channels_first_convolutions")
def test_channels_first() -> None:
    first = {"data_format": "channels_first"}
    check_fold(chain((6, 9, 9), layers.Conv2D(4, 3, **first), Keras(axis=1), layers.ReLU()))
    check_fold(chain((6, 9, 9), layers.ReLU(), Keras(axis=-3), layers.Conv2D(4, 3, **first)))
    check_fold(chain((6, 9, 9), layers.Conv2D(4, 3, **first), Keras(name="bn")), ["bn"])


def test_another_axis_than_the_convolutions() -> None:
    check_fold(chain((9, 9, 6), layers.Conv2D(4, 3), Keras(axis=1, name="bn")), ["bn"])


KEPT: dict[str, tuple[Any, ...]] = {
    "an activation between": (layers.Conv2D, {"activation": "relu"}, {}),
    "a padded convolution after it": (None, {"padding": "same"}, {}),
    "another dtype": (layers.Conv2D, {"dtype": "float64"}, {}),
    "an activity regularizer before": (layers.Conv2D, {"activity_regularizer": "l2"}, {}),
    "an activity regularizer of the norm": (layers.Conv2D, {}, {"activity_regularizer": "l2"}),
}


@pytest.mark.parametrize("why", KEPT)
def test_inexact_folds_are_kept(why: str) -> None:
    before, kwargs, own = KEPT[why]
    norm = Keras(name="bn", **own)
    if before is None:
        check_fold(chain(SHAPES[2], norm, layers.Conv2D(4, 3, **kwargs)), ["bn"])
    else:
        check_fold(chain(SHAPES[2], before(4, 3, **kwargs), norm, layers.ReLU()), ["bn"])


def huge() -> Any:
    model = chain((6,), layers.Dense(4, name="dense"), Keras(name="bn"))
    model.get_layer("bn").gamma.assign([3e38] * 4)
    model.get_layer("dense").kernel.assign(np.full((6, 4), 100.0))
    return model


def constant() -> Any:
    model = chain((6,), Keras(name="bn"), layers.ReLU(), layers.Dense(3))
    model.get_layer("bn").gamma.assign([0.0] * 6)
    return model


def masked() -> Any:
    x, mask = layers.Input((4, 6)), layers.Input((4,), dtype="bool")
    return keras.Model([x, mask], BatchNormalization(activation="relu", name="bn")(layers.Dense(6)(x), mask=mask))


def summed(activation: Any) -> Any:
    x = layers.Input((8, 8, 4))
    y = layers.Conv2D(4, 3, padding="same")(x)
    return keras.Model(x, BatchNormalizationAdd(activation=activation, name="bn")([y, x]))


REASONS: dict[str, Callable[[], Any]] = {
    "the weights of dense would not be finite": huge,
    "its activation can't take the arguments of the call": masked,
    "it always normalizes with the batch's statistics": lambda: chain(
        (6,), layers.Dense(4), BatchNormalization(use_batch_statistics=True, name="bn")
    ),
    "TensorFlow has no kernel for a convolution with a bias, a sum and mish": lambda: summed("mish"),
    "it has an activity regularizer": lambda: chain((6,), layers.Dense(4), Keras(name="bn", activity_regularizer="l2")),
    "conv pads its inputs": lambda: chain(
        SHAPES[2], Keras(name="bn"), layers.Conv2D(4, 3, padding="same", name="conv")
    ),
    "conv computes in another dtype": lambda: chain(
        SHAPES[2], layers.Conv2D(4, 3, dtype="float64", name="conv"), Keras(name="bn")
    ),
    "all its channels are constant": constant,
}


def test_why_norms_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    for reason, make in REASONS.items():
        folded = fold(make(), verbose=2)
        assert norms(folded) == ["bn"], reason
        line = capsys.readouterr().out.splitlines()[1]
        assert reason in line.removeprefix("bn: stays, because ").split("; "), line
    folded = check_fold(randomize(summed("relu")))
    assert [type(layer) for layer in folded.layers[1:]] == [layers.Conv2D, layers.Add, layers.Activation]


def test_norms_of_shared_layers_and_outputs_are_kept() -> None:
    x = inputs = layers.Input(SHAPES[2])
    twice = layers.Conv2D(6, 3, padding="same", name="twice")(x)  # two consumers
    y = layers.Add()([twice, Keras(name="bn_1")(twice)])
    shared = layers.Conv2D(6, 3, padding="same", name="shared")
    y = shared(layers.ReLU()(Keras(name="bn_2")(shared(y))))
    both = Keras(name="both")
    y = both(layers.Conv2D(6, 1)(both(layers.Conv2D(6, 1)(y))))
    out = layers.Conv2D(4, 3, name="out")(y)  # also an output of the model
    model = randomize(keras.Model(inputs, [out, Keras(name="bn_3")(out)]))
    check_fold(model, ["bn_1", "bn_2", "both", "bn_3"])


def test_a_subclass_and_a_batch_norm_in_training_mode_are_kept() -> None:
    class Mine(Keras):
        pass

    class MyConv(layers.Conv2D):
        pass

    x = inputs = layers.Input((6,))
    y = Mine(name="mine")(layers.Dense(4)(x))
    nested = keras.Sequential([layers.Input((4,)), layers.Dense(4), Keras(name="inner")], name="nested")
    y = nested(layers.Dense(4)(y), training=True)
    y = Keras(name="batch")(layers.Dense(4)(y), training=True)
    y = Keras(name="gone")(layers.Dense(4)(y), training=False)
    model = randomize(keras.Model(inputs, y))
    with keras.saving.custom_object_scope({"Mine": Mine}):
        check_fold(model, ["mine", "inner", "batch"])
    check_fold(chain(SHAPES[2], MyConv(4, 3), Keras(name="bn"), layers.ReLU()), ["bn"])


def test_nested_and_sequential_models() -> None:
    inner = keras.Sequential([layers.Input((8, 8, 3)), layers.Conv2D(4, 3), Keras(), layers.ReLU()], name="inner")
    inputs = layers.Input((8, 8, 3))
    head = keras.Sequential([layers.Flatten(), Keras(), layers.Dense(3)], name="head")
    # inner is called twice, but always as a whole, so its layers can be folded
    y = layers.Subtract()([inner(inputs), inner(layers.ReLU()(inputs))])
    folded = check_fold(randomize(keras.Model({"image": inputs}, {"logits": head(y)})))
    assert [layer.name for layer in folded.layers if isinstance(layer, keras.Sequential)] == ["inner", "head"]
    sequential = randomize(keras.Sequential([layers.Input((3,)), layers.Dense(4), Keras()]))
    assert isinstance(check_fold(sequential), keras.Sequential)


@pytest.mark.parametrize("activation", ["relu", layers.LeakyReLU(0.3), layers.PReLU(), keras.activations.gelu])
def test_folding_our_layer_keeps_its_activation(activation: Any) -> None:
    folded = check_fold(
        chain(SHAPES[2], layers.Conv2D(4, 3), BatchNormalization(activation=activation, name="act"), layers.Flatten())
    )
    wanted = type(activation) if isinstance(activation, keras.Layer) else layers.Activation
    assert type(folded.get_layer("act")) is wanted
    folded = check_fold(chain((6,), layers.Dense(4), BatchNormalization(), BatchNormalization(activation="relu6")))
    assert [type(layer) for layer in folded.layers[1:]] == [layers.Dense, layers.Activation]


@pytest.mark.parametrize("activation", [None, "relu"])
def test_folding_our_residual_layer_keeps_the_sum(activation: Any) -> None:
    inputs = layers.Input((8, 8, 4))
    y = layers.Conv2D(4, 3, padding="same")(inputs)
    y = BatchNormalizationAdd(activation=activation, name="end")([y, inputs])
    folded = check_fold(randomize(keras.Model(inputs, layers.Flatten()(y))))
    assert type(folded.get_layer("end")) is (layers.Activation if activation else layers.Add)


def test_after_accelerate() -> None:
    def block(x: Any) -> Any:
        y = layers.ReLU()(Keras()(layers.Conv2D(4, 3, padding="same")(x)))
        return layers.ReLU()(layers.Add()([Keras()(layers.Conv2D(4, 3, padding="same")(y)), x]))

    model = chain((8, 8, 4), block, block, layers.Flatten())
    folded = check_fold(bnfast.keras.accelerate(model, verbose=False))
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype("float32")
    wanted = model(x).numpy()
    np.testing.assert_allclose(folded(x), wanted, rtol=0, atol=1e-5 * wanted.max())


def test_folded_weights_are_computed_in_float64() -> None:
    def model(dtype: str) -> Any:
        return chain((6,), layers.Dense(4, dtype=dtype), Keras(dtype=dtype, epsilon=1e-5), dtype=dtype)

    exact, single = model("float64"), model("float32")
    exact.set_weights([w.astype("float64") for w in single.get_weights()])
    kernel, bias = fold(exact).get_weights()
    for wanted, got in zip((kernel, bias), fold(single).get_weights(), strict=True):
        assert (wanted.dtype, got.dtype) == (np.float64, np.float32)
        np.testing.assert_array_equal(got, wanted.astype("float32"))
    x = np.random.default_rng(0).normal(size=(5, 6))
    np.testing.assert_allclose(x @ kernel + bias, exact(x, training=False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_half_precision(policy: str) -> None:
    folded = check_fold(chain(SHAPES[2], layers.Conv2D(4, 3, dtype=policy), Keras(dtype=policy), layers.ReLU()))
    assert folded.layers[1].dtype_policy.name == policy


def test_folds_with_nonfinite_kernels_are_kept() -> None:
    model = chain((6,), layers.Dense(4), Keras(name="bn", epsilon=0.0))
    model.get_layer("bn").moving_variance.assign([0.0, 1.0, 1.0, 1.0])
    assert norms(fold(model)) == ["bn"]
    model.get_layer("bn").moving_variance.assign([1e-45, 1.0, 1.0, np.nan])
    assert norms(fold(model)) == ["bn"]


def test_regularizers_are_removed_and_trainable_flags_kept() -> None:
    dense = layers.Dense(4, kernel_regularizer="l2", bias_constraint="non_neg", activity_regularizer=None)
    model = chain((6,), dense, Keras(gamma_regularizer="l2"), layers.Dense(2, kernel_regularizer="l2", name="head"))
    dense.trainable = False
    folded = check_fold(model)
    assert len(model.losses) == 2  # the frozen layer has no loss
    assert len(folded.losses) == 1
    assert (folded.layers[1].trainable, folded.get_layer("head").trainable) == (False, True)


LOAD = """
import sys
sys.modules["bnfast"] = None  # any import of it fails
import keras, numpy as np
model = keras.models.load_model(sys.argv[1] + "/model.keras")
np.save(sys.argv[1] + "/y.npy", model.predict(np.load(sys.argv[1] + "/x.npy"), verbose=0))
"""


def test_the_folded_model_loads_without_bnfast(tmp_path: Path) -> None:
    folded = check_fold(chain(SHAPES[2], layers.Conv2D(4, 3), BatchNormalization(activation="relu"), layers.Flatten()))
    assert all(type(layer).__module__.startswith("keras.") for layer in folded.layers)
    x = np.random.default_rng(0).normal(size=(3, *SHAPES[2])).astype("float32")
    folded.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", x)
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True, capture_output=True, timeout=300)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), folded(x), rtol=1e-6, atol=1e-6)


def test_check_reports_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain((6,), layers.Dense(4), Keras())
    right = bnfast.keras.models.foldable.FoldableLayer.after  # type: ignore[attr-defined]
    monkeypatch.setattr(
        bnfast.keras.models.foldable.FoldableLayer,
        "after",
        lambda self, affine: right(self, affine._replace(b=affine.b + 1e-2)),
    )
    fold(model)
    with pytest.raises(ValueError, match=r"check: output 0 of the folded model must be within .* Received: .* 0\.01"):
        fold(model, check=True)


def test_check_generates_inputs_of_every_dtype() -> None:
    tokens, image, weights = layers.Input((None,), dtype="int32"), layers.Input((None, None, 3)), layers.Input((2,))
    y = layers.GlobalAveragePooling1D()(layers.Embedding(5, 4)(tokens))
    z = layers.GlobalAveragePooling2D()(Keras()(layers.Conv2D(4, 3)(image)))
    check_fold(randomize(keras.Model([tokens, [image, weights]], [y, layers.Concatenate()([z, weights])])))


def test_check_cannot_make_text() -> None:
    text = layers.Input((1,), dtype="string", name="text")
    y = layers.StringLookup(vocabulary=["a", "b"], output_mode="one_hot")(text)
    model = randomize(keras.Model(text, Keras(name="bn")(layers.Dense(3)(y))))
    assert norms(fold(model)) == []
    with pytest.raises(ValueError, match=r"^check can make only numbers\. Received: an input of strings, text$"):
        fold(model, check=True)


def test_errors() -> None:
    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__(name="own")
            self.norm = Keras()

        def call(self, x: Any) -> Any:
            return self.norm(x)

    own = Own()
    own(np.ones((2, 3)))
    for thing in (None, "model.keras", layers.Dense(3)):
        with pytest.raises(TypeError, match=r"model must be a Keras model\. Received: "):
            fold(thing)
    for model in (keras.Sequential([Keras()], name="new"), Own()):
        with pytest.raises(ValueError, match=r"model must be built: .* Received: (new|own), not built"):
            fold(model)
    with pytest.raises(ValueError, match=r"model must be Functional or Sequential: .* Received: own, a Own"):
        fold(own)
    with pytest.raises(ValueError, match=r"model has no batch norm to fold\. Received: chain"):
        fold(chain((3,), layers.Dense(2)))


def test_fold_says_how_many_and_why_others_stay(capsys: pytest.CaptureFixture[str]) -> None:
    x = keras.Input((6, 6, 3))
    y = layers.Conv2D(4, 3)(x)
    for i in range(5):
        y = layers.MaxPooling2D(1)(layers.BatchNormalization(name=f"stays{i}")(layers.MaxPooling2D(1)(y)))
    model = keras.Model(x, layers.BatchNormalization(name="goes")(layers.Conv2D(4, 3, padding="same")(y)), name="net")
    folded = fold(bnfast.keras.accelerate(model, verbose=0))
    title, reason, last = capsys.readouterr().out.splitlines()
    assert title == "net: 1 of 6 batch norms folded"
    assert reason == (
        "5 stay, because a MaxPooling2D is no Dense or convolution layer, or a subclass, quantized, or has LoRA; "
        "no ReLU or ReLU6 follows it: stays0, stays1, stays2 and 2 more"
    )
    assert last == "The model that fold returned is for inference. The given model is unchanged."
    assert {type(layer).__module__.split(".")[0] for layer in folded.layers} == {"keras"}
    assert [type(folded.get_layer(name)) for name in norms(folded)] == [Keras] * 5
    fold(model, verbose=2)
    assert "goes: folded into" in capsys.readouterr().out
    fold(model, verbose=0)
    assert capsys.readouterr().out == ""


def marked(name: str) -> Any:
    return (
        name if name in families.EVERY_RUN else pytest.param(name, marks=(pytest.mark.families, pytest.mark.sample(5)))
    )


LEFT = {"DenseNet121": 1, "MobileNet": 0, "MobileNetV2": 0, "ResNet50": 0, "EfficientNetB0": 0, "Xception": 0}


@pytest.mark.parametrize("name", [marked(name) for name in families.FAMILIES])
def test_families_of_keras_applications(name: str) -> None:
    model = randomize(families.build(name), kernels=None)
    folded = fold(model, check=True)
    assert len(norms(folded)) == LEFT.get(name, len(norms(folded)))
    assert len(norms(folded)) < len(norms(model))
    assert folded.output_shape == model.output_shape
