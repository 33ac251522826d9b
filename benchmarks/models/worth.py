"""What each part of fxpasses is worth: ratios of an ablation's variants, and its result file.

    beside the others: time without X / time of full        alone: time of none / time of only X

Both are paired by rounds and are geometric means over the models in which the part was applied; above 1 the
part pays. The file holds a report of `benchmarks.models` for each mode, with the seconds of every round; as
there, whatever can be computed of these is computed anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from benchmarks.models.parts import FULL, NONE, Part
from benchmarks.models.results import (
    SCHEMA,
    ModelResult,
    NoFigureError,
    Report,
    ResultsError,
    report_of,
)
from benchmarks.shared.statistics import Ratio, geometric_mean_ratio

KIND = "ablation"


@dataclass(frozen=True)
class Comparison:
    """Models with a part against the same models without it.

    Attributes:
        ratio: the geometric mean of the time without over the time with it; None where nothing was timed.
        models: each model's own ratio, by name.
        missing: why a model that has the variants has no ratio.
        saved_bytes: by how much it lessens what is kept for the backward, in all models; None in inference.
    """

    ratio: Ratio | None
    models: Mapping[str, Ratio]
    missing: Mapping[str, str]
    saved_bytes: int | None


@dataclass(frozen=True)
class Worth:
    """What one part is worth in one mode.

    Attributes:
        part: which.
        applied: in how many places of all models; None for an option, which is not counted.
        beside: the full set against it less the part.
        alone: the part alone against nothing.
    """

    part: Part
    applied: int | None
    beside: Comparison
    alone: Comparison


@dataclass(frozen=True)
class Ablation:
    """One run of the benchmark.

    Attributes:
        environment: see `benchmarks.shared.environment`.
        reports: by mode; the variants are those of `parts`.
    """

    environment: Mapping[str, object]
    reports: Mapping[str, Report]

    def has(self, mode: str, model: str) -> bool:
        """Whether a model was measured in a mode."""
        return mode in self.reports and any(model == result.model for result in self.reports[mode].models)

    def with_model(self, mode: str, settings: Mapping[str, object], result: ModelResult) -> Ablation:
        """This and one more model, in a mode whose report has `settings`."""
        report = self.reports.get(mode) or Report(settings, self.environment, FULL, ())
        report = replace(report, models=(*report.models, result))
        return replace(self, reports={**self.reports, mode: report})

    def to_json(self) -> dict[str, object]:
        """The file's content."""
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "environment": dict(self.environment),
            "modes": {mode: report.to_json() for mode, report in self.reports.items()},
        }


def worths(report: Report) -> list[Worth]:
    """What each part of a mode's report is worth, in the order in which they were left out."""
    parts = [Part(**given) for given in cast(Sequence[dict[str, str]], report.settings["parts"])]
    found = []
    for part in parts:
        applied = _rewrites(report, FULL).get(part.counter, 0) if part.counter else None
        beside, alone = compared(report, FULL, part.left_out), compared(report, part.alone, NONE)
        found.append(Worth(part, applied, beside, alone))
    return found


def compared(report: Report, with_it: str, without: str) -> Comparison:
    """Two variants, over the models in which both were run."""
    models = [model for model in report.models if {with_it, without} <= _names(model)]
    ratios, missing = {}, {}
    for model in models:
        try:
            ratios[model.model] = model.ratio(with_it, without)
        except NoFigureError as error:
            missing[model.model] = str(error)
    timed = [model for model in models if model.model in ratios]
    pairs = [(model.seconds(with_it), model.seconds(without)) for model in timed]
    launches = [model.launches or None for model in timed]
    mean = geometric_mean_ratio(pairs, launches=launches) if pairs else None
    return Comparison(mean, ratios, missing, _saved_bytes(models, with_it, without))


def uncounted(report: Report) -> dict[str, int]:
    """What the full set has applied that no part of the report names, such as kernels of our own."""
    named = {given["counter"] for given in cast(Sequence[dict[str, str]], report.settings["parts"])}
    return {name: count for name, count in _rewrites(report, FULL).items() if name not in named}


def save_ablation(ablation: Ablation, path: Path) -> None:
    """Writes the result file."""
    path.write_text(json.dumps(ablation.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load_ablation(path: Path) -> Ablation:
    """Reads a result file.

    Raises:
        ResultsError: it cannot be read, is no JSON, or has another schema or kind.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: cannot be read as JSON ({error}).") from error
    if not is_ablation(content) or content.get("schema") != SCHEMA:
        raise ResultsError(f"{path}: is no result file of benchmarks.ablation of schema {SCHEMA}.")
    try:
        reports = {mode: report_of(report) for mode, report in content["modes"].items()}
        return Ablation(content["environment"], reports)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise ResultsError(f"{path}: a field is missing or of the wrong type ({detail}).") from error


def is_ablation(content: object) -> bool:
    """Whether the content of a file says that it is of this benchmark."""
    return isinstance(content, dict) and content.get("kind") == KIND


def _names(model: ModelResult) -> set[str]:
    return {variant.name for variant in model.variants}


def _rewrites(report: Report, name: str) -> dict[str, int]:
    """Rewrites of a variant in all models."""
    total: dict[str, int] = {}
    for model in report.models:
        for rule, count in model.variant(name).rules.items() if name in _names(model) else ():
            total[rule] = total.get(rule, 0) + count
    return total


def _saved_bytes(models: Sequence[ModelResult], with_it: str, without: str) -> int | None:
    total = None
    for model in models:
        ours, theirs = (model.variant(name).saved_bytes for name in (with_it, without))
        if ours is not None and theirs is not None:
            total = (total or 0) + theirs - ours
    return total
