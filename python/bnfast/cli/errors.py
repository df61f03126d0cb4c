"""What a subcommand says when it cannot do what was asked: one line, and exit status 2."""

from __future__ import annotations

import argparse
import importlib.util


class UserError(Exception):
    """A request that cannot be met. The message is one line meant for the person at the terminal."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


def require(*modules: str, extra: str) -> None:
    """Raise UserError unless every one of `modules` can be imported; `extra` is the extra that brings them."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f'this needs {", ".join(missing)}, not installed here: pip install "bnfast[{extra}]"')


def positive_int(text: str) -> int:
    """An argparse type: an integer >= 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1. Received: {text}")
    return value
