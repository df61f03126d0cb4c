"""The command `bnfast`. Each subcommand is a module with a function `register(subparsers)`.

A subcommand sets its function with `parser.set_defaults(run=...)`. The function takes the parsed arguments and returns
the exit status. It imports packages other than NumPy inside its functions, so that `import bnfast.cli` stays light.
Exit status: 0 done, 2 the request cannot be met (one line on stderr gives the reason), 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bnfast.cli import bench, demo, info, run
from bnfast.cli.errors import UserError

COMMANDS = (info, demo, bench, run)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line, with all subcommands."""
    parser = argparse.ArgumentParser(prog="bnfast", description="Batch normalization on the CPU.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bnfast` with `argv` (default: the arguments of the process) and return the exit status."""
    parser = build_parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as exit_request:  # argparse: 0 after --help, 2 after a bad argument
        return int(exit_request.code or 0)
    if arguments.version:
        print(f"bnfast {info.version()}")
        return 0
    if not hasattr(arguments, "run"):
        parser.print_help(sys.stderr)
        return 2
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"bnfast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bnfast: interrupted", file=sys.stderr)
        return 130
