"""What each part of fxpasses is worth: `python -m benchmarks.ablation --help`.

Exit status: 0; 2 where the arguments are wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.models.cases import DTYPES, Case
from benchmarks.models.parts import MODES, Part, is_wanted, parts_of, variants_of
from benchmarks.models.progress import shown_progress
from benchmarks.models.reporting import describe_settings, format_ratio
from benchmarks.models.results import Report
from benchmarks.models.suite import Suite, check_models, run_suite
from benchmarks.models.variants import VariantError
from benchmarks.models.worth import (
    Ablation,
    Comparison,
    load_ablation,
    save_ablation,
    uncounted,
    worths,
)
from benchmarks.shared.commands import refuse
from benchmarks.shared.environment import check_device, comparable, environment_block, physical_cores
from fxpasses.errors import FxpassesError

_DESCRIPTION = """\
Leaves each rule, pass and option of fxpasses out in turn and prints what it was worth: beside the others (the
time without it over the time of the full set) and alone (the time of nothing over the time of it alone).
Above 1 it pays; inconclusive where the interval straddles 1. Variants are timed in turns, as by
benchmarks.models. A part that was applied nowhere in a model is not timed on it.
"""
_EPILOG = """\
With --json each model is written as soon as it is measured, and a run goes on where the file ended: so
--minutes 15, called again until nothing is left, is one measurement in pieces. Another revision, machine or
setting needs another file.
"""


@dataclass(frozen=True)
class Task:
    """One model in one mode; the settings are those of the mode's report."""

    mode: str
    suite: Suite
    settings: Mapping[str, object]

    @property
    def model(self) -> str:
        """The model's name."""
        return self.suite.models[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    console, errors = Console(), Console(stderr=True)
    if not console.is_terminal:
        console = Console(width=200)  # a file or a pipe has no width of its own
    try:
        tasks = plan(given)
        ablation = _begun(given, tasks)
        left = [task for task in tasks if not ablation.has(task.mode, task.model)]
        if left:
            check_models(replace(left[0].suite, models=tuple(dict.fromkeys(task.model for task in left))))
    except FxpassesError as error:
        refuse(parser, str(error))
    for task in in_time(left, given.minutes):
        with shown_progress(errors, task.suite.units_of_work) as progress:
            progress(f"{task.mode}: {task.model}")
            (result,) = run_suite(task.suite, progress)
        ablation = ablation.with_model(task.mode, task.settings, result)
        if given.json:
            save_ablation(ablation, given.json)
    for report in ablation.reports.values():
        print_worths(report, console)
    for task in left:
        if not ablation.has(task.mode, task.model):
            console.print(f"{task.mode}: {task.model} is left: the time was over. Run the command again.")
    return 0


def in_time(
    tasks: Sequence[Task], minutes: float | None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Task]:
    """The tasks, as long as one more, no longer than the longest so far, would end within `minutes`."""
    start = before = clock()
    longest = 0.0
    for task in tasks:
        if minutes is not None and longest and before - start + longest > 60 * minutes:
            return
        yield task
        longest, before = max(longest, clock() - before), clock()


def print_worths(report: Report, console: Console) -> None:
    """A table of one mode, what of it was wrong, and what no part covers."""
    table = Table(title=f"{report.settings['ablation']}: {describe_settings(report)}", title_justify="left")
    trains = report.settings["mode"] != "inference"
    table.add_column("part", overflow="fold")
    headers = ["applied", "models", "beside the others", "alone"]
    headers += ["saves MiB beside", "saves MiB alone"] if trains else []
    for header in (*headers, *(model.model for model in report.models)):
        table.add_column(escape(header), justify="right")
    missing: dict[str, None] = {}
    for worth in worths(report):
        compared = (worth.beside, worth.alone)
        cells = ["-" if worth.applied is None else str(worth.applied), str(len(worth.beside.models))]
        cells += [format_ratio(comparison.ratio) for comparison in compared]
        cells += [_mebibytes(comparison) for comparison in compared] if trains else []
        cells += [format_ratio(worth.beside.models.get(model.model)) for model in report.models]
        table.add_row(*(escape(cell) for cell in (worth.part.name, *cells)))
        missing |= dict.fromkeys(reason for comparison in compared for reason in comparison.missing.values())
    console.print(table)
    if others := uncounted(report):
        counts = ", ".join(f"{name} {count}" for name, count in others.items())
        console.print(escape(f"applied too, and no option leaves it out by itself: {counts}"))
    for reason in missing:
        console.print(escape(reason), soft_wrap=True)


def plan(given: argparse.Namespace) -> list[Task]:
    """A task for each mode and model, in the order in which they are run.

    Raises:
        FxpassesError: an argument that does not fit.
    """
    check_device(given.device)
    names, models, modes = (_names(text) for text in (given.leave_out, given.models, given.modes))
    if not models or not modes:
        raise VariantError("--models and --modes must each name one or more.")
    if min(given.rounds, given.launches, given.at_once) < 1:
        raise VariantError("--rounds, --launches and --at-once must be 1 or more.")
    if given.json and not given.json.resolve().parent.is_dir():
        raise VariantError(f"{given.json}: its folder does not exist; create it first.")
    return [task for mode in modes for task in _tasks_of(mode, given, models, parts_of(mode, names))]


def _tasks_of(
    mode: str, given: argparse.Namespace, models: Sequence[str], parts: Sequence[Part]
) -> list[Task]:
    case = Case(
        "",
        mode=MODES[mode],
        batch=given.batch or (1 if MODES[mode] == "inference" else 8),
        size=given.size,
        dtype=given.dtype,
        device=given.device,
        threads=given.threads or physical_cores(),
        seed=given.seed,
    )
    settings = case.to_json() | {
        "ablation": mode,
        "rounds": given.rounds,
        "launches": given.launches,
        "alone": not given.no_alone,
        "parts": [vars(part) for part in parts],
    }
    del settings["model"]
    suite = Suite(
        case,
        models=(),
        variants=variants_of(mode, parts, alone=not given.no_alone),
        rounds=given.rounds,
        launches=given.launches,
        at_once=given.at_once,
        shares_caches=True,
        wanted=partial(is_wanted, parts),
    )
    return [Task(mode, replace(suite, models=(model,)), settings) for model in models]


def _begun(given: argparse.Namespace, tasks: Sequence[Task]) -> Ablation:
    """What --json holds already; an ablation without a model where there is no such file.

    Raises:
        FxpassesError: it is of another machine, revision or setting.
    """
    environment = environment_block(given.device)
    if given.json is None or not given.json.exists():
        return Ablation(environment, {})
    found = load_ablation(given.json)
    differences = comparable(found.environment, environment)
    if found.environment.get("revision") != environment["revision"]:
        differences.append(f"revision: {found.environment.get('revision')} against {environment['revision']}")
    for task in tasks:
        before = found.reports[task.mode].settings if task.mode in found.reports else task.settings
        differences += [
            f"{task.mode}, {name}: {before.get(name)!r} against {value!r}"
            for name, value in task.settings.items()
            if before.get(name) != value
        ]
    if differences:
        listed = "; ".join(dict.fromkeys(differences))
        raise VariantError(f"{given.json}: cannot be gone on with ({listed}). Name another file.")
    return found


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _mebibytes(comparison: Comparison) -> str:
    return "-" if comparison.saved_bytes is None else f"{comparison.saved_bytes / 2**20:.1f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    models, modes = "resnet18,mobilenetv2_100,repvgg_a0,convnext_atto", ",".join(MODES)
    add("--models", default=models, help=f"default: {models}")
    add("--modes", default=modes, help=f"default: {modes}")
    add(
        "--leave-out",
        default="",
        metavar="NAMES",
        help="rules, passes, layout, memory, weights; default: all that are on",
    )
    add("--no-alone", action="store_true", help="only beside the others: about half the time")
    add("--batch", type=int, help="default: 1 in inference, 8 in training")
    add("--size", type=int, default=224, help="height and width, or tokens; default: 224")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="default: float32")
    add("--device", default="cpu", help="default: cpu")
    add("--rounds", type=int, default=12, help="turns of each variant; default: 12")
    add("--launches", type=int, default=2, help="processes of each, which share the rounds; default: 2")
    add(
        "--at-once",
        type=int,
        default=1,
        metavar="N",
        help="variants that compile at the same time; default: 1, as cached weights choose kernels by time",
    )
    add("--threads", type=int, help="default: the physical cores")
    add("--seed", type=int, default=0, help="of parameters and inputs; default: 0")
    add("--minutes", type=float, help="begin no model that would end later; default: no limit")
    add("--json", type=Path, metavar="FILE", help="go on where FILE ended, and write it after each model")
    return parser


if __name__ == "__main__":
    sys.exit(main())
