"""A run over models and variants: references, workers, turns, results.

For each model a process of its own computes the float64 reference. Then, in each launch, every variant starts
a worker, compiles alone on the machine and is checked, and the workers that are right share out the launch's
rounds in turns. The first launch compiles with empty caches, the later ones with those that it left. A model
or variant that fails leaves a result that says so, and the rest goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from benchmarks.cases import Case
from benchmarks.messages import CheckModels, MakeReference, Prepare, Prepared, TakeTurn
from benchmarks.results import ModelResult, VariantResult
from benchmarks.variants import Variant
from benchmarks.workers import Worker, WorkerError, take_turns


class Progress(Protocol):
    """Is told what happens."""

    def __call__(self, text: str, done: int = 0) -> None:
        """Work on `text` begins, and `done` units of work are over."""


@dataclass(frozen=True)
class Suite:
    """What to run.

    Attributes:
        case: of every model but for its name.
        models: names.
        variants: in the order of the tables.
        rounds: turns of every variant, in all launches together.
        launches: processes of every variant, one after the other.
        only_saved_bytes: whether to run one unchecked forward and nothing else.
    """

    case: Case
    models: tuple[str, ...]
    variants: tuple[Variant, ...]
    rounds: int = 20
    launches: int = 2
    only_saved_bytes: bool = False

    @property
    def rounds_of_launches(self) -> tuple[int, ...]:
        """The rounds of each launch, shared out evenly; a launch without a round does not happen."""
        if self.only_saved_bytes:
            return (0,)
        launches = min(self.launches, self.rounds)
        return tuple(self.rounds // launches + (each < self.rounds % launches) for each in range(launches))

    @property
    def units_of_work(self) -> int:
        """What `done` of the progress adds up to: one a reference, one a variant and launch, one a round."""
        rounds = self.rounds_of_launches
        return len(self.models) * (1 + len(self.variants) * len(rounds) + sum(rounds))


def check_models(suite: Suite) -> None:
    """Builds every model once.

    Raises:
        WorkerError: one cannot be built; `kind` is ``ModelSpecError`` where its name is to blame.
    """
    with tempfile.TemporaryDirectory() as folder, _worker(suite, Path(folder)) as worker:
        worker.request(CheckModels(suite.models))


def run_suite(suite: Suite, progress: Progress) -> tuple[ModelResult, ...]:
    """Measures every model; see the module's docstring."""
    results = []
    for name in suite.models:
        with tempfile.TemporaryDirectory() as folder:
            results.append(_run_model(suite, replace(suite.case, model=name), Path(folder), progress))
    return tuple(results)


def _run_model(suite: Suite, case: Case, folder: Path, progress: Progress) -> ModelResult:
    progress(f"{case.model}: reference in float64")
    reference: Path | None = None
    if not suite.only_saved_bytes:
        reference = folder / "reference.pt"
        try:
            with _worker(suite, folder / "reference-caches") as worker:
                worker.request(MakeReference(case, str(reference)))
        except WorkerError as error:
            progress(f"{case.model}: no reference", suite.units_of_work // len(suite.models))
            message = f"no reference: {error}"
            return ModelResult(case.model, tuple(_failed(each, message) for each in suite.variants))
    progress(f"{case.model}: reference in float64", 1)
    run = _Run(suite, case, reference, folder, progress, {})
    for number, rounds in enumerate(suite.rounds_of_launches):
        run.launch(number, rounds)
    return ModelResult(case.model, tuple(run.results.values()), suite.rounds_of_launches)


@dataclass(frozen=True)
class _Run:
    """The launches of one model; `results` grows with each."""

    suite: Suite
    case: Case
    reference: Path | None
    folder: Path
    progress: Progress
    results: dict[str, VariantResult]

    def launch(self, number: int, rounds: int) -> None:
        """Starts a worker for every variant that is right so far and lets them take their turns."""
        label = f"{self.case.model}, launch {number + 1} of {len(self.suite.rounds_of_launches)}"
        with contextlib.ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for position, variant in enumerate(self.suite.variants):
                self.progress(f"{label}: {variant.name}: compiling and checking")
                if number == 0 or self.results[variant.name].status == "ok":
                    worker = stack.enter_context(_worker(self.suite, self.folder / f"caches-{position}"))
                    result = _prepare(self.suite, self.case, variant, self.reference, worker)
                    self.results[variant.name] = _merge(variant, self.results.get(variant.name), result)
                    if result.status == "ok":
                        workers[variant.name] = worker
                    else:
                        worker.close()
                self.progress(f"{label}: {variant.name}", 1)
            self._time(workers, number, rounds, f"{label}: {len(workers)} variants in turns")

    def _time(self, workers: dict[str, Worker], number: int, rounds: int, text: str) -> None:
        seconds, failures = take_turns(
            workers,
            TakeTurn(),
            rounds,
            seed=self.case.seed + number,
            after_round=lambda: self.progress(text, 1),
        )
        for name, values in seconds.items():
            before = self.results[name]
            self.results[name] = replace(before, seconds=(*before.seconds, *values))
        for name, message in failures.items():
            self.results[name] = replace(self.results[name], status="failed", message=message, seconds=())


def _merge(variant: Variant, first: VariantResult | None, later: VariantResult) -> VariantResult:
    """The first launch's result, with what a later one adds: warm compilation, or that it went wrong."""
    if first is None:
        return later
    if later.status != "ok":
        return replace(first, status=later.status, message=f"a later launch: {later.message}", seconds=())
    warm = later.compile_seconds_cold if variant.compiles else None
    return replace(first, compile_seconds_warm=first.compile_seconds_warm or warm)


def _prepare(
    suite: Suite, case: Case, variant: Variant, reference: Path | None, worker: Worker
) -> VariantResult:
    path = None if reference is None else str(reference)
    extent = "saved bytes" if suite.only_saved_bytes else "everything"
    try:
        reply = worker.request(Prepare(case, variant, path, extent))  # type: ignore[arg-type]  # one of Extent's
    except WorkerError as error:
        return _failed(variant, str(error))
    assert isinstance(reply, Prepared)
    accuracy = reply.accuracy
    wrong = None if accuracy is None else accuracy.wrong
    return VariantResult(
        variant.name,
        "ok" if wrong is None else "wrong",
        wrong,
        calls=reply.calls,
        compile_seconds_cold=reply.compile_seconds,
        peak_bytes=reply.peak_bytes,
        saved_bytes=reply.saved_bytes,
        rules=reply.rules,
        accuracy=None if accuracy is None else dataclasses.asdict(accuracy),
    )


def _failed(variant: Variant, message: str) -> VariantResult:
    return VariantResult(variant.name, "failed", message)


def _worker(suite: Suite, cache: Path) -> Worker:
    return Worker(threads=suite.case.threads, cache=cache)


def names_of(variants: Sequence[Variant]) -> tuple[str, ...]:
    """The variants' names."""
    return tuple(each.name for each in variants)
