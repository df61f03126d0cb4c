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


def prepare_tensorflow() -> None:
    """Choose quiet logging and Keras's TensorFlow backend. Has no effect once TensorFlow and Keras are imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "tensorflow"  # the only backend bnfast.keras works with


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Redirect file descriptor 2 to a temporary file; copy that file to stderr if the block raises."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as noise:
        os.dup2(noise.fileno(), 2)
        try:
            yield
        except BaseException:
            _restore(saved)
            noise.seek(0)
            with os.fdopen(os.dup(2), "wb") as stderr:
                shutil.copyfileobj(noise, stderr)
            raise
        _restore(saved)


def _restore(saved: int) -> None:
    os.dup2(saved, 2)
    os.close(saved)
