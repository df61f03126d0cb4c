"""Peak memory of training one variant: VmHWM of a fresh process that builds it and runs a few steps (Linux).

`peaks` starts these processes one at a time. Each runs `main` with one argument, the task as JSON: {"model": ...,
"batch": ..., "size": ..., "framework": ..., "variant": ..., "threads": ...}. It prints {"before_bytes", "peak_bytes"}
as its last line: the peak before the first step (Python, the framework, the weights) and the peak after the last one,
which is the memory a machine needs.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bnfast import _child_process
from bnfast.benchmark.models import Spec

STEPS = 3
STATUS = Path("/proc/self/status")
EXIT_UNSUPPORTED = 3  # the variant isn't available here
Runs = dict[str, list[dict[str, int]]]


def available() -> bool:
    """Whether this system reports the peak memory of a process."""
    return STATUS.exists() and "VmHWM" in _status()


def peaks(
    spec: Spec, names: list[str], runs: int, threads: int | None, announce: Callable[[str], object]
) -> tuple[Runs, dict[str, str]]:
    """Start `runs` processes per trained variant, in changing order. Returns the peaks and the reasons of failures."""
    found: Runs = {}
    failed: dict[str, str] = {}
    trained = spec.framework.trained(names)
    for turn in range(runs):
        first = turn % len(trained)
        for name in trained[first:] + trained[:first]:
            announce(f"memory, {turn + 1} of {runs}: {spec.framework.titles[name]}")
            if name in failed:
                continue
            result = _run_child(spec, name, threads)
            if isinstance(result, str):
                failed[name] = result
            else:
                found.setdefault(name, []).append(result)
    return {name: found[name] for name in trained if name in found}, failed


def _run_child(spec: Spec, name: str, threads: int | None) -> dict[str, int] | str:
    """What one process measured; if it failed, the last line of its output."""
    task = {"model": spec.text, "batch": spec.batch, "size": spec.size, "framework": spec.framework.name}
    task |= {"variant": name, "threads": threads}
    try:
        done = _child_process.run_module(__name__, json.dumps(task))
    except OSError as error:
        return f"no process could be started: {error.strerror}"
    output = done.stdout if done.returncode in (0, EXIT_UNSUPPORTED) else done.stderr
    lines = output.strip().splitlines()
    last = lines[-1] if lines else f"exit status {done.returncode}"
    if done.returncode:
        return last[:160]
    result: dict[str, int] = json.loads(last)
    return result


def main(arguments: Sequence[str]) -> int:
    """The child process: measure one variant and print the result. The only argument is the task as JSON."""
    from bnfast.benchmark import models
    from bnfast.benchmark.peers.base import Unsupported

    task = json.loads(arguments[0])
    spec = models.parse(task["model"], task["batch"], task["size"], task["framework"])
    module = spec.framework.load()
    module.start(task["threads"])
    base = module.build_model(spec)
    x, y = module.make_data(spec, base)
    try:
        model = module.make_variant(task["variant"], base)
    except Unsupported as reason:
        print(reason)
        return EXIT_UNSUPPORTED
    del base  # frees the base's copy of the weights; a user who keeps the original model has both
    gc.collect()
    before = _peak()
    for _ in range(STEPS):
        model.train_on_batch(x, y)
    print(json.dumps({"before_bytes": before, "peak_bytes": _peak()}))
    return 0


def _peak() -> int:
    """The peak memory of this process so far, in bytes."""
    line: Any = next(line for line in _status().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _status() -> str:
    return STATUS.read_text(encoding="utf-8", errors="replace")  # a process may have any bytes as its name
