"""The command line: one module a command.

Results go to standard output; progress and errors go to standard error. An error on the user's side is one
line and exit status 2, a demo whose result is wrong is exit status 1. torch is imported by the commands
that need it, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence

from fxpasses.cli import bisect, demo, diff, explain, export, rules, tune
from fxpasses.errors import FxpassesError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments after the command's name; None for those of this process.

    Returns:
        The exit status: 0; 1 where the demo's result is wrong, or a difference is one to fail on; 2 after an
        error on the user's side; 130 and 141, as shells have it, where the user or the reader of the output
        broke it off.
    """
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        status = run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has had enough; nothing is left to be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        found = _user_error(error)
        if found is None:
            raise
        print(f"fxpasses: error: {' '.join(str(found).split())}", file=sys.stderr)
        return 2
    return status


def _user_error(error: BaseException | None) -> FxpassesError | None:
    """Our error in what was raised; Dynamo hands on what a backend raises as its `inner_exception`."""
    while error is not None and not isinstance(error, FxpassesError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    return error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxpasses", description="Graph passes for torch.compile that can be seen, counted and trusted."
    )
    parser.add_argument("--version", action=_Version, help="print the versions of fxpasses and torch")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (demo, explain, diff, export, tune, bisect, rules):
        command.add_command(commands)
    return parser


class _Version(argparse.Action):
    """Prints the versions, read when asked for."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:  # noqa: A002  argparse's name
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        versions = {name: importlib.metadata.version(name) for name in ("fxpasses", "torch")}
        print(f"fxpasses {versions['fxpasses']} (torch {versions['torch']})")
        parser.exit()
