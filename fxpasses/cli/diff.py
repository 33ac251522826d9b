"""`fxpasses diff BEFORE AFTER`: which rewrites were lost or gained, and what that costs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from fxpasses.errors import FxpassesError

if TYPE_CHECKING:
    from fxpasses.cli.console import Commands
    from fxpasses.report.diff import Difference
    from fxpasses.report.report import Report

DIFF_HELP = """\
Compares two reports, as `report.save(FILE)` or `fxpasses explain --json` write them.

With --fail-on the exit status is 1 where the second is worse in what is named: a rewrite was lost, the layout
plan is predicted to be slower (by more than a hundredth) or makes more copies, or rewrites save fewer bytes
of what is kept for the backward pass.
"""

KINDS = ("lost", "slower", "copies", "saved")


def add_command(commands: Commands) -> None:
    """Adds the command to the parser's."""
    diff = commands.add_parser(
        "diff",
        help="compare two reports: rewrites lost and gained, copies, predicted time",
        description=DIFF_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    diff.add_argument("before", type=Path, metavar="BEFORE", help="the report before a change, as JSON")
    diff.add_argument("after", type=Path, metavar="AFTER", help="the report after it")
    diff.add_argument("--json", action="store_true", help="print the difference as JSON")
    diff.add_argument(
        "--fail-on", action="extend", nargs="+", default=[], choices=KINDS, help="what is exit status 1"
    )
    diff.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compares the reports and prints the difference."""
    from fxpasses.report.diff import Difference

    found = Difference.of(_read(arguments.before), _read(arguments.after))
    worse = [kind for kind in dict.fromkeys(arguments.fail_on) if _is_worse(found, kind)]
    if arguments.json:
        print(json.dumps({**found.to_dict(), "worse": worse}, indent=2))
    else:
        print(found)
        if worse:
            print(f"worse: {', '.join(worse)}")
    return int(bool(worse))


def _read(path: Path) -> Report:
    from fxpasses.report.report import Report

    try:
        return Report.load(path)
    except OSError as error:
        raise FxpassesError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise FxpassesError(f"{path} is {error}.") from error


def _is_worse(found: Difference, kind: str) -> bool:
    """Whether the second report is worse in one of `KINDS`."""
    if kind == "lost":
        return bool(found.lost)
    if kind == "saved":
        return found.saved_bytes[1] < found.saved_bytes[0]
    pair = found.seconds if kind == "slower" else found.copies
    if pair is None:
        raise FxpassesError(
            f"--fail-on {kind} cannot be told: a report has no layout plan, or their costs "
            "come from two sources."
        )
    return found.slower if kind == "slower" else pair[1] > pair[0]
