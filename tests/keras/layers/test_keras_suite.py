"""The installed Keras's own tests of its normalization layers, run on our layers, through each bridge to TensorFlow."""

import pytest

pytest.importorskip("tensorflow")
from keras_suite import NAMES, check_that_it_was_collected, run

pytestmark = pytest.mark.filterwarnings("ignore")  # raised by Keras


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("name", NAMES["batch"])
def test_batch_norm(name: str) -> None:
    run("batch", name)


@pytest.mark.parametrize("force_kernels", [False, True], ids=["default", "kernels"])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in ("layer", "group") for name in NAMES[kind]])
def test_layer_and_group_norm(kind: str, name: str, force_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras's tensors are so small that they run on TensorFlow's ops, unless the size limit is 0."""
    if force_kernels:
        monkeypatch.setattr("bnfast.tensorflow.group_norm.SMALL_BYTES", 0)
    run(kind, name)


def test_the_suite_was_collected() -> None:
    check_that_it_was_collected()
