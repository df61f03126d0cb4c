"""Whether a call can run on the kernels: the handlers are registered with XLA's CPU, and the call is for the CPU.

Everything else runs on JAX's own ops (reference.py). Why is logged once per reason (logger "bnfast.jax").
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.backend import backends

from .. import _core

__all__ = ["BY_PLATFORM", "KERNELS", "OWN_OPS", "own_ops", "status", "way"]

# The ways of a call.
KERNELS = "kernels"
OWN_OPS = "JAX's own ops"
BY_PLATFORM = "by platform"  # the kernels where it is compiled for the CPU, JAX's own ops elsewhere

_log = logging.getLogger("bnfast.jax")
_state = threading.local()
# JAX 0.8
_own_ops: Any = jax.make_user_context(default_value=False) if hasattr(jax, "make_user_context") else None


@functools.cache
def status() -> tuple[bool, str]:
    """Whether the kernels can run in this JAX, and why (not).

    Example:
        >>> import bnfast.jax
        >>> available, reason = bnfast.jax.status()
    """
    try:
        from jax import ffi
    except ImportError:
        return False, f"JAX {jax.__version__} has no jax.ffi: 0.5.0 is the first that has"
    # Before XLA's clients exist, a registration waits for them, and a refused one would keep JAX's CPU from starting.
    backends()
    try:
        for name, handler in _core._jax_handlers().items():
            ffi.register_ffi_target(name, handler, platform="cpu")
    except Exception as error:  # whatever jaxlib raises: its own ops still work
        return False, _core._jax_query()[3] or f"XLA refuses the handlers: {error}"
    asked, major, minor, reason = _core._jax_query()
    if not asked:
        return False, f"jaxlib {jax.lib.__version__} has not asked for the version of the handlers"
    return not reason, reason or f"the handlers run with version {major}.{minor} of XLA's API for foreign functions"


@contextlib.contextmanager
def own_ops() -> Iterator[None]:
    """Calls that are traced inside are made of JAX's own ops alone, as an exported program must be that runs without
    bnfast, and as forward-mode differentiation (`jax.jvp`) needs them. Functions traced before are traced anew:
    before JAX 0.8, by clearing all of JAX's caches.

    Example:
        >>> import bnfast.jax, jax
        >>> with bnfast.jax.own_ops():
        ...     y = bnfast.jax.batch_norm_train(jax.numpy.array([[1.0], [3.0]])).y
    """
    if _own_ops is not None:  # a part of the key of every trace
        with _own_ops(True):
            yield
        return
    before = getattr(_state, "own_ops", False)
    _state.own_ops = True
    jax.clear_caches()  # so that nothing that was traced outside is taken inside, and vice versa
    try:
        yield
    finally:
        _state.own_ops = before
        jax.clear_caches()


def _inside_own_ops() -> bool:
    return bool(_own_ops.value if _own_ops is not None else getattr(_state, "own_ops", False))


def way(x: Any) -> str:
    """The way of a call on x, a JAX array or a tracer of one."""
    if _inside_own_ops():
        return OWN_OPS
    available, reason = status()
    if not available:
        log_once(reason)
        return OWN_OPS
    if not isinstance(x, jax.core.Tracer):
        elsewhere = ", ".join(sorted({device.platform for device in x.devices()} - {"cpu"}))
        if elsewhere:
            log_once(f"an array is on {elsewhere}, and the kernels run on the CPU alone")
        return OWN_OPS if elsewhere else KERNELS
    others = ", ".join(sorted(set(backends()) - {"cpu", "interpreter"}))
    if not others:
        return KERNELS
    if jax.__version_info__ < (0, 6, 2):  # 0.5.3 keeps the CPU's branch in programs of other platforms
        log_once(f"JAX {jax.__version__} has {others} beside the CPU, and can't tell what it compiles for")
        return OWN_OPS
    log_once(f"what is compiled for {others}: the kernels run on the CPU alone")
    return BY_PLATFORM


@functools.cache
def log_once(reason: str) -> None:
    _log.warning("batch norm runs on JAX's own ops: %s", reason)
