"""Where the time goes, layer by layer, ours against others': `python -m benchmarks.kernel_time --help`.

Each runtime has a process of its own (`benchmarks.layers.worker`); they take turns. A turn is some calls that
are timed as a whole and as many that are profiled. Exit status: 0; 1 where a runtime failed on a model; 2
where the arguments are wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from benchmarks.layers.messages import Describe, Description, Finish, Prepare, TakeTurn
from benchmarks.layers.peak import Peaks
from benchmarks.layers.report import print_failures, print_frequent, print_model, to_json
from benchmarks.layers.runtimes import OURS, RUNTIMES
from benchmarks.layers.table import Measured, ModelTable, table_of
from benchmarks.models.arguments import add_models, models_of, say_what_is_left_out
from benchmarks.models.cases import Case
from benchmarks.models.progress import shown_progress
from benchmarks.models.suite import Progress
from benchmarks.models.workers import Worker, WorkerError, time_in_rounds
from benchmarks.shared.commands import refuse
from benchmarks.shared.environment import environment_block, physical_cores
from fxpasses.errors import FxpassesError, unknown_name

_DESCRIPTION = """\
What each layer of a model takes with weights="cached", in inductor frozen (oneDNN), in ONNX Runtime and in
OpenVINO, by the profile of each. Layers are matched by the names of their weights where a profile has names,
else by sizes and order (benchmarks/layers/matching.py); what is not certain is not matched. Layers that one
runtime computes at once are one row. Each step of our sequences is timed, by kernels compiled for that; the
convolutions of a chain, which are made in turns, share its time by what threads spent in each.
"""
_EPILOG = """\
"of peak": operations a second, ours / the better peer's, over the most that was measured here, of a loop of
nothing else, a large matrix product or a 3x3 convolution. "of bandwidth": bytes of image, weight and result,
each once, a second, over a large copy's; more than 100% where they were in a cache. "outside": the whole call
less its parts.

--vectors limits torch and oneDNN (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA), also the oneDNN in OpenVINO. ONNX
Runtime has no such setting.
"""
_VECTORS = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
}
_MODULE = "benchmarks.layers.worker"
_MOST, _FREQUENT = 10, 20


class KernelTimeError(FxpassesError, ValueError):
    """An argument that does not do."""


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Attributes:
        case: of every model but for its name.
        models: their specifications.
        runtimes: which.
        rounds: turns of each.
        environment: variables of their processes.
    """

    case: Case
    models: tuple[str, ...]
    runtimes: tuple[str, ...]
    rounds: int
    environment: dict[str, str]

    @property
    def units_of_work(self) -> int:
        """What `done` of the progress adds up to."""
        return len(self.models) * (1 + len(self.runtimes) + self.rounds)

    def worker(self, cache: Path) -> Worker:
        """A process."""
        return Worker(threads=self.case.threads, cache=cache, environment=self.environment, module=_MODULE)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    console, errors = Console(), Console(stderr=True)
    if not console.is_terminal:
        console = Console(width=180)  # a file or a pipe has no width of its own
    try:
        plan = _plan(given)
    except FxpassesError as error:
        refuse(parser, str(error))
    say_what_is_left_out(given, errors)
    environment = environment_block("cpu")
    tables: list[ModelTable] = []
    peaks: Peaks | None = None
    with shown_progress(errors, plan.units_of_work) as progress:
        for model in plan.models:
            table, measured = _measure(plan, model, progress)
            tables.append(table)
            if measured is not None:
                peaks = measured if peaks is None else peaks.best_with(measured)
                print_model(table, plan.runtimes, peaks, console, _MOST)
            print_failures(table, console)
    if peaks is not None:
        if len(tables) > 1:
            print_frequent(tables, plan.runtimes, peaks, console, _FREQUENT)
        if given.json:
            settings = plan.case.to_json() | {
                "rounds": plan.rounds,
                "vectors": given.vectors,
                "runtimes": plan.runtimes,
            }
            del settings["model"]
            content = {"kind": "kernel_time", "schema": 1, "environment": environment, "settings": settings}
            text = json.dumps(content | to_json(tables, peaks), indent=None, separators=(",", ":"))
            given.json.write_text(text.replace('{"sizes"', '\n{"sizes"') + "\n", encoding="utf-8")
    return 1 if any(table.failures for table in tables) else 0


def _measure(plan: Plan, model: str, progress: Progress) -> tuple[ModelTable, Peaks | None]:
    """One model in all runtimes, and the peaks of the machine; None where the model itself fails."""
    case = replace(plan.case, model=model)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = str(Path(folder) / "model.onnx")
        progress(f"{model}: exporting")
        try:
            with plan.worker(Path(folder) / "caches") as worker:
                told = worker.request(Describe(case, path))
        except WorkerError as error:
            progress(model, 1 + len(plan.runtimes) + plan.rounds)
            return ModelTable(model, failures=dict.fromkeys(plan.runtimes, str(error))), None
        assert isinstance(told, Description)
        workers: dict[str, Worker] = {}
        failures: dict[str, str] = {}
        for runtime in plan.runtimes:
            progress(f"{model}: {runtime}: compiling", 1)
            worker = stack.enter_context(plan.worker(Path(folder) / f"caches-{runtime}"))
            try:
                worker.request(Prepare(case, runtime, path, told.layers))
                workers[runtime] = worker
            except WorkerError as error:
                failures[runtime] = str(error)
        progress(f"{model}: in turns", 1)
        wholes, failed = time_in_rounds(
            workers, TakeTurn(), plan.rounds, after_round=lambda: progress(f"{model}: in turns", 1)
        )
        measured = {name: Measured(failure=why) for name, why in (failures | failed).items()}
        for runtime, seconds in wholes.items():
            measured[runtime] = _finished(workers[runtime], seconds)
        return table_of(model, told.layers, measured), told.peaks


def _finished(worker: Worker, seconds: Sequence[float]) -> Measured:
    try:
        turns = worker.request(Finish())
    except WorkerError as error:
        return Measured(failure=str(error))
    assert isinstance(turns, list)
    return Measured(tuple(seconds), tuple(turns))


def _plan(given: argparse.Namespace) -> Plan:
    """What the arguments ask for, checked as far as it can be without running anything."""
    case = Case(
        "", batch=given.batch, size=given.size, threads=given.threads or physical_cores(), seed=given.seed
    )
    runtimes = tuple(dict.fromkeys(name.strip() for name in given.runtimes.split(",")))
    for name in runtimes:
        if name not in RUNTIMES:
            raise KernelTimeError(unknown_name("runtime", name, RUNTIMES))
    if OURS not in runtimes:
        raise KernelTimeError(f"--runtimes must have {OURS}, which the others are compared with.")
    if given.rounds < 1:
        raise KernelTimeError(f"--rounds {given.rounds} measures nothing; write 1 or more.")
    if given.json and not given.json.resolve().parent.is_dir():
        raise KernelTimeError(f"{given.json}: its folder does not exist; create it first.")
    environment = {} if given.vectors is None else _VECTORS[given.vectors]
    return Plan(case, models_of(given), runtimes, given.rounds, environment)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_time",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_models(parser)
    add("--batch", type=int, default=1, help="default: 1")
    add("--size", type=int, default=224, help="height and width; default: 224")
    add("--threads", type=int, help="default: the physical cores")
    add("--seed", type=int, default=0, help="of parameters and inputs; default: 0")
    add("--vectors", choices=tuple(_VECTORS), help="the longest that are used; default: the CPU's")
    add("--runtimes", default=",".join(RUNTIMES), help=f"default: {','.join(RUNTIMES)}")
    add("--rounds", type=int, default=8, help="turns of each runtime; default: 8")
    add("--json", type=Path, metavar="FILE", help="write all rows, and the totals")
    return parser


if __name__ == "__main__":
    sys.exit(main())
