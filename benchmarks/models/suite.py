"""A run over models and variants: references, workers, turns, results.

For each model a process of its own computes the float64 reference. Then, in each launch, every variant starts
a worker, compiles alone on the machine and is checked, and the workers that are right share out the launch's
rounds in turns. The first launch compiles with empty caches, the later ones with those that it left. A model
or variant that fails leaves a result that says so, and the rest goes on.

Where several may be prepared at once, that is true of references and of workers of all models alike; the
turns begin when nothing compiles any more, and are taken one model at a time as ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Protocol

from benchmarks.models.cases import Case
from benchmarks.models.messages import CheckModels, MakeReference, Prepare, Prepared, TimeSteps
from benchmarks.models.results import ModelResult, VariantResult
from benchmarks.models.variants import Variant
from benchmarks.models.workers import Worker, WorkerError, time_in_rounds


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
        at_once: how many references or variants are computed, compiled and checked at the same time; the
            workers of all models stay until their turns where it is more than one.
        compilations: how often each variant is compiled with empty caches, and how often with those of a
            compilation before: in processes of their own, beyond what the launches do.
        shares_caches: whether variants of a model share inductor's caches: what they have in common is then
            compiled once, and no variant's compilation is cold. It needs `at_once` to be 1.
        wanted: told of a variant and of the rewrites in the first one, whether to run it on this model; None
            runs all.
    """

    case: Case
    models: tuple[str, ...]
    variants: tuple[Variant, ...]
    rounds: int = 20
    launches: int = 2
    only_saved_bytes: bool = False
    at_once: int = 1
    shares_caches: bool = False
    compilations: int = 1
    wanted: Callable[[Variant, Mapping[str, int]], bool] | None = None

    @property
    def rounds_of_launches(self) -> tuple[int, ...]:
        """The rounds of each launch, shared out evenly; a launch without a round does not happen."""
        if self.only_saved_bytes:
            return (0,)
        launches = min(self.launches, self.rounds)
        return tuple(
            self.rounds // launches + (launch < self.rounds % launches) for launch in range(launches)
        )

    @property
    def units_of_work(self) -> int:
        """What `done` of the progress adds up to: one a reference, one a variant and launch, one a round."""
        rounds = self.rounds_of_launches
        compilations = 2 * (self.compilations - 1) + len(rounds)
        return len(self.models) * (1 + len(self.variants) * compilations + sum(rounds))


def check_models(suite: Suite) -> None:
    """Builds every model once.

    Raises:
        WorkerError: one cannot be built; `kind` is ``ModelSpecError`` where its name is to blame.
    """
    with tempfile.TemporaryDirectory() as folder, _worker(suite, Path(folder)) as worker:
        worker.request(CheckModels(suite.models))


def run_suite(suite: Suite, progress: Progress) -> tuple[ModelResult, ...]:
    """Measures every model; see the module's docstring."""
    groups = [suite.models] if suite.at_once > 1 else [(name,) for name in suite.models]
    results: list[ModelResult] = []
    with ThreadPoolExecutor(suite.at_once) as pool:
        for names in groups:
            with tempfile.TemporaryDirectory() as folder:
                runs = [
                    _ModelRun(suite, replace(suite.case, model=name), Path(folder) / str(number), progress)
                    for number, name in enumerate(names)
                ]
                # float64 takes four times the memory of a half type.
                with ThreadPoolExecutor(max(1, suite.at_once // 4)) as few:
                    list(few.map(_ModelRun.make_reference, runs))  # raises what one of them raised
                for run in runs:
                    run.compile_again()
                for number, rounds in enumerate(suite.rounds_of_launches):
                    _launch(runs, number, rounds, pool)
                results += [run.result() for run in runs]
    return tuple(results)


def _launch(runs: Sequence[_ModelRun], number: int, rounds: int, pool: ThreadPoolExecutor) -> None:
    """Starts a worker for every variant that is right so far and lets them take their turns."""
    with contextlib.ExitStack() as stack:
        tasks = [run.preparations(number, stack) for run in runs]
        # What the first variant of a model was like says which of the others are wanted.
        for several in ([each[:1] for each in tasks], [each[1:] for each in tasks]):
            list(pool.map(lambda task: task(), chain.from_iterable(several)))
        for run in runs:
            run.time(number, rounds)


@dataclass
class _ModelRun:
    """The launches of one model; `results` grows with each."""

    suite: Suite
    case: Case
    folder: Path
    progress: Progress
    results: dict[str, VariantResult] = field(default_factory=dict)
    _reference: Path | None = None
    _failure: str | None = None
    _workers: dict[str, Worker] = field(default_factory=dict)
    _cold: dict[str, list[float]] = field(default_factory=dict)
    _warm: dict[str, list[float]] = field(default_factory=dict)

    def make_reference(self) -> None:
        """Computes what the results are compared with; where it fails, no variant is launched."""
        self.folder.mkdir()
        self.progress(f"{self.case.model}: reference in float64")
        if not self.suite.only_saved_bytes:
            self._reference = self.folder / "reference.pt"
            try:
                with _worker(self.suite, self.folder / "reference-caches") as worker:
                    worker.request(MakeReference(self.case, str(self._reference)))
            except WorkerError as error:
                self._failure = f"no reference: {error}"
                skipped = self.suite.units_of_work // len(self.suite.models)
                self.progress(f"{self.case.model}: no reference", skipped)
                return
        self.progress(f"{self.case.model}: reference in float64", 1)

    def compile_again(self) -> None:
        """Compiles every variant more often than its launches do, in turns, each with caches of its own."""
        for repetition in range(self.suite.compilations - 1 if self._failure is None else 0):
            for variant in self.suite.variants:
                caches = self.folder / f"caches-again-{repetition}-{variant.name}"
                for seconds in (
                    self._cold.setdefault(variant.name, []),
                    self._warm.setdefault(variant.name, []),
                ):
                    self.progress(f"{self.case.model}: {variant.name}: compiling again")
                    with _worker(self.suite, caches) as worker, contextlib.suppress(WorkerError):
                        reply = worker.request(
                            Prepare(self.case, variant, str(self._reference), "compilation")
                        )
                        assert isinstance(reply, Prepared)
                        if reply.compile_seconds is not None:
                            seconds.append(reply.compile_seconds)
                    self.progress(f"{self.case.model}: {variant.name}: compiled again", 1)

    def preparations(self, number: int, stack: contextlib.ExitStack) -> list[Callable[[], None]]:
        """What is to be done before the turns of a launch, one task a variant; `stack` ends the workers."""
        if self._failure is not None:
            return []
        self._workers = {}
        return [
            partial(self._prepare, position, number, stack) for position in range(len(self.suite.variants))
        ]

    def _prepare(self, position: int, number: int, stack: contextlib.ExitStack) -> None:
        variant, label = self.suite.variants[position], self._label(number)
        self.progress(f"{label}: {variant.name}: compiling and checking")
        if self._runs(variant, number):
            caches = "caches" if self.suite.shares_caches else f"caches-{position}"
            worker = stack.enter_context(_worker(self.suite, self.folder / caches))
            result = _prepare(self.suite, self.case, variant, self._reference, worker)
            self.results[variant.name] = _merge(variant, self.results.get(variant.name), result)
            if result.status == "ok":
                self._workers[variant.name] = worker
            else:
                worker.close()
        self.progress(f"{label}: {variant.name}", 1)

    def _runs(self, variant: Variant, number: int) -> bool:
        if number > 0:
            return variant.name in self.results and self.results[variant.name].status == "ok"
        first = self.results.get(self.suite.variants[0].name)
        return self.suite.wanted is None or first is None or self.suite.wanted(variant, first.rules)

    def _label(self, number: int) -> str:
        return f"{self.case.model}, launch {number + 1} of {len(self.suite.rounds_of_launches)}"

    def result(self) -> ModelResult:
        """What there is to report when all launches are over."""
        variants = self.suite.variants
        if self._failure is not None:
            return ModelResult(
                self.case.model, tuple(_failed(variant, self._failure) for variant in variants)
            )
        ordered = tuple(
            self._with_medians(self.results[name]) for name in names_of(variants) if name in self.results
        )
        return ModelResult(self.case.model, ordered, self.suite.rounds_of_launches)

    def _with_medians(self, found: VariantResult) -> VariantResult:
        """The result with the medians of all compilations."""
        cold, warm = (
            [*again.get(found.name, []), *([once] if once is not None else [])]
            for again, once in (
                (self._cold, found.compile_seconds_cold),
                (self._warm, found.compile_seconds_warm),
            )
        )
        return replace(
            found,
            compile_seconds_cold=statistics.median(cold) if cold else None,
            compile_seconds_warm=statistics.median(warm) if warm else None,
        )

    def time(self, number: int, rounds: int) -> None:
        """Lets the workers that were prepared take their turns."""
        if self._failure is not None:
            return
        workers = {
            variant.name: self._workers[variant.name]
            for variant in self.suite.variants
            if variant.name in self._workers
        }
        text = f"{self._label(number)}: {len(workers)} variants in turns"
        seconds, failures = time_in_rounds(
            workers,
            TimeSteps(),
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
    return tuple(variant.name for variant in variants)
