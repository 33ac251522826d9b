"""A run over models and variants: references, workers, turns, results.

For each model a process of its own computes the float64 reference; then every variant compiles alone on the
machine, in its worker; then the workers that are right take turns. A model or variant that fails leaves a
result that says so, and the rest goes on.
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
        rounds: turns of every variant.
        warm: whether to compile once more with warm caches.
        only_saved_bytes: whether to run one unchecked forward and nothing else.
    """

    case: Case
    models: tuple[str, ...]
    variants: tuple[Variant, ...]
    rounds: int = 20
    warm: bool = True
    only_saved_bytes: bool = False

    @property
    def units_of_work(self) -> int:
        """What `done` of the progress adds up to: one a reference, two a variant, one a round."""
        rounds = 0 if self.only_saved_bytes else self.rounds
        return len(self.models) * (1 + 2 * len(self.variants) + rounds)


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
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        results: dict[str, VariantResult] = {}
        for number, variant in enumerate(suite.variants):
            progress(f"{case.model}: {variant.name}: compiling and checking")
            cache = folder / f"caches-{number}"
            worker = stack.enter_context(_worker(suite, cache))
            result = _prepare(suite, case, variant, reference, worker)
            progress(f"{case.model}: {variant.name}: compiling with warm caches", 1)
            if suite.warm and not suite.only_saved_bytes and variant.compiles and result.status == "ok":
                result = replace(result, compile_seconds_warm=_warm(suite, case, variant, reference, cache))
            progress(f"{case.model}: {variant.name}", 1)
            results[variant.name] = result
            if result.status == "ok":
                workers[variant.name] = worker
            else:
                worker.close()
        if not suite.only_saved_bytes:
            _time(suite, case, workers, results, progress)
    return ModelResult(case.model, tuple(results.values()))


def _time(
    suite: Suite,
    case: Case,
    workers: dict[str, Worker],
    results: dict[str, VariantResult],
    progress: Progress,
) -> None:
    def after_round() -> None:
        progress(f"{case.model}: measuring {len(workers)} variants in turns", 1)

    seconds, failures = take_turns(workers, TakeTurn(), suite.rounds, seed=case.seed, after_round=after_round)
    for name, values in seconds.items():
        results[name] = replace(results[name], seconds=tuple(values))
    for name, message in failures.items():
        results[name] = replace(results[name], status="failed", message=message)


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


def _warm(suite: Suite, case: Case, variant: Variant, reference: Path | None, cache: Path) -> float | None:
    path = None if reference is None else str(reference)
    try:
        with _worker(suite, cache) as worker:
            reply = worker.request(Prepare(case, variant, path, "compilation"))
    except WorkerError:
        return None  # The first process did the same and was right: what failed is only this figure.
    assert isinstance(reply, Prepared)
    return reply.compile_seconds


def _failed(variant: Variant, message: str) -> VariantResult:
    return VariantResult(variant.name, "failed", message)


def _worker(suite: Suite, cache: Path) -> Worker:
    return Worker(threads=suite.case.threads, cache=cache)


def names_of(variants: Sequence[Variant]) -> tuple[str, ...]:
    """The variants' names."""
    return tuple(each.name for each in variants)
