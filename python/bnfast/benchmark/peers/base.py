"""What a peer is: `Peer(threads)` imports its framework (ImportError where it is absent) and sets its threads;
`prepare(case, arrays)` converts the inputs once and returns the calls to time."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from bnfast._arguments.arrays import Array
from bnfast.benchmark.cases import Arrays, Case


class Unsupported(Exception):
    """The peer has no such operation; the message says which."""


@dataclass
class Calls:
    """One operation as the peer's user would call it. Each call has finished its work when it returns.

    fresh: returns new outputs.
    read: what `fresh` returned as {"y"} or {"dx", "dgamma", "dbeta"}; y and dx in the shape of x.
    reused: the same into outputs made once; None where the peer has no such thing.
    """

    fresh: Callable[[], Any]
    read: Callable[[Any], dict[str, Array]]
    reused: Callable[[], Any] | None = None


class Peer(abc.ABC):
    """One way to compute a batch norm."""

    name: ClassVar[str]  # in options, JSON and tables; "torch" stands for every torch-* in options
    title: ClassVar[str]  # in prose and pictures
    distribution: ClassVar[str]  # the package whose absence is reported
    mallocs: ClassVar[bool] = False  # outputs come from malloc, so keeping freed memory ("warm") changes something

    @abc.abstractmethod
    def __init__(self, threads: int) -> None: ...

    @abc.abstractmethod
    def version(self) -> str:
        """The version of the package."""

    @abc.abstractmethod
    def prepare(self, case: Case, arrays: Arrays) -> Calls:
        """The calls for this case. Raises Unsupported."""
