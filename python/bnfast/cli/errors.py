"""What a subcommand reports when it cannot do what was asked: one line on stderr, and exit status 2."""

from __future__ import annotations

import argparse
import importlib.util


class UserError(Exception):
    """A request that cannot be met. The message is one line for the person at the terminal."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


def require(*modules: str, extra: str) -> None:
    """Raise UserError unless all `modules` are installed. `extra` is the extra of bnfast that installs them."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f'this needs {", ".join(missing)}, not installed here: pip install "bnfast[{extra}]"')


def positive_int(text: str) -> int:
    """An argparse type: an integer >= 1."""
    return _integer(text, least=1)


def non_negative_int(text: str) -> int:
    """An argparse type: an integer >= 0."""
    return _integer(text, least=0)


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be an integer >= {least}. Received: {text}")
    return value
