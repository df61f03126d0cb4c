"""Whether a script trained long enough for the momentum of its batch norms: a line of the summary of `bnfast run`.

After n updates, momentum**n of what the moving statistics started as is still in them. n is at most the number of steps
that all of the script's optimizers took together.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

_steps: list[Any] = []  # the step counter of every optimizer; not the optimizers, whose state is as large as a model


def install() -> None:
    """From now on each optimizer that Keras makes is counted."""
    from keras.src.optimizers.base_optimizer import BaseOptimizer

    own = BaseOptimizer.__init__

    @functools.wraps(own)
    def init(optimizer: Any, *args: Any, **kwargs: Any) -> None:
        own(optimizer, *args, **kwargs)
        # With gradient accumulation `iterations` counts less often than batch norms are updated.
        steps = getattr(optimizer, "_iterations", None)
        _steps.append(optimizer.iterations if steps is None else steps)

    BaseOptimizer.__init__ = init


def too_few(momenta: Iterable[float]) -> list[str]:
    """A line about the trained batch norms with these momenta, if one of them had too few updates."""
    import keras

    from bnfast.diagnosis.verdicts.case import START_SHARE

    try:
        done = sum(int(keras.ops.convert_to_numpy(steps)) for steps in _steps)
    except Exception:  # in JAX after an interrupt a counter may have no value
        return []
    known = list(momenta)
    short = [momentum for momentum in known if momentum < 1 and momentum**done > START_SHARE]
    if not done or not short:
        return []
    worst = max(short)
    return [
        f"{len(short)} of {len(known)} trained batch norms had at most {done} updates at momentum {worst:g}: "
        f"{worst**done:.0%} of their moving statistics is still the start. If predict is off, "
        "bnfast.keras.recalibrate(model, x) mends it"
    ]
