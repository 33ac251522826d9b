"""Result files of `benchmarks.models`: versioned JSON with the seconds of every round.

What can be computed from the seconds (medians, ratios, geometric means) is written for readers of the file
and ignored by `load_report`, which recomputes it: a file cannot contradict itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

from benchmarks.shared.statistics import Ratio, Summary, geometric_mean_ratio, paired_ratio, summarize
from fxpasses.errors import FxpassesError

SCHEMA = 1
KIND = "models"
FASTER = "|"  # between names of variants: the faster one
Status = Literal["ok", "wrong", "failed"]


class ResultsError(FxpassesError, ValueError):
    """A result file that does not exist, does not parse or has another schema."""


class NoFigureError(FxpassesError, ValueError):
    """A figure that was asked for and was not measured, and why."""


@dataclass(frozen=True)
class VariantResult:
    """What is known of one variant of one model.

    Attributes:
        name: of the variant.
        status: `ok`; `wrong` where it failed the check against float64; `failed` where it crashed.
        message: what is wrong or failed.
        seconds: of one step, one value a round; empty unless the status is `ok`.
        calls: steps that each of these values is the median of.
        compile_seconds_cold: with empty caches, the median of several; None for eager.
        compile_seconds_warm: the same in a second process with the caches of the first; None where not
            measured.
        peak_bytes: of a step, over the model at rest.
        saved_bytes: kept for the backward.
        rules: rewrites applied, by name.
        accuracy: fields of `benchmarks.models.accuracy.Accuracy`.
    """

    name: str
    status: Status
    message: str | None = None
    seconds: tuple[float, ...] = ()
    calls: int = 0
    compile_seconds_cold: float | None = None
    compile_seconds_warm: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    rules: Mapping[str, int] = field(default_factory=dict)
    accuracy: Mapping[str, object] | None = None

    @property
    def summary(self) -> Summary | None:
        """Median and quartiles of the seconds; None where there are none."""
        return summarize(self.seconds) if self.seconds else None


@dataclass(frozen=True)
class ModelResult:
    """The variants of one model, measured in the same rounds.

    Attributes:
        model: its name.
        variants: the results.
        launches: how many of the rounds, in order, each launch of the processes took.
    """

    model: str
    variants: tuple[VariantResult, ...]
    launches: tuple[int, ...] = ()

    def variant(self, name: str) -> VariantResult:
        """The variant of that name.

        Raises:
            NoFigureError: it was not run.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        names = ", ".join(variant.name for variant in self.variants)
        raise NoFigureError(f"variant {name!r} was not run on {self.model}; run were: {names}")

    def seconds(self, name: str) -> tuple[float, ...]:
        """The seconds of a variant, one a round; of ``"B|C"``, those of the one with the lower median.

        Raises:
            NoFigureError: it, or one of several, was not run, failed, is wrong, or was not timed.
        """
        if FASTER in name:
            several = [self.seconds(piece.strip()) for piece in name.split(FASTER)]
            return min(several, key=lambda seconds: summarize(seconds).median)
        found = self.variant(name)
        if found.status != "ok":
            raise NoFigureError(f"variant {name!r} of {self.model} is {found.status}: {found.message}")
        if not found.seconds:
            raise NoFigureError(f"variant {name!r} of {self.model} was not timed")
        return found.seconds

    def ratio(self, name: str, baseline: str) -> Ratio:
        """The time of `baseline` over that of `name`, paired by round; NoFigureError as for `seconds`."""
        return paired_ratio(self.seconds(name), self.seconds(baseline), launches=self.launches or None)

    def saved_bytes_ratio(self, name: str, other: str) -> float:
        """The bytes that `name` saves for backward over those of `other`.

        Raises:
            NoFigureError: one was not run, is not right, or saves nothing because it has no backward.
        """
        figures = []
        for compared in (name, other):
            found = self.variant(compared)
            if found.status != "ok":
                raise NoFigureError(
                    f"variant {compared!r} of {self.model} is {found.status}: {found.message}"
                )
            if found.saved_bytes is None:
                raise NoFigureError(f"variant {compared!r} of {self.model} saved nothing: it has no backward")
            figures.append(found.saved_bytes)
        if figures[1] == 0:
            raise NoFigureError(f"variant {other!r} of {self.model} saves 0 bytes: there is no ratio to it")
        return figures[0] / figures[1]


@dataclass(frozen=True)
class GateResult:
    """A gate, its figure (None where there is none), why it passed or failed, and the figure's interval.

    `low` and `high` are None where nothing can be claimed, and where the figure is one of bytes.
    """

    gate: str
    figure: float | None
    passed: bool
    reason: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Report:
    """One run of the benchmark.

    Attributes:
        settings: of the run: the fields of a case but for its model, rounds, and the command line.
        environment: see `benchmarks.shared.environment`.
        baseline: the variant that ratios are taken to.
        models: the results.
        gates: what became of the gates.
    """

    settings: Mapping[str, object]
    environment: Mapping[str, object]
    baseline: str
    models: tuple[ModelResult, ...]
    gates: tuple[GateResult, ...] = ()

    def variant_names(self) -> tuple[str, ...]:
        """The variants in the order of the command line."""
        return tuple(dict.fromkeys(variant.name for model in self.models for variant in model.variants))

    def geometric_mean(self, name: str, baseline: str) -> Ratio:
        """Over all models; NoFigureError where one of them has no time."""
        pairs = [(model.seconds(name), model.seconds(baseline)) for model in self.models]
        return geometric_mean_ratio(pairs, launches=[model.launches or None for model in self.models])

    def to_json(self) -> dict[str, object]:
        """The file's content."""
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "baseline": self.baseline,
            "results": [self._model_json(model) for model in self.models],
            "geometric_means": {name: self._mean_json(name) for name in self.variant_names()},
            "gates": [asdict(gate) for gate in self.gates],
        }

    def _model_json(self, model: ModelResult) -> dict[str, object]:
        variants = [self._variant_json(model, variant) for variant in model.variants]
        return {"model": model.model, "launches": list(model.launches), "variants": variants}

    def _variant_json(self, model: ModelResult, variant: VariantResult) -> dict[str, object]:
        summary = variant.summary
        return {
            **{key: value for key, value in vars(variant).items() if key != "seconds"},
            "rules": dict(variant.rules),
            "seconds": list(variant.seconds),
            "summary": None if summary is None else asdict(summary) | {"iqr": summary.iqr},
            "ratio": ratio_or_none(model, variant.name, self.baseline),
        }

    def _mean_json(self, name: str) -> dict[str, object] | None:
        try:
            return self.geometric_mean(name, self.baseline).to_json()
        except NoFigureError:
            return None


def ratio_or_none(model: ModelResult, name: str, baseline: str) -> dict[str, object] | None:
    """The ratio as JSON, None where one of the two has no time."""
    try:
        return model.ratio(name, baseline).to_json()
    except NoFigureError:
        return None


def save_report(report: Report, path: Path) -> None:
    """Writes the result file; a number that is not finite is an error, JSON has none."""
    text = json.dumps(report.to_json(), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def load_report(path: Path) -> Report:
    """Reads a result file.

    Raises:
        ResultsError: it does not exist, is no JSON, or has another schema or kind.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ResultsError(
            f"{path}: is not JSON ({error}). Was its run interrupted? Measure again."
        ) from error
    if not isinstance(content, dict) or "schema" not in content:
        raise ResultsError(f"{path}: is no result file of benchmarks.models: it has no field 'schema'.")
    if content["schema"] != SCHEMA or content.get("kind") != KIND:
        found = f"schema {content['schema']!r} of kind {content.get('kind')!r}"
        raise ResultsError(f"{path}: has {found}, this version reads schema {SCHEMA} of kind {KIND!r}.")
    try:
        return report_of(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise ResultsError(f"{path}: a field is missing or of the wrong type ({detail}).") from error


def report_of(content: Mapping[str, object]) -> Report:
    """The report that `Report.to_json` gave; an error of Python's where a field is missing or mistyped."""
    models = cast(Sequence[Mapping[str, object]], content["results"])
    return Report(
        dict(cast(Mapping[str, object], content["settings"])),
        dict(cast(Mapping[str, object], content["environment"])),
        str(content["baseline"]),
        tuple(_model(model) for model in models),
        tuple(GateResult(**gate) for gate in cast(Sequence[dict[str, str]], content["gates"])),  # type: ignore[arg-type]  # values of JSON
    )


def _model(content: Mapping[str, object]) -> ModelResult:
    variants = tuple(
        _variant(variant) for variant in cast(Sequence[Mapping[str, object]], content["variants"])
    )
    launches = tuple(int(rounds) for rounds in cast(Sequence[int], content["launches"]))
    rounds = {len(variant.seconds) for variant in variants if variant.seconds}
    if rounds and rounds != {sum(launches)}:
        raise ValueError(
            f"{content['model']} has launches {launches} and variants of {sorted(rounds)} rounds"
        )
    return ModelResult(str(content["model"]), variants, launches)


def _variant(content: Mapping[str, object]) -> VariantResult:
    fields = {name: content[name] for name in VariantResult.__dataclass_fields__}
    if fields["status"] not in get_args(Status):
        raise ValueError(f"status {fields['status']!r} is unknown")
    seconds = tuple(float(value) for value in cast(Sequence[float], fields["seconds"]))
    if not all(math.isfinite(value) and value > 0 for value in seconds):
        raise ValueError(f"seconds of {fields['name']!r} are not all positive and finite")
    return VariantResult(**{**fields, "seconds": seconds})  # type: ignore[arg-type]  # values of JSON
