"""The installed Keras's own tests of its normalization layers, on the backend that KERAS_BACKEND names."""

import pytest
from keras_suite import NAMES, check_that_it_was_collected, run

pytestmark = pytest.mark.filterwarnings("ignore")  # raised by Keras


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_of_keras(kind: str, name: str) -> None:
    run(kind, name)


def test_the_suite_was_collected() -> None:
    check_that_it_was_collected()
