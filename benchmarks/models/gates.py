"""Gates: conditions on the command line that a run must meet, parsed and never evaluated as code.

    gate      := quantity OPERATOR NUMBER [" for " MODEL {"," MODEL}]
    quantity  := AGGREGATE "(" measure ")" | measure
    measure   := A "/" B {"|" B} | "saved_bytes(" A "/" B ")"
    AGGREGATE := "geomean" | "min" | "max"          OPERATOR := ">=" | "<=" | ">" | "<"

`A/B` is B's time over A's, so above 1 A is faster; `A/B|C` compares with whichever of B and C is faster, in
the median, on the model at hand; `saved_bytes(A/B)` is A's bytes over B's. Aggregates are over the models of
the run, or those after `for`. Without an aggregate every model has to meet the gate, and the figure is that
of the worst. The interval beside the figure is that of `benchmarks.shared.statistics`; the bound is compared
with the figure. A gate fails where a figure is missing: a variant or model that was not run, that crashed, or
that is wrong.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.stats  # type: ignore[import-untyped]  # its stubs are no test requirement

from benchmarks.models.results import FASTER, GateResult, ModelResult, NoFigureError, Report
from fxpasses.errors import FxpassesError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "geomean": lambda values: float(scipy.stats.gmean(values)),
    "min": min,
    "max": max,
}
_GATE = re.compile(
    r"(?P<quantity>.+?)\s*(?P<operator>>=|<=|>|<)\s*(?P<bound>[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+)"
    r"(?:\s+for\s+(?P<models>\S.*))?"
)
_AGGREGATE = re.compile(r"(?P<aggregate>\w+)\((?P<measure>.*)\)")
_EXAMPLE = 'such as "geomean(fxpasses/inductor) >= 1.0" or "max(saved_bytes(fxpasses/eager)) <= 0.5"'


class GateError(FxpassesError, ValueError):
    """A gate that does not parse."""


@dataclass(frozen=True)
class Gate:
    """A parsed gate; see the grammar in the module's docstring."""

    text: str
    aggregate: str | None
    saved_bytes: bool
    variant: str
    other: str
    operator: str
    bound: float
    models: tuple[str, ...] = ()

    def evaluate(self, report: Report) -> GateResult:
        """Whether a run meets the gate, with its figure."""
        try:
            figures = {model.model: self._figure(model) for model in self._models(report)}
        except NoFigureError as error:
            return GateResult(self.text, None, False, str(error))
        figure = self._combine(list(figures.values()))
        passed = _OPERATORS[self.operator](figure, self.bound)
        worst = min(figures, key=lambda name: figures[name] * self._direction)
        low, high = self._interval(report, figures, figure)
        return GateResult(self.text, figure, passed, f"worst: {worst} with {figures[worst]:.3f}", low, high)

    @property
    def _direction(self) -> int:
        return 1 if self.operator.startswith(">") else -1

    def _combine(self, figures: list[float]) -> float:
        if self.aggregate is not None:
            return _AGGREGATES[self.aggregate](figures)
        return min(figures) if self._direction > 0 else max(figures)

    def _figure(self, model: ModelResult) -> float:
        if self.saved_bytes:
            return model.saved_bytes_ratio(self.variant, self.other)
        return model.ratio(self.variant, self.other).value

    def _interval(
        self, report: Report, figures: Mapping[str, float], figure: float
    ) -> tuple[float | None, float | None]:
        """Of the figure; bytes have none, since they do not vary."""
        if self.saved_bytes:
            return None, None
        models = self._models(report)
        if self.aggregate != "geomean":
            models = [model for model in models if figures[model.model] == figure][:1]
        ratio = replace(report, models=tuple(models)).geometric_mean(self.variant, self.other)
        return ratio.low, ratio.high

    def _models(self, report: Report) -> list[ModelResult]:
        run = {model.model: model for model in report.models}
        missing = [name for name in self.models if name not in run]
        if missing:
            raise NoFigureError(f"model {missing[0]!r} was not run; run were: {', '.join(run)}")
        chosen = [run[name] for name in self.models] if self.models else list(run.values())
        if not chosen:
            raise NoFigureError("no model was run")
        return chosen


def parse_gate(text: str) -> Gate:
    """The gate that `text` spells.

    Raises:
        GateError: it does not follow the grammar.
    """
    match = _GATE.fullmatch(text.strip())
    if match is None:
        raise GateError(f"gate {text!r} is not QUANTITY >= NUMBER (or <=, >, <); write one {_EXAMPLE}.")
    quantity, aggregate, saved = match["quantity"].strip(), None, False
    if (outer := _AGGREGATE.fullmatch(quantity)) and outer["aggregate"] in _AGGREGATES:
        aggregate, quantity = outer["aggregate"], outer["measure"].strip()
    if (inner := _AGGREGATE.fullmatch(quantity)) and inner["aggregate"] == "saved_bytes":
        saved, quantity = True, inner["measure"].strip()
    variant, slash, other = (piece.strip() for piece in quantity.partition("/"))
    names = [variant, *(name.strip() for name in other.split(FASTER))]
    malformed = not slash or "/" in other or FASTER in variant or (saved and FASTER in other)
    if malformed or any(not name or _unbalanced(name) for name in names):
        valid = f"Aggregates: {', '.join(_AGGREGATES)}"
        raise GateError(
            f"gate {text!r}: {quantity!r} is not A/B, A/B|C or saved_bytes(A/B). {valid}. "
            f"Write one {_EXAMPLE}."
        )
    bound = float(match["bound"])
    if not np.isfinite(bound):
        raise GateError(f"gate {text!r}: the bound {match['bound']} is not finite.")
    models = tuple(name.strip() for name in (match["models"] or "").split(",") if name.strip())
    return Gate(text.strip(), aggregate, saved, variant, other, match["operator"], bound, models)


def _unbalanced(name: str) -> bool:
    """Whether a parenthesis is left over, as in ``median(fxpasses``: an aggregate that does not exist."""
    return name.count("(") != name.count(")")
