"""Options whose value is a comma-separated list of names."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def name_list(known: list[str], families: bool = False) -> Callable[[str], list[str]]:
    """An argparse type: a comma-separated list of `known` names, or all.

    With `families`, a name also selects those that start with it and a hyphen: torch selects every torch-*.
    """

    def parse(text: str) -> list[str]:
        chosen: set[str] = set()
        for name in text.split(","):
            found = {k for k in known if name in (k, "all") or (families and k.startswith(f"{name}-"))}
            if not found:
                raise argparse.ArgumentTypeError(f"must be all, or some of {', '.join(known)}. Received: {name!r}")
            chosen |= found
        return [name for name in known if name in chosen]

    return parse
