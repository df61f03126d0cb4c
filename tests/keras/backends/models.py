"""Whole models with layers of bnfast.keras, on the backend that KERAS_BACKEND names, as scripts have them."""

import subprocess
import sys

import bnfast.keras
import keras
import numpy as np
import pytest
from keras import ops

BACKEND = keras.backend.backend()
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
RNG = np.random.default_rng(2026)
X, Y = RNG.normal(size=(48, 8, 8, 3)).astype("float32"), RNG.integers(0, 3, 48)


def accelerable():
    """Whether `accelerate` finds the kernels worth while here: not on JAX without bnfast's kernels."""
    from bnfast.keras.layers.framework import why_slower

    return why_slower((None, 8, 8, 3), "float32", "auto") is None


def arrays(model):
    return [np.asarray(ops.convert_to_numpy(v), dtype="float32") for v in model.weights]


def make(norm=None, dtype=None):
    norm = norm or bnfast.keras.BatchNormalization
    keras.utils.set_random_seed(3)
    inputs = keras.Input((8, 8, 3))
    # Without biases: their gradient is 0 but for rounding, and Adam makes whole steps of that.
    x = keras.layers.Conv2D(6, 3, use_bias=False, name="conv", dtype=dtype)(inputs)
    x = keras.layers.ReLU(dtype=dtype)(norm(name="bn", dtype=dtype)(x))
    y = norm(name="bn2", dtype=dtype)(
        keras.layers.Conv2D(6, 3, padding="same", use_bias=False, name="conv2", dtype=dtype)(x)
    )
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Add(dtype=dtype)([x, y]))
    return keras.Model(inputs, keras.layers.Dense(3, name="head", dtype="float32")(x), name="net")


def compiled(model, **kwargs):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"], **kwargs)
    return model


def fit(model, epochs=2, **kwargs):
    return model.fit(X, Y, batch_size=16, epochs=epochs, shuffle=False, verbose=0, **kwargs).history["loss"]


def assert_equal_models(one, other, **tolerance):
    for a, b in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_allclose(a, b, **(tolerance or TOLERANCE))


def test_fit_evaluate_predict_as_keras():
    mine, theirs = compiled(make()), compiled(make(keras.layers.BatchNormalization))
    np.testing.assert_allclose(fit(mine), fit(theirs), rtol=1e-4)
    assert [v.path.split("/")[-2:] for v in mine.weights] == [v.path.split("/")[-2:] for v in theirs.weights]
    assert_equal_models(mine, theirs, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(mine.evaluate(X, Y, verbose=0), theirs.evaluate(X, Y, verbose=0), rtol=1e-3)
    theirs.set_weights(mine.get_weights())
    np.testing.assert_allclose(mine.predict(X, verbose=0), theirs.predict(X, verbose=0), **TOLERANCE)


def test_files_both_ways(tmp_path):
    mine, theirs = compiled(make()), make(keras.layers.BatchNormalization)
    fit(mine, 1)
    mine.save(tmp_path / "mine.keras")
    loaded = keras.saving.load_model(tmp_path / "mine.keras")
    assert type(loaded.get_layer("bn")) is bnfast.keras.BatchNormalization
    assert_equal_models(mine, loaded, rtol=0)
    np.testing.assert_allclose(fit(loaded, 1), fit(mine, 1), rtol=1e-6)
    mine.save_weights(tmp_path / "mine.weights.h5")
    theirs.load_weights(tmp_path / "mine.weights.h5")
    assert_equal_models(mine, theirs, rtol=0)
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    other = make()
    other.load_weights(tmp_path / "theirs.weights.h5")
    assert_equal_models(other, theirs, rtol=0)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_other_dtypes(policy):
    if BACKEND == "jax" and policy == "float64":
        pytest.skip("JAX has no float64 unless jax_enable_x64 is set")
    mine, theirs = compiled(make(dtype=policy)), compiled(make(keras.layers.BatchNormalization, policy))
    loss, other = fit(mine), fit(theirs)
    assert np.isfinite(loss).all()
    np.testing.assert_allclose(loss, other, rtol=1e-6 if policy == "float64" else 5e-2)


def test_frozen_layers_stay():
    model = make()
    model.get_layer("bn").trainable = False
    compiled(model)
    before = [np.array(ops.convert_to_numpy(v)) for v in model.get_layer("bn").weights]
    fit(model, 1)
    for old, new in zip(before, model.get_layer("bn").weights, strict=True):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(new))


def test_a_subclassed_model_and_clone_model():
    class Net(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.flatten, self.dense = keras.layers.Flatten(), keras.layers.Dense(8)
            self.bn = bnfast.keras.BatchNormalization(activation="relu")
            self.head = keras.layers.Dense(3)

        def call(self, x, training=None):
            return self.head(self.bn(self.dense(self.flatten(x)), training=training))

    losses = fit(compiled(Net()), 4)
    assert losses[-1] < losses[0]
    mine = compiled(make())
    fit(mine, 1)
    twin = compiled(keras.models.clone_model(mine))
    twin.set_weights(mine.get_weights())
    np.testing.assert_array_equal(twin.predict(X, verbose=0), mine.predict(X, verbose=0))
    assert np.isfinite(fit(twin, 1)).all()


def test_ghosts_in_a_subclassed_model_of_unknown_batch():
    """Keras computes the model's shapes with a batch that virtual_batch_size doesn't divide."""

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn = bnfast.keras.BatchNormalization(virtual_batch_size=8)
            self.head = keras.layers.Dense(3)

        def call(self, x, training=None):
            return self.head(keras.ops.mean(self.bn(x, training=training), (1, 2)))

    assert np.isfinite(fit(compiled(Net()), 1)).all()


def test_masking_in_a_model():
    def sequence(norm):
        keras.utils.set_random_seed(5)
        inputs = keras.Input((6, 4))
        x = norm(name="bn")(keras.layers.Masking()(inputs))
        model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.LSTM(5)(x)))
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    x = RNG.normal(size=(16, 6, 4)).astype("float32")
    x[:, 4:] = 0
    x[::2, 2:] = 0
    models = [sequence(norm) for norm in (bnfast.keras.BatchNormalization, keras.layers.BatchNormalization)]
    for model in models:
        model.fit(x, Y[:16], batch_size=8, epochs=1, shuffle=False, verbose=0)
    assert_equal_models(*models)


def test_accelerate_fold_to_keras_report():
    theirs = compiled(make(keras.layers.BatchNormalization))
    fit(theirs, 1)
    mine = bnfast.keras.accelerate(theirs, verbose=False)
    report = bnfast.keras.report(mine)
    if not accelerable():
        assert [row.state for row in report.rows] == ["keras", "keras"]
        assert all("kernels" in row.reason for row in report.rows)
    else:
        assert [row.state for row in report.rows] == ["bnfast", "bnfast"]
        assert bnfast.keras.uses_bnfast(mine)
        assert {row.bridge for row in report.rows} <= {"op", "torch", "jax"}
        never = "no training call of it has been seen yet"
        unfused = "PyTorch's calls aren't fused: pass the activation to bnfast.keras.BatchNormalization"
        assert {row.reason for row in report.rows} == {unfused if BACKEND == "torch" else never}
    assert not bnfast.keras.uses_bnfast(theirs)
    assert_equal_models(mine, theirs, rtol=0)
    np.testing.assert_allclose(fit(mine), fit(theirs), rtol=1e-4)
    folded = bnfast.keras.fold(mine)
    assert not [layer for layer in folded.layers if isinstance(layer, keras.layers.BatchNormalization)]
    np.testing.assert_allclose(folded.predict(X, verbose=0), mine.predict(X, verbose=0), rtol=1e-3, atol=1e-4)
    if accelerable():
        back = bnfast.keras.to_keras(mine)
        assert type(back.get_layer("bn")) is keras.layers.BatchNormalization
        assert_equal_models(back, mine, rtol=0)
        np.testing.assert_allclose(fit(back), fit(mine), rtol=1e-4)
    bnfast.keras.to_keras(make(), inplace=True)


def test_the_copy_is_independent():
    model = compiled(make())
    fit(model, 1)
    before = [np.array(a) for a in arrays(model)]
    copy = bnfast.keras.to_keras(model)
    assert [np.asarray(ops.convert_to_numpy(v)).tolist() for v in copy.optimizer.variables] == [
        np.asarray(ops.convert_to_numpy(v)).tolist() for v in model.optimizer.variables
    ]
    fit(copy, 1)
    for old, new in zip(before, arrays(model), strict=True):
        np.testing.assert_array_equal(old, new)
    again = bnfast.keras.to_keras(model)
    np.testing.assert_allclose(fit(model, 1), fit(again, 1), rtol=1e-4)
    assert np.isfinite(fit(copy, 1)).all()


@pytest.mark.skipif(BACKEND != "torch", reason="tensors of PyTorch")
def test_tensors_in_attributes():
    import torch

    model = make()
    head = model.get_layer("head")
    plain, leaf = torch.arange(3.0), torch.ones(2, requires_grad=True)
    plain.note = [head]
    frozen, generator = torch.nn.Parameter(torch.ones(2), requires_grad=False), torch.Generator().manual_seed(3)
    vars(model)["held"] = [plain, leaf, frozen, generator, plain]
    copy = bnfast.keras.to_keras(model)
    new = copy.held
    assert [type(item) for item in new] == [type(item) for item in model.held]
    assert [item.requires_grad for item in new[:3]] == [False, True, False]
    assert new[0] is new[4]
    assert new[0].note[0] is copy.get_layer("head")
    for old, item in zip(model.held[:3], new[:3], strict=True):
        assert torch.equal(item, old)
        assert item.data_ptr() != old.data_ptr()
    assert torch.equal(torch.rand(2, generator=new[3]), torch.rand(2, generator=generator))
    vars(model)["held"] = leaf * 2
    with pytest.raises(ValueError, match=r"\.held can't be copied: it is a tensor that autograd has recorded\. Remove"):
        bnfast.keras.to_keras(model)
    weight = next(model.parameters())
    vars(model)["held"] = lambda: weight
    with pytest.raises(ValueError, match=r"it is the function .*<lambda>, which holds .*\(Parameter\)\. Remove"):
        bnfast.keras.to_keras(model)


@pytest.mark.skipif(BACKEND != "jax", reason="arrays of JAX")
def test_arrays_in_attributes():
    import jax

    model = make()
    vars(model)["held"] = jax.numpy.arange(3.0)
    new = bnfast.keras.to_keras(model).held
    model.held.delete()  # as a step that donates it does
    np.testing.assert_array_equal(new, np.arange(3.0))

    def traced(x):
        vars(model)["held"] = x
        return bnfast.keras.to_keras(model)

    words = r"\.held can't be copied: it is an array of a function that JAX is tracing\. Remove the attribute"
    for transform in (jax.jit, jax.grad):
        with pytest.raises(ValueError, match=words):
            transform(traced)(1.0)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow has them")
@pytest.mark.parametrize("name", ["diagnose", "recalibrate", "Recalibration", "Watch"])
def test_what_needs_tensorflow(name):
    words = rf"^bnfast\.keras\.{name} needs the TensorFlow backend of Keras .* Received: {BACKEND}$"
    with pytest.raises(RuntimeError, match=words):
        getattr(bnfast.keras, name)(make(), X)


def test_patch():
    with bnfast.keras.patch():
        assert bnfast.keras.is_patched()
        model = compiled(make(keras.layers.BatchNormalization))
        assert bnfast.keras.uses_bnfast(model) == accelerable()
        fit(model, 1)
    assert not bnfast.keras.is_patched()
    theirs = compiled(make(keras.layers.BatchNormalization))
    fit(theirs, 1)
    assert_equal_models(model, theirs, rtol=2e-3, atol=2e-4)


def test_stateless_call():
    """As JAX's training loops call a model; PyTorch's and TensorFlow's models have it, too."""
    model = make()
    trainable = [v.value for v in model.trainable_variables]
    others = [v.value for v in model.non_trainable_variables]
    before = [np.array(ops.convert_to_numpy(v)) for v in model.non_trainable_variables]
    y, new = model.stateless_call(trainable, others, X[:16], training=True)
    for old, variable in zip(before, model.non_trainable_variables, strict=True):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(variable))
    z = model(X[:16], training=True)
    np.testing.assert_allclose(ops.convert_to_numpy(y), ops.convert_to_numpy(z), **TOLERANCE)
    for old, updated, variable in zip(before, new, model.non_trainable_variables, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(updated), ops.convert_to_numpy(variable), **TOLERANCE)
        assert not np.array_equal(old, ops.convert_to_numpy(variable))


@pytest.mark.skipif(BACKEND != "jax", reason="this is JAX's own way")
def test_a_training_loop_of_jax():
    import jax

    model = make()

    def loss(trainable, others, x, y):
        logits, others = model.stateless_call(trainable, others, x, training=True)
        return ops.mean(keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)), others

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    trainable = [v.value for v in model.trainable_variables]
    others = [v.value for v in model.non_trainable_variables]
    losses = []
    for _ in range(5):
        (value, others), gradients = step(trainable, others, X, Y)
        trainable = [v - 0.1 * g for v, g in zip(trainable, gradients, strict=True)]
        losses.append(float(value))
    assert losses[-1] < losses[0]


@pytest.mark.skipif(BACKEND != "torch", reason="this is PyTorch's own way")
def test_a_training_loop_of_pytorch():
    import torch

    model = make()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y)), 16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(model(x, training=True), y)
            value.backward()
            optimizer.step()
            losses.append(value.item())
    assert losses[-1] < losses[0]
    history = compiled(make()).fit(loader, epochs=2, verbose=0).history["loss"]
    assert history[-1] < history[0]


def test_imports():
    """No backend imports what is bnfast's for another one."""
    others = {"tensorflow", "torch", "jax"} - {BACKEND}
    code = "import sys, bnfast.keras; print(*(name for name in sys.modules if name.startswith('bnfast.')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    found = [name for name in loaded if name.split(".")[1] in others]
    assert set(found) <= {"bnfast.tensorflow", "bnfast.tensorflow.op_library"}
