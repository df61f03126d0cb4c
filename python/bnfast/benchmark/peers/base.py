"""The interface of a peer.

`Peer(threads)` imports the library and sets its number of threads; it raises ImportError if the library is missing.
`prepare(case, arrays)` converts the inputs once and returns the calls to time.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from bnfast._arguments.arrays import Array
from bnfast.benchmark.cases import Arrays, Case


class Unsupported(Exception):
    """The peer cannot do this operation; the message gives the reason."""


@dataclass
class Calls:
    """One operation, called the way a user of the library calls it. A call returns when its work is done.

    fresh: computes into new outputs and returns them.
    read: converts what `fresh` returned to {"y"} or {"dx", "dgamma", "dbeta"}; y and dx have the shape of x.
    reused: computes into the same outputs on every call; None if the library cannot.
    """

    fresh: Callable[[], Any]
    read: Callable[[Any], dict[str, Array]]
    reused: Callable[[], Any] | None = None


class Peer(abc.ABC):
    """One implementation of batch norm."""

    name: ClassVar[str]  # in options and JSON; the option value "torch" selects every torch-*
    title: ClassVar[str]  # in tables and pictures
    distribution: ClassVar[str]  # the Python package it comes from
    uses_malloc: ClassVar[bool] = False  # outputs come from malloc, so the mode "warm" makes a difference

    @abc.abstractmethod
    def __init__(self, threads: int) -> None: ...

    @abc.abstractmethod
    def version(self) -> str:
        """The version of the library."""

    @abc.abstractmethod
    def prepare(self, case: Case, arrays: Arrays) -> Calls:
        """The calls for this case. Raises Unsupported if the library cannot do it."""
