"""Those that batch norm is timed with: one small class each, all with the interface of `base.Peer`.

A peer's framework is imported when the peer is made, never before.
"""

from __future__ import annotations

from bnfast.benchmark.peers.base import Calls, Peer, Unsupported
from bnfast.benchmark.peers.copy import Copy
from bnfast.benchmark.peers.jax import Jax
from bnfast.benchmark.peers.keras import KerasEager, KerasFunction, KerasXla
from bnfast.benchmark.peers.ours import Ours
from bnfast.benchmark.peers.tensorflow import TensorFlow
from bnfast.benchmark.peers.torch import TorchChannelsLast, TorchContiguous

__all__ = ["PEERS", "Calls", "Peer", "Unsupported"]

# In the order of tables and of the first round.
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
