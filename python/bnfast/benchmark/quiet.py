"""Starts TensorFlow without its log lines.

TensorFlow's C++ code writes to file descriptor 2 before any logging level applies, so the descriptor itself is
redirected for a moment. If the block raises, everything that was written is shown, so no error message is lost.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import IO


def prepare_tensorflow() -> None:
    """Choose quiet logging and Keras's TensorFlow backend. Has no effect once TensorFlow and Keras are imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "tensorflow"  # the only backend bnfast.keras works with


@contextlib.contextmanager
def quiet_stderr(explained: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Redirect file descriptor 2 to a temporary file; copy that file to stderr if the block raises.

    Not after an interrupt, nor after one of the `explained` exceptions, whose message is all that a user needs.
    """
    try:
        saved = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it can't be written, is closed, or is None
        sys.stderr.flush()
    with _temporary_file() as noise:
        os.dup2(noise.fileno(), 2)
        try:
            yield
        except BaseException as error:
            _restore(saved)
            if not isinstance(error, (KeyboardInterrupt, *explained)):
                _show(noise)
            raise
        _restore(saved)


def _temporary_file() -> IO[bytes]:
    """An unnamed file: in memory where the system has such files, so that no full or missing disk matters."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("bnfast"), "w+b")
    return tempfile.TemporaryFile()


def _show(noise: IO[bytes]) -> None:
    noise.seek(0)
    with contextlib.suppress(OSError), os.fdopen(os.dup(2), "wb") as stderr:
        shutil.copyfileobj(noise, stderr)


def _restore(saved: int) -> None:
    os.dup2(saved, 2)
    os.close(saved)
