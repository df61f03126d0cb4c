"""diagnose, recalibrate and Watch on a backend other than TensorFlow: an error that says so."""

from __future__ import annotations

from typing import Any, NoReturn

from ...layers.framework import check_tensorflow


def diagnose(*args: Any, **kwargs: Any) -> NoReturn:
    """Raises RuntimeError: it needs the TensorFlow backend."""
    _refuse("diagnose")


def recalibrate(*args: Any, **kwargs: Any) -> NoReturn:
    """Raises RuntimeError: it needs the TensorFlow backend."""
    _refuse("recalibrate")


class Recalibration:
    """The result of `recalibrate`, which needs the TensorFlow backend: making one raises RuntimeError."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse("Recalibration")


class Watch:
    """A callback that needs the TensorFlow backend: making one raises RuntimeError."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse("Watch")


def _refuse(name: str) -> NoReturn:
    check_tensorflow(name)
    raise AssertionError("check_tensorflow raises off TensorFlow")
