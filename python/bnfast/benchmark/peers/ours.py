"""bnfast's functions on NumPy arrays; `reused` passes `out=`."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

import bnfast
from bnfast._arguments.arrays import Array
from bnfast.benchmark.cases import EPSILON, MOMENTUM, Arrays, Case
from bnfast.benchmark.peers.base import Calls, Peer


class Ours(Peer):
    """The baseline of every ratio."""

    name = "bnfast"
    title = "bnfast"
    distribution = "bnfast"

    def __init__(self, threads: int) -> None:
        bnfast.set_num_threads(threads)

    def version(self) -> str:
        return str(bnfast.build_info()["version"])

    def prepare(self, case: Case, arrays: Arrays) -> Calls:
        x, gamma, beta, axis = arrays.x, arrays.gamma, arrays.beta, case.axis
        moving = arrays.moving_mean.copy(), arrays.moving_variance.copy()  # training updates them in place
        out = np.ones_like(x)
        call: partial[Any]
        if case.op == "infer":
            call = partial(bnfast.batch_norm_infer, x, *moving, gamma, beta, axis=axis, epsilon=EPSILON)
            return Calls(call, lambda y: {"y": y}, partial(call, out=out))
        call = partial(bnfast.batch_norm_train, x, gamma, beta, *moving, axis=axis, epsilon=EPSILON, momentum=MOMENTUM)
        if case.op == "train":
            return Calls(call, lambda result: {"y": result.y}, partial(call, out=out))
        forward = call()
        call = partial(bnfast.batch_norm_grad, arrays.dy, x, forward.mean, forward.invstd, gamma, beta, axis=axis)
        return Calls(call, _gradients, partial(call, out=out))


def _gradients(result: Any) -> dict[str, Array]:
    return {"dx": result.dx, "dgamma": result.dgamma, "dbeta": result.dbeta}
