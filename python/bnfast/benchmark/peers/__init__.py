"""The peers: one class per implementation of batch norm, each a `base.Peer`.

A peer imports its library when it is created, never earlier.
"""

from __future__ import annotations

from bnfast.benchmark.peers.base import Calls, Peer, Unsupported
from bnfast.benchmark.peers.copy import Copy
from bnfast.benchmark.peers.jax import Jax
from bnfast.benchmark.peers.keras import KerasEager, KerasFunction, KerasXla
from bnfast.benchmark.peers.ours import Ours
from bnfast.benchmark.peers.tensorflow import TensorFlow
from bnfast.benchmark.peers.torch import TorchChannelsLast, TorchContiguous

__all__ = ["BASELINES", "PEERS", "Calls", "Peer", "Unsupported"]

# In the order of the tables and of the first round.
PEERS: tuple[type[Peer], ...] = (
    Copy,
    Ours,
    TensorFlow,
    KerasEager,
    KerasFunction,
    KerasXla,
    TorchContiguous,
    TorchChannelsLast,
    Jax,
)
BASELINES = ("copy", "bnfast")  # always timed: every ratio is relative to one of them
