"""patch and unpatch: code that uses Keras's BatchNormalization gets our layer, and unpatch restores everything."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import bnfast.keras
import keras
import tensorflow as tf
from bnfast.keras import is_patched, patch, unpatch, uses_bnfast
from bnfast.keras.models.patch import KERAS, made, summary
from keras.src import api_export

OURS = sys.modules["bnfast.keras.models.patch"]  # unpatch would restore a global of this file


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    made.clear()
    yield
    unpatch()
    made.clear()


def places(wanted: Any) -> set[str]:
    """module.attribute of every reference to `wanted` in sys.modules, without this file and bnfast."""
    return {
        f"{name}.{attribute}"
        for name, module in list(sys.modules.items())
        if module is not None and name != __name__ and not name.startswith("bnfast.")
        for attribute, value in list(getattr(module, "__dict__", {}).items())
        if value is wanted
    }


KWARGS = [{}] if "renorm" not in KERAS().get_config() else [{}, {"renorm": True, "renorm_clipping": {"rmax": 1.5}}]


def small_model(**kwargs: Any) -> Any:
    layers = keras.layers
    inputs = layers.Input((8, 8, 3), name="image")
    y = layers.Conv2D(4, 3, use_bias=False, name="conv")(inputs)
    y = layers.BatchNormalization(gamma_regularizer="l2", name="norm", **kwargs)(y)
    y = layers.LeakyReLU(name="leaky")(y)
    y = layers.Dense(2, name="head")(layers.Flatten(name="flat")(y))
    return keras.Model(inputs, layers.BatchNormalization(axis=1, scale=False, name="last")(y), name="small")


def trained(model: Any, rng: np.random.Generator) -> Any:
    model.compile("adam", keras.losses.MeanSquaredError())  # Keras 3.15 fails on .h5 files with "mse"
    model.fit(rng.normal(size=(64, 8, 8, 3)), rng.normal(size=(64, 2)), batch_size=16, verbose=0)
    return model


def test_every_name_is_replaced_and_restored() -> None:
    before, registry = places(KERAS), dict(api_export.REGISTERED_NAMES_TO_OBJS)
    assert {"keras.layers.BatchNormalization", "keras.src.layers.BatchNormalization"} <= before
    patch()
    assert {place for place in before if place.startswith("keras.")} <= places(OURS.PatchedBatchNormalization)
    assert {place for place in places(KERAS) if place.startswith(("keras.", "tensorflow."))} == set()
    unpatch()
    assert places(KERAS) == before
    assert places(OURS.PatchedBatchNormalization) == set()
    assert registry == api_export.REGISTERED_NAMES_TO_OBJS


def test_every_public_name_gives_our_layer() -> None:
    patch()
    from keras.layers import BatchNormalization as from_keras
    from tensorflow.keras.layers import BatchNormalization as from_tensorflow

    config = {"module": "keras.layers", "class_name": "BatchNormalization", "config": {}, "registered_name": None}
    assert from_keras is from_tensorflow is tf.keras.layers.BatchNormalization is keras.layers.BatchNormalization
    assert uses_bnfast(from_keras)
    assert uses_bnfast(keras.layers.deserialize(config))
    assert uses_bnfast(keras.saving.deserialize_keras_object(config))
    assert uses_bnfast(keras.applications.MobileNet(weights=None, input_shape=(32, 32, 3), classes=2))


def test_names_imported_under_the_patch_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    script, lazy = ModuleType("script"), ModuleType("keras.lazy")
    lazy.norm = KERAS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "script", script)
    monkeypatch.setitem(sys.modules, "keras.lazy", lazy)
    exec("from keras.layers import BatchNormalization as Before", script.__dict__)
    patch()
    exec("from keras.layers import BatchNormalization, BatchNormalization as BN", script.__dict__)
    assert (script.Before, script.BN, lazy.norm) == (
        KERAS,
        OURS.PatchedBatchNormalization,
        OURS.PatchedBatchNormalization,
    )
    assert uses_bnfast(script)
    unpatch()
    assert (script.Before, script.BN, script.BatchNormalization, lazy.norm) == (KERAS,) * 4
    assert not uses_bnfast(script)


def test_modules_that_are_no_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs put None and other objects into sys.modules."""

    class Lazy:
        __slots__ = ()

        def __getattr__(self, name: str) -> Any:
            raise AssertionError("the lazy import has run")

    for name, thing in (("keras.absent", None), ("keras.lazy", Lazy()), ("keras.odd", 3)):
        monkeypatch.setitem(sys.modules, name, thing)
    with patch():
        assert keras.layers.BatchNormalization is OURS.PatchedBatchNormalization
    assert keras.layers.BatchNormalization is KERAS


def test_nested_patch_and_repeated_unpatch() -> None:
    assert not is_patched()
    with patch():
        with patch():
            pass
        assert is_patched(), "the inner patch() must not end the outer one"
    assert not is_patched()
    unpatch()
    assert keras.layers.BatchNormalization is KERAS
    with pytest.raises(KeyError), patch():
        raise KeyError
    assert not is_patched()


def test_uses_bnfast() -> None:
    earlier, ours = keras.layers.BatchNormalization(), bnfast.keras.BatchNormalization()
    plain = keras.Sequential([earlier])
    with patch():
        assert is_patched()
        assert uses_bnfast(keras.layers)
        assert uses_bnfast(tf.keras.layers)
        patched, fallen = keras.layers.BatchNormalization(), keras.layers.BatchNormalization(epsilon=-1)
        model = keras.Sequential([keras.Input((3,)), keras.Sequential([patched]), keras.layers.Dense(1)])
        mixed = keras.Sequential([patched, earlier])
        assert not uses_bnfast(plain)
    assert not uses_bnfast(keras.layers)
    assert not uses_bnfast(keras.layers.BatchNormalization)
    assert not uses_bnfast(json), "a module without a batch norm"
    answers = {each: uses_bnfast(each) for each in (earlier, ours, patched, fallen, model, mixed, plain)}
    assert [each for each, answer in answers.items() if answer] == [ours, patched, model]
    assert not uses_bnfast(keras.layers.Dense(1))
    with pytest.raises(TypeError, match=r"obj must be a layer, a model, a class or a module\. Received: str"):
        uses_bnfast("keras")


def test_isinstance_holds_before_during_and_after() -> None:
    earlier = keras.layers.BatchNormalization()
    with patch():
        patched = keras.layers.BatchNormalization()
        for each in (earlier, patched, bnfast.keras.BatchNormalization()):
            assert isinstance(each, keras.layers.BatchNormalization)
        assert issubclass(KERAS, keras.layers.BatchNormalization)
        assert not isinstance(keras.layers.ReLU(), keras.layers.BatchNormalization)

        class Mine(keras.layers.BatchNormalization):
            pass

        assert isinstance(Mine(), Mine)
        assert not isinstance(patched, Mine)
        assert not issubclass(KERAS, Mine)
    assert isinstance(patched, keras.layers.BatchNormalization)
    assert isinstance(Mine(), keras.layers.BatchNormalization)


def test_a_subclass_in_a_script_trains_on_our_kernels(rng: np.random.Generator) -> None:
    patch()

    class Mine(keras.layers.BatchNormalization):
        def __init__(self, momentum: float = 0.5, **kwargs: Any) -> None:
            super().__init__(momentum=momentum, **kwargs)

        def call(self, inputs: Any, training: Any = None) -> Any:
            return 2 * super().call(inputs, training=training)

    unpatch()
    mine, theirs = Mine(name="mine"), keras.layers.BatchNormalization(momentum=0.5)
    x = rng.normal(3, 2, size=(32, 5)).astype("float32")
    np.testing.assert_allclose(mine(x, training=True), 2 * theirs(x, training=True), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mine.moving_mean, theirs.moving_mean, rtol=1e-5)
    assert uses_bnfast(mine)
    assert [(entry.name, entry.reason) for entry in made] == [("mine", None)]
    assert made[0].state.startswith("trained on ")
    assert Mine.from_config(mine.get_config()).momentum == 0.5


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"renorm": True, "synchronized": True}, "renorm=True with synchronized=True"),
        ({"renorm": True, "renorm_momentum": 1.5}, "renorm_momentum must be in [0, 1]. Received: 1.5"),
        ({"momentum": 1.5}, "momentum outside [0, 1]"),
        ({"epsilon": -1e-9}, "epsilon negative or not finite"),
    ],
)
def test_unsupported_arguments_give_keras_layers(kwargs: dict[str, Any], reason: str, rng: np.random.Generator) -> None:
    keras.backend.clear_session()
    theirs = KERAS(**kwargs)
    keras.backend.clear_session()
    patch()
    ours = keras.layers.BatchNormalization(**kwargs)
    assert ours.get_config() == theirs.get_config(), "including the default name"
    assert (made[0].reason, uses_bnfast(ours)) == (reason, False)
    x = rng.normal(size=(32, 5)).astype("float32")
    for training in (True, False):
        np.testing.assert_array_equal(ours(x, training=training), theirs(x, training=training))
    assert summary().splitlines() == [
        "1 batch norm: 1 on Keras's own layer",
        f"Keras's own for batch_normalization: {reason}",
    ]


def test_invalid_arguments_raise_keras_errors() -> None:
    patch()
    for kwargs in ({"axis": [1, 2]}, {"axes": 1}, {"momentum": "much"}):
        with pytest.raises((TypeError, ValueError)) as theirs:
            KERAS(**kwargs)
        with pytest.raises(theirs.type) as ours:
            keras.layers.BatchNormalization(**kwargs)
        assert str(ours.value).replace("PatchedBatchNormalization", "BatchNormalization") == str(theirs.value)


def test_summary(rng: np.random.Generator) -> None:
    assert summary() == "no batch norm was made"
    patch()
    trained(small_model(), rng)
    keras.layers.BatchNormalization(name="idle")
    for index in range(5):
        keras.layers.BatchNormalization(momentum=1.5, name=f"odd_{index}")
    first, second = summary().splitlines()
    assert first.startswith("8 batch norms: 5 on Keras's own layer, 2 trained on ")
    assert first.endswith(", 1 never called, 1 fused")
    assert second == "Keras's own for odd_0, odd_1, odd_2 and 2 more: momentum outside [0, 1]"


def test_summary_tells_never_called_from_never_in_training() -> None:
    with patch():
        idle, used, frozen = (keras.layers.BatchNormalization(name=name) for name in ("idle", "used", "frozen"))
    x = np.ones((4, 3), "float32")
    used(x)
    frozen.trainable = False
    frozen(x, training=True)
    first, second = summary().splitlines()
    assert first == "3 batch norms: 1 never called, 1 called in inference alone, 1 frozen"
    assert second == "none was called with training=True: a training loop of one's own calls model(x, training=True)"
    used(x, training=True)
    assert len(summary().splitlines()) == 1
    assert not idle.built


LOAD = """
import json, sys
sys.modules["bnfast"] = None  # any import of it fails
import keras, numpy as np
from pathlib import Path
folder = Path(sys.argv[1])
data = np.load(folder / "data.npz")
files = [keras.models.load_model(folder / name) for name in ("small.keras", "small.h5")]
bare = keras.models.model_from_json((folder / "small.json").read_text())
bare.load_weights(folder / "small.weights.h5")
for model in (*files, bare):
    assert [type(layer).__module__.split(".")[0] for layer in model.layers] == ["keras"] * 7
    norms = [layer for layer in model.layers if type(layer) is keras.layers.BatchNormalization]
    assert [layer.name for layer in norms] == ["norm", "last"]
    for index, weights in enumerate(model.get_weights()):
        np.testing.assert_array_equal(weights, data[f"arr_{index}"])
    np.testing.assert_allclose(model.predict(data["x"], verbose=0), data["y"], rtol=1e-5, atol=1e-5)
files[0].train_on_batch(data["x"], data["y"])
"""


@pytest.mark.parametrize("when", ["under the patch", "after unpatching"])
def test_trained_models_load_without_bnfast(when: str, tmp_path: Path, rng: np.random.Generator) -> None:
    with patch():
        model = trained(small_model(), rng)
        if when == "after unpatching":
            unpatch()
        model.save(tmp_path / "small.keras")
        model.save(tmp_path / "small.h5")
        model.save_weights(tmp_path / "small.weights.h5")
        (tmp_path / "small.json").write_text(model.to_json())
    assert uses_bnfast(model)
    x = rng.normal(size=(5, 8, 8, 3)).astype("float32")
    np.savez(tmp_path / "data.npz", *model.get_weights(), x=x, y=model.predict(x, verbose=0))
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_configs_equal_keras() -> None:
    theirs = small_model(**KWARGS[-1]).to_json()
    with patch():
        ours = small_model(**KWARGS[-1])
        assert json.loads(ours.to_json()) == json.loads(theirs)
        assert uses_bnfast(keras.models.model_from_json(theirs))
        assert uses_bnfast(keras.models.clone_model(ours))
    assert json.loads(ours.to_json()) == json.loads(theirs)
    assert not uses_bnfast(keras.models.model_from_json(ours.to_json()))


@pytest.mark.parametrize("kwargs", KWARGS, ids=str)
def test_training_equals_keras(kwargs: dict[str, Any]) -> None:
    results = []
    for switch in (unpatch, patch):
        switch()
        keras.utils.set_random_seed(4)
        model = trained(small_model(**kwargs), np.random.default_rng(0))
        results.append({w.path: w.numpy() for w in model.weights if w.path != "head/bias"})  # true gradient 0
    assert uses_bnfast(model)
    assert [row.fused for row in bnfast.keras.report(model).rows] == ["leaky_relu", ""]
    assert results[0].keys() == results[1].keys()
    for path, theirs in results[0].items():
        np.testing.assert_allclose(results[1][path], theirs, rtol=1e-3, atol=1e-4, err_msg=path)


def test_patched_models_work_with_accelerate_fold_and_to_keras() -> None:
    with patch():
        model = small_model()
        x = inputs = keras.Input((3,))
        odd = keras.layers.BatchNormalization(renorm=True, synchronized=True)
        mixed = keras.Model(inputs, keras.layers.BatchNormalization()(odd(x)))
    assert [row.state for row in bnfast.keras.report(model).rows] == ["bnfast", "bnfast"]
    first, second = bnfast.keras.report(mixed).rows
    assert (first.state, first.reason) == ("keras", "renorm=True with synchronized=True is not supported")
    assert second.state == "bnfast"
    with pytest.raises(ValueError, match="renorm=True"):
        bnfast.keras.accelerate(mixed, strict=True)
    for each in (model, mixed):
        restored = bnfast.keras.to_keras(each)
        assert all(type(layer).__module__.startswith("keras.") for layer in restored.layers)
    assert all(type(layer).__module__.startswith("keras.") for layer in bnfast.keras.fold(model).layers[:3])


@pytest.mark.parametrize("kwargs", [{"activation": "relu"}, {"bridge": "op"}], ids=str)
def test_our_own_arguments_are_errors_under_the_patch(kwargs: Any) -> None:
    """Keras's config can't store them, so a saved model would compute something else."""
    patch()
    with pytest.raises(ValueError, match="Unrecognized keyword arguments"):
        keras.layers.BatchNormalization(**kwargs)


def test_fused_of_keras_2_is_accepted(tmp_path: Path) -> None:
    with patch():
        model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(fused=True)])
        assert model.layers[0].fused is True
        assert uses_bnfast(model.layers[0])
        with pytest.raises(TypeError, match=r"fused must be None, True or False. Received: 1"):
            keras.layers.BatchNormalization(fused=1)
        with pytest.raises(ValueError, match="fused must not be True with renorm=True"):
            keras.layers.BatchNormalization(fused=True, renorm=True)
        again = keras.models.model_from_json(model.to_json())
        assert uses_bnfast(again.layers[0])
    model.save(tmp_path / "model.keras")
    assert type(keras.models.load_model(tmp_path / "model.keras").layers[0]) is KERAS


def test_load_ext_is_patch(capsys: pytest.CaptureFixture[str]) -> None:
    bnfast.load_ipython_extension(None)
    assert is_patched()
    assert "%unload_ext bnfast undoes it" in capsys.readouterr().out
    bnfast.unload_ipython_extension(None)
    assert not is_patched()
