"""`bnfast run SCRIPT [ARGS]`: runs an unmodified Keras script with bnfast's batch norm in place of Keras's.

The script runs as under `python SCRIPT ARGS` (script.py). Keras is patched right after the script has imported it
(keras_import.py). bnfast writes only to stderr: one line at the start and a summary at the end. With --compare the
script runs in processes of its own, with Keras's layer and with bnfast's (compare/).
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

from bnfast.cli import script, tf_layers, updates
from bnfast.cli.errors import UserError, positive_int, require
from bnfast.cli.keras_import import AfterImport
from bnfast.cli.output import say, show

USAGE = "bnfast run [OPTIONS] (SCRIPT | -m MODULE) [ARGS ...]"
STEPS = 20
HELP = f"""usage: {USAGE}

Run a Python script or module with bnfast's batch norm in place of keras.layers.BatchNormalization.

options:
  -h, --help    show this help message and exit
  -m MODULE     run a module, as python -m does
  --no-summary  don't print the summary at the end
  --quiet       print neither the line at the start nor the summary
  --compare     don't train to the end: run the script four times for a few steps and print how far bnfast's training
                is from Keras's, beside Keras's own distance when one weight moves by 1 ulp

with --compare:
  --steps N     training steps of each fit, and of a loop of the script's own (default: {STEPS})
  --in-place    run in the working directory, not in copies of it; the script then writes its files as it always does
  --json        one JSON object on standard output

Only this process and its forks use bnfast. Processes that the script starts anew, such as those that multiprocessing
spawns, use Keras's own layer.
"""


# multiprocessing imports one of these when it starts its first process that is not a fork.
STARTERS = (
    "multiprocessing.popen_spawn_posix",
    "multiprocessing.popen_spawn_win32",
    "multiprocessing.popen_forkserver",
)


@dataclasses.dataclass
class Options:
    """The options of `bnfast run`, each by its name on the command line."""

    help: bool = False
    module: bool = False
    quiet: bool = False
    no_summary: bool = False
    compare: bool = False
    in_place: bool = False
    json: bool = False
    steps: int | None = None


def register(subparsers: Any) -> None:
    """Add `run` to the command line. Its own options end where the script begins, so `run` parses them itself."""
    # No argument can start with "\0", so argparse finds no options and passes on all arguments.
    parser = subparsers.add_parser(
        "run", help="run a Keras script with bnfast's batch norm", prefix_chars="\0", add_help=False
    )
    parser.add_argument("command_line", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the script and return the exit status. A SystemExit of the script passes through."""
    options, command = _split(arguments.command_line)
    if options.help:
        show(HELP.removesuffix("\n"))
        return 0
    if not command:
        raise UserError(f"run: a script or -m MODULE is needed. usage: {USAGE}")
    other = os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow"
    require(*([] if other else ["tensorflow"]), "keras", extra="keras")
    if options.compare:
        return _compare(options, command)
    module, code = script.load(command, module=options.module, safe_path=sys.flags.safe_path)
    patcher = Patcher()
    AfterImport(patcher.patch)
    if not options.quiet:
        say(f"bnfast: running {command[0]} with bnfast's batch norm in place of Keras's")
        if not options.no_summary:
            atexit.register(_print_summary, patcher, os.getpid())
    return script.execute(module, code)


def _compare(options: Options, command: list[str]) -> int:
    from bnfast.cli import compare

    try:
        return compare.run(
            command,
            module=options.module,
            steps=options.steps or STEPS,
            in_place=options.in_place,
            as_json=options.json,
            quiet=options.quiet,
        )
    except OSError as error:  # no space for the copies, no process
        raise UserError(f"run --compare: {error}") from error


def _print_summary(patcher: Patcher, process: int) -> None:
    if os.getpid() == process:  # a forked child that ends by sys.exit runs its parent's exit functions, too
        say("\n".join(f"bnfast: {line}" for line in [*patcher.summary(), *patcher.too_few_updates()]))


def _split(command_line: Sequence[str]) -> tuple[Options, list[str]]:
    """The options of `bnfast run`, and the command: the script or module name with its own arguments."""
    options, words = Options(), list(command_line)
    while words and words[0].startswith("-") and words[0] != "-" and not options.module:
        word, _, value = words.pop(0).partition("=")
        if word == "--":
            break
        name = {"-h": "help", "-m": "module"}.get(word, word.removeprefix("--").replace("-", "_"))
        if word == "--steps":
            options.steps = _steps(value or (words.pop(0) if words else ""))
        elif not hasattr(options, name) or value or word == "--module":
            raise UserError(f"run: unknown option {word}. usage: {USAGE}")
        else:
            setattr(options, name, True)
    for given, name in ((options.steps, "--steps"), (options.in_place, "--in-place"), (options.json, "--json")):
        if given and not options.compare:
            raise UserError(f"run: {name} needs --compare. usage: {USAGE}")
    return options, words


def _steps(text: str) -> int:
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"run: argument --steps: {error}") from error


def legacy_keras() -> str | None:
    """Says that the script uses Keras 2, and why, if it does and Keras 3 isn't imported, too."""
    if "tf_keras" not in sys.modules or "keras" in sys.modules:
        return None
    value = os.environ.get("TF_USE_LEGACY_KERAS", "")
    why = f" because TF_USE_LEGACY_KERAS={value}" if value.lower() in ("1", "true") else ""
    return f"tf_keras is in use{why}, and is not Keras 3"


class Patcher:
    """Patches Keras, and knows what came of it."""

    def __init__(self) -> None:
        self.reason: str | None = "the script didn't import Keras"  # why Keras is not patched; None: it is

    def patch(self) -> None:
        """To be called once Keras is imported."""
        try:
            import keras

            if keras.backend.backend() not in ("tensorflow", "torch", "jax"):
                self.reason = f"Keras runs on {keras.backend.backend()}"
                return
            import bnfast.keras

            bnfast.keras.patch()
            updates.install()
            if "tensorflow" in sys.modules:
                tf_layers.install()
            self.reason = None
        except Exception as error:  # the script must run all the same
            self.reason = f"{type(error).__name__}: {error}"

    def summary(self) -> list[str]:
        """The lines to print at the end: how many layers ran on what, or why nothing was replaced."""
        if self.reason is not None:
            reason = self.reason if (legacy := legacy_keras()) is None else legacy
            lines = [f"nothing was replaced: {reason}"]
        else:
            from bnfast.keras.models.patch import made, summary

            lines = tf_layers.summary()
            if made or not lines:
                lines = [*summary().splitlines(), *lines]
        if not sys.modules.keys().isdisjoint(STARTERS):
            lines.append("processes that multiprocessing spawned aren't covered: Keras's own layer runs there")
        return lines

    def too_few_updates(self) -> list[str]:
        """A line for the end of a whole training, if it was too short for the momentum."""
        if self.reason is not None:
            return []
        from bnfast.keras.models.patch import made

        return updates.too_few([entry.momentum for entry in made if isinstance(entry.momentum, float)])
