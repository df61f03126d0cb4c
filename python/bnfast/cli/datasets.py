"""Data sets to train on. Images are float32 in [0, 1], of shape (count, height, width, channels); labels are int32.

"digits" (1797 handwritten digits, 8x8) is part of scikit-learn and needs no network. keras.datasets downloads the
others once.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bnfast.cli.errors import UserError

NAMES = ("digits", "mnist", "fashion_mnist", "cifar10")
DOWNLOAD_TIMEOUT_SECONDS = 20.0


class Dataset(NamedTuple):
    """Images and labels, split into a part to train on and a part to test on."""

    name: str
    x_train: npt.NDArray[np.float32]
    y_train: npt.NDArray[np.int32]
    x_test: npt.NDArray[np.float32]
    y_test: npt.NDArray[np.int32]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(height, width, channels)."""
        return self.x_train.shape[1:]


def load(name: str) -> Dataset:
    """The data set of that name. Raises UserError if it can't be downloaded."""
    return _digits() if name == "digits" else _from_keras(name)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # The file is in the order of collection, so it is shuffled. The split is 4 to 1: 1437 and 360 images.
    order = np.random.default_rng(0).permutation(len(bunch.target))
    return _pack("digits", bunch.images[order] / 16, bunch.target[order], num_train=1437)


def _from_keras(name: str) -> Dataset:
    from keras import datasets

    try:
        with _socket_timeout(DOWNLOAD_TIMEOUT_SECONDS), _stdout_to_stderr():
            (x_train, y_train), (x_test, y_test) = getattr(datasets, name).load_data()
    except Exception as error:  # network, proxy, disk or checksum: one line is enough
        raise UserError(f"{name} could not be downloaded ({error}); --data digits needs no network") from error
    return _pack(name, np.concatenate([x_train, x_test]) / 255, np.concatenate([y_train, y_test]), len(x_train))


def _pack(name: str, images: npt.NDArray[Any], labels: npt.NDArray[Any], num_train: int) -> Dataset:
    """Convert to the types above; the first `num_train` images are for training, the others for testing."""
    x = np.asarray(images, np.float32)
    x = x[..., None] if x.ndim == 3 else x
    y = np.asarray(labels, np.int32).reshape(-1)
    return Dataset(name, x[:num_train], y[:num_train], x[num_train:], y[num_train:])


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Inside the block, a connection fails after `seconds` without data; Keras alone would wait forever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect Keras's download messages from stdout to stderr, or discard them if stderr is not a terminal."""
    with contextlib.ExitStack() as stack:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        target = sys.stderr if terminal else stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(target))
        yield
