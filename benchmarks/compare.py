"""Two result files of `benchmarks.models`: `python -m benchmarks.compare BEFORE.json AFTER.json --help`.

    ratio = time before / time after          above 1: AFTER is faster

The two runs share no rounds, so the ratio is that of the medians, with a two-sample bootstrap interval that
knows of the spread inside each run, and not of a machine that was slower on one of the days. Where both
files hold a variant that did not change between them, such as eager, `--relative-to eager` compares
the ratios to it instead, round by round, from which such a drift cancels.

With a threshold t: *regression* where the whole interval lies below 1/(1+t), *improvement* where it lies
above 1+t, *unchanged* where it lies between the two, *inconclusive* otherwise. Bytes saved for backward are
deterministic and compared as they are. A variant that was right and now is wrong or fails is a regression.

Exit status: 0; 1 on a regression; 2 where the files cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.models.reporting import describe_settings
from benchmarks.models.results import (
    ModelResult,
    NoFigureError,
    Report,
    ResultsError,
    VariantResult,
    load_report,
)
from benchmarks.shared.environment import comparable
from benchmarks.shared.statistics import Ratio, unpaired_ratio
from fxpasses.errors import FxpassesError

Verdict = Literal["regression", "improvement", "unchanged", "inconclusive", "not compared"]

_SAME_CASE = ("mode", "batch", "size", "dtype", "device", "dynamic", "threads")
_COLOURS = {"regression": "red", "improvement": "green"}


@dataclass(frozen=True)
class Change:
    """What became of one variant of one model.

    Attributes:
        model: its name.
        variant: its name.
        quantity: ``"time"``, ``"saved bytes"`` or ``"status"``.
        ratio: before over after; None where a side has no figure.
        verdict: see the module's docstring.
        note: why there is no ratio, or what else to know.
    """

    model: str
    variant: str
    quantity: str
    ratio: Ratio | None
    verdict: Verdict
    note: str = ""


def compare_reports(
    before: Report, after: Report, threshold: float, relative_to: str | None = None
) -> tuple[Change, ...]:
    """The changes of every model and variant that one of the two files has.

    Args:
        before: the older run.
        after: the newer one.
        threshold: the relative change that matters, such as 0.03.
        relative_to: a variant of both by whose time every time is divided, round by round.

    Raises:
        ResultsError: the runs measured different cases, or have no model and variant in common.
    """
    for name in _SAME_CASE:
        if before.settings.get(name) != after.settings.get(name):
            found = f"{before.settings.get(name)!r} against {after.settings.get(name)!r}"
            raise ResultsError(f"the files measured different cases: {name} is {found}.")
    changes: list[Change] = []
    old, new = ({model.model: model for model in report.models} for report in (before, after))
    for name in dict.fromkeys([*old, *new]):
        if name in old and name in new:
            changes += _compare_models(old[name], new[name], threshold, relative_to)
        else:
            side = "BEFORE" if name in old else "AFTER"
            changes.append(Change(name, "", "status", None, "not compared", f"only in {side}"))
    if not any(change.quantity != "status" or change.verdict == "regression" for change in changes):
        raise ResultsError("the files have no model and variant in common that ran in both.")
    return tuple(changes)


def judge(ratio: Ratio, threshold: float) -> Verdict:
    """What the interval of a ratio before/after allows to say at a threshold."""
    if ratio.low is None or ratio.high is None:
        return "inconclusive"
    worst, best = 1.0 / (1.0 + threshold), 1.0 + threshold
    if ratio.high < worst:
        return "regression"
    if ratio.low > best:
        return "improvement"
    return "unchanged" if worst <= ratio.low and ratio.high <= best else "inconclusive"


def _compare_models(
    old: ModelResult, new: ModelResult, threshold: float, relative_to: str | None
) -> list[Change]:
    changes = []
    olds, news = ({variant.name: variant for variant in model.variants} for model in (old, new))
    for name in dict.fromkeys([*olds, *news]):
        if name not in olds or name not in news:
            side = "BEFORE" if name in olds else "AFTER"
            changes.append(Change(old.model, name, "status", None, "not compared", f"only in {side}"))
            continue
        change = _compare_status(old.model, olds[name], news[name])
        if change is not None:
            changes.append(change)
            continue
        if olds[name].seconds and news[name].seconds and name != relative_to:
            changes.append(_compare_times(old, new, name, threshold, relative_to))
        saved = (olds[name].saved_bytes, news[name].saved_bytes)
        if saved[0] is not None and saved[1] is not None:
            changes.append(_compare_bytes(old.model, name, saved[0], saved[1], threshold))
    return changes


def _compare_status(model: str, old: VariantResult, new: VariantResult) -> Change | None:
    if old.status == new.status == "ok":
        return None
    note = f"{old.status} before, {new.status} after"
    if new.status != "ok" and new.message:
        note += f": {new.message}"
    broke = old.status == "ok"
    return Change(model, new.name, "status", None, "regression" if broke else "not compared", note)


def _compare_times(
    old: ModelResult, new: ModelResult, name: str, threshold: float, relative_to: str | None
) -> Change:
    try:
        ratio = unpaired_ratio(
            _times(new, name, relative_to),
            _times(old, name, relative_to),
            launches=(new.launches or None, old.launches or None),
        )
    except NoFigureError as error:
        return Change(old.model, name, "time", None, "not compared", str(error))
    note = "" if relative_to is None else f"relative to {relative_to}"
    return Change(old.model, name, "time", ratio, judge(ratio, threshold), note)


def _times(model: ModelResult, name: str, relative_to: str | None) -> list[float]:
    seconds = model.seconds(name)
    if relative_to is None:
        return list(seconds)
    return [own / base for own, base in zip(seconds, model.seconds(relative_to), strict=True)]


def _compare_bytes(model: str, name: str, old: int, new: int, threshold: float) -> Change:
    if new == 0:
        verdict: Verdict = "unchanged" if old == 0 else "improvement"
        return Change(model, name, "saved bytes", None, verdict, f"{old} before, 0 after")
    value = old / new
    ratio = Ratio(value, value, value, 1)
    return Change(model, name, "saved bytes", ratio, judge(ratio, threshold), f"{old} before, {new} after")


def print_changes(changes: Sequence[Change], title: str, console: Console) -> None:
    """A table with one line for each change."""
    table = Table(title=escape(title), title_justify="left")
    for header in ("model", "variant", "quantity"):
        table.add_column(header, overflow="fold")
    table.add_column("before / after", justify="right")
    table.add_column("verdict")
    table.add_column("note", overflow="fold")
    for change in changes:
        colour = _COLOURS.get(change.verdict, "")
        verdict = f"[{colour}]{change.verdict}[/{colour}]" if colour else change.verdict
        cells = (change.model, change.variant, change.quantity, _cell(change))
        table.add_row(*(escape(cell) for cell in cells), verdict, escape(change.note))
    console.print(table)


def _cell(change: Change) -> str:
    ratio = change.ratio
    if ratio is None:
        return "-"
    if change.quantity != "time":
        return f"{ratio.value:.3f}"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f} (n={ratio.n})"
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path, metavar="BEFORE.json")
    parser.add_argument("after", type=Path, metavar="AFTER.json")
    parser.add_argument(
        "--threshold", type=float, default=0.03, help="the change that matters; default: 0.03"
    )
    parser.add_argument("--relative-to", metavar="VARIANT", help="compare ratios to a variant of both files")
    given = parser.parse_args(arguments)
    if not given.threshold >= 0:
        parser.error(f"--threshold {given.threshold} must be 0 or more")
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file or a pipe has no width of its own
    try:
        before, after = load_report(given.before), load_report(given.after)
        changes = compare_reports(before, after, given.threshold, given.relative_to)
    except FxpassesError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    for difference in comparable(before.environment, after.environment):
        console.print(f"[yellow]different machines[/yellow]: {escape(difference)}", soft_wrap=True)
    title = (
        f"{describe_settings(before)}: {given.before} against {given.after}, threshold {given.threshold:g}"
    )
    print_changes(changes, title, console)
    regressions = sum(change.verdict == "regression" for change in changes)
    console.print(f"{regressions} regressions among {len(changes)} comparisons")
    return 1 if regressions else 0


if __name__ == "__main__":
    sys.exit(main())
