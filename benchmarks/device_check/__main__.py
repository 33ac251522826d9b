"""The command: `python -m benchmarks.device_check --help`.

Exit status: 0; 1 where a bar is missed or nothing is known of it; 2 where the arguments are wrong.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.device_check.bars import Bar
from benchmarks.device_check.plan import STAGES, on_a_gpu, rehearsal, runs_of
from benchmarks.device_check.running import FILE, Check, Outcome
from benchmarks.shared.commands import refuse
from benchmarks.shared.environment import UnavailableDeviceError, check_device, environment_block
from fxpasses.errors import FxpassesError

_LIMITS = (150.0, 330.0, 60.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints each run as it ends, then the bars."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device_check",
        description="What a GPU says of fxpasses: its tests, its speed, its memory; written as it is found.",
    )
    parser.add_argument("--out", type=Path, required=True, help=f"the folder of {FILE}, made if need be")
    parser.add_argument("--rehearse", action="store_true", help="with tiny networks, on a CPU")
    parser.add_argument(
        "--seconds", type=float, nargs=3, default=_LIMITS, metavar=tuple(STAGES), help="limits of the stages"
    )
    given = parser.parse_args(arguments)
    limits = tuple(given.seconds)
    setting = rehearsal() if given.rehearse else on_a_gpu()
    try:
        if min(limits) < 0:
            raise FxpassesError("--seconds takes three numbers from 0 up.")
        check_device(setting.device)
        given.out.mkdir(parents=True, exist_ok=True)
    except UnavailableDeviceError as error:
        refuse(parser, f"{error} --rehearse runs on a CPU.")
    except (FxpassesError, OSError) as error:
        refuse(parser, str(error))
    # What is measured of the device is measured anew, and comes back with the rest.
    os.environ["FXPASSES_PROFILE_DIR"] = str(given.out.resolve() / "profiles")
    console = Console(width=120)
    check = Check(runs_of(setting, given.out.resolve()), given.out, environment_block(setting.device))
    check.go(limits, lambda outcome: _say(outcome, console))
    console.print(_table(check.bars))
    return 0 if all(bar.holds for bar in check.bars) else 1


def _say(outcome: Outcome, console: Console) -> None:
    console.print(f"{outcome.status:>10}  {outcome.seconds:5.0f} s  {outcome.run.name}", highlight=False)
    if outcome.status == "failed" and outcome.run.stage == "tests":
        console.print(outcome.tail, markup=False, highlight=False)


def _table(bars: Sequence[Bar]) -> Table:
    table = Table("bar", "figure", "holds", "of", box=box.SIMPLE_HEAD)
    for bar in bars:
        figure = "" if bar.figure is None else f"{bar.figure:.3f}"
        holds = {None: "not known", True: "yes", False: "no"}[bar.holds]
        table.add_row(bar.asked, figure, holds, str(bar.over))
    return table


if __name__ == "__main__":
    raise SystemExit(main())
