"""`fxpasses bisect COMMAND`: finds the one rewrite that makes a command fail."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fxpasses.errors import BisectError

if TYPE_CHECKING:
    from fxpasses.cli.console import Commands


def add_command(commands: Commands) -> None:
    """Adds the command to the parser's."""
    parser = commands.add_parser(
        "bisect",
        help="find the one rewrite that makes a command fail",
        description="Runs a command under limits on the number of rewrites, which finds the one that makes "
        "it fail in at most log2(n) + 2 runs. A command fails when it exits with another status than 0.",
    )
    parser.add_argument("--repro", type=Path, metavar="DIR", help="save the rewrite as a test file in DIR")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="the check: it fails when it exits non-zero"
    )
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """The command on parsed arguments; 0 when the rewrite was found.

    Raises:
        BisectError: there is none to find.
    """
    from rich.console import Console

    from fxpasses.cli.bisection import bisect

    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        raise BisectError("give a command that fails, such as: fxpasses bisect python check.py")
    found = bisect(command, given.repro)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(f"Rewrite {found.number} of {found.total} breaks the command ({found.runs} runs):")
    console.print(str(found.remark))
    if found.repro is not None:
        console.print(f"saved as {found.repro}")
    return 0
