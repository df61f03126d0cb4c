"""JAX: batch norm written in jax.numpy and compiled with jax.jit. grad is the compiled pullback of a recorded forward.

JAX has no function that sets its number of threads. Its thread pool reads the environment variable NPROC when the
backend starts, so NPROC is set for that moment.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from bnfast._arguments.arrays import Array
from bnfast.benchmark.cases import EPSILON, MOMENTUM, Arrays, Case
from bnfast.benchmark.peers.base import Calls, Peer


def start(threads: int | None) -> Any:
    """Import JAX on the CPU and start it with that many threads; None: JAX's own number.

    Without effect on the threads once JAX runs.
    """
    before = os.environ.get("NPROC")
    if threads is not None:
        os.environ["NPROC"] = str(threads)
    try:
        import jax

        if not jax.config.jax_platforms:  # the environment variable is read when JAX is imported, so here it's too late
            jax.config.update("jax_platforms", "cpu")
        jax.block_until_ready(jax.numpy.zeros(1))
    finally:
        if before is not None:
            os.environ["NPROC"] = before
        elif threads is not None:
            del os.environ["NPROC"]
    return jax


class Jax(Peer):
    """jax.jit on the CPU."""

    name = "jax"
    title = "JAX jit"
    distribution = "jax"

    def __init__(self, threads: int) -> None:
        jax = start(threads)
        jax.config.update("jax_enable_x64", True)
        self.jax = jax

    def version(self) -> str:
        return str(self.jax.__version__)

    def prepare(self, case: Case, arrays: Arrays) -> Calls:
        jax, jnp = self.jax, self.jax.numpy
        axes = tuple(axis for axis in range(arrays.x.ndim) if axis != case.axis % arrays.x.ndim)
        per_channel = [1] * arrays.x.ndim  # the shape that broadcasts along the channel axis
        per_channel[case.axis] = case.shape.c

        def normalize(x: Any, mean: Any, variance: Any, gamma: Any, beta: Any) -> Any:
            scale = gamma * jax.lax.rsqrt(variance + EPSILON)
            shift = beta - mean * scale
            return (x * scale.reshape(per_channel) + shift.reshape(per_channel)).astype(x.dtype)

        def train(x: Any, gamma: Any, beta: Any, moving_mean: Any, moving_variance: Any) -> Any:
            wide = x.astype(gamma.dtype)
            mean, variance = jnp.mean(wide, axes), jnp.var(wide, axes)
            moving_mean = moving_mean * MOMENTUM + mean * (1 - MOMENTUM)
            moving_variance = moving_variance * MOMENTUM + variance * (1 - MOMENTUM)
            return normalize(x, mean, variance, gamma, beta), moving_mean, moving_variance

        x = arrays.keep("jax x", lambda: jnp.array(arrays.x))
        gamma, beta = jnp.array(arrays.gamma), jnp.array(arrays.beta)
        moving = jnp.array(arrays.moving_mean), jnp.array(arrays.moving_variance)
        wait = jax.block_until_ready
        if case.op == "infer":
            infer = jax.jit(normalize)
            return Calls(lambda: wait(infer(x, *moving, gamma, beta)), lambda y: {"y": np.asarray(y)})
        if case.op == "train":
            forward = jax.jit(train)
            return Calls(lambda: wait(forward(x, gamma, beta, *moving)), lambda result: {"y": np.asarray(result[0])})
        dy = arrays.keep("jax dy", lambda: jnp.array(arrays.dy))
        _, pull = jax.vjp(jax.jit(lambda x, gamma, beta: train(x, gamma, beta, *moving)[0]), x, gamma, beta)
        pullback = jax.jit(lambda pull, dy: pull(dy))

        def read(result: Any) -> dict[str, Array]:
            dx, dgamma, dbeta = (np.asarray(array) for array in result)
            return {"dx": dx, "dgamma": dgamma, "dbeta": dbeta}

        return Calls(lambda: wait(pullback(pull, dy)), read)
