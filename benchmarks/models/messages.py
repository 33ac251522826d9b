"""What the parent of the benchmark asks of a worker process, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from benchmarks.models.accuracy import Accuracy
from benchmarks.models.cases import Case
from benchmarks.models.variants import Variant

Extent = Literal["everything", "saved bytes", "compilation"]


@dataclass(frozen=True)
class CheckModels:
    """Builds each model once, so that a wrong name is found before anything is measured; replies None."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class MakeReference:
    """Writes the float64 reference of a case to a file; replies None."""

    case: Case
    path: str


@dataclass(frozen=True)
class Prepare:
    """Builds a variant and stays ready to run it; replies `Prepared`.

    Attributes:
        case: what to run.
        variant: how to run it.
        reference: the file that `MakeReference` wrote; None starts from the seed and checks nothing.
        extent: ``"saved bytes"`` stops after the first forward, ``"compilation"`` after the first step.
    """

    case: Case
    variant: Variant
    reference: str | None
    extent: Extent = "everything"


@dataclass(frozen=True)
class TimeSteps:
    """Times the steps of one turn; replies the seconds of one step.

    Attributes:
        case: the one that was prepared at other sizes, which are compiled and checked before they are first
            timed; None for the sizes that were prepared.
    """

    case: Case | None = None


@dataclass(frozen=True)
class CountGraphs:
    """Counts what Dynamo has captured by now; replies an int."""


Request = CheckModels | MakeReference | Prepare | TimeSteps | CountGraphs


@dataclass(frozen=True)
class Prepared:
    """A variant that ran.

    Attributes:
        compile_seconds: building the callable and its first step; None for eager, which compiles nothing.
        accuracy: the errors; None where nothing was checked.
        calls: steps in a turn.
        peak_bytes: of a step, over the model at rest before it was compiled.
        saved_bytes: kept for the backward; None in inference.
        rules: rewrites and how often each was applied.
        generated: graphs for which inductor generated code, as it did not find them in its caches.
    """

    compile_seconds: float | None = None
    accuracy: Accuracy | None = None
    calls: int = 0
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    rules: dict[str, int] = field(default_factory=dict)
    generated: int = 0


@dataclass(frozen=True)
class Failure:
    """An exception in the worker: the name of its class and its message."""

    kind: str
    message: str


Reply = Prepared | float | int | Failure | None
