"""The command `bnfast`. Each subcommand is a module with a function `register(subparsers)`.

A subcommand sets its function with `parser.set_defaults(run=...)`. The function takes the parsed arguments and returns
the exit status. It imports packages other than NumPy inside its functions, so that `import bnfast.cli` stays light.
Exit status: 0 done, 2 the request cannot be met (one line on stderr gives the reason), 130 interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from bnfast.cli import bench, demo, diagnose, info, output, recalibrate, run
from bnfast.cli.errors import UserError

COMMANDS = (info, demo, bench, run, diagnose, recalibrate)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose help is an error if it can't be written."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def print_help(self, file: Any = None) -> None:
        output.show(self.format_help().removesuffix("\n"))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line, with all subcommands."""
    parser = Parser(prog="bnfast", description="Batch normalization on the CPU.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bnfast` with `argv` (default: the arguments of the process) and return the exit status."""
    try:
        return _run(build_parser(), argv)
    except UserError as error:
        output.say(f"bnfast: {error}")
        return 2
    except KeyboardInterrupt:
        output.say("bnfast: interrupted")
        return 130


def _run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as exit_request:  # --help
        return int(exit_request.code or 0)
    if arguments.version:
        output.show(f"bnfast {info.version()}")
        return 0
    if not hasattr(arguments, "run"):
        output.say(parser.format_help().removesuffix("\n"))
        return 2
    if arguments.run is run.run:  # everything from here on is the script's
        return int(arguments.run(arguments))
    output.occupy_closed_descriptors()
    try:
        return int(arguments.run(arguments))
    except OSError as error:
        raise UserError(error) from error
    except MemoryError as error:
        raise UserError(f"out of memory: {error}") from error
