"""Geometric means by kind of machine: what the README's table and chart show of the result files.

A figure is the baseline's time over a variant's, as in `benchmarks.models.results`: above 1 the variant is
faster. Files with one model have no mean. Where several files of a machine hold a variant in the same
setting, the newest decides, also where it has no figure because the variant failed or was wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from benchmarks.models.results import NoFigureError, Report
from benchmarks.shared.statistics import Ratio

_MODES = {
    "frozen-training": "fine-tuning, statistics frozen",
    "training": "training",
    "inference": "inference",
}
_VARIANTS = {
    "fxpasses": "fxpasses",
    "fxpasses:weights=cached": 'fxpasses, `weights="cached"`',
    "inductor-frozen": "stock inductor, frozen",
    "inductor-convbn": "stock inductor, its conv-BN flag",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
_DETAILS = {
    "batch": "batch {}",
    "size": "size {}",
    "dtype": "{}",
    "device": "{}",
    "threads": "{} threads",
    "dynamic": "dynamic {}",
}
"""The settings of a row, in words."""


_USUAL = "inductor"
"""The baseline that is not mentioned."""


@dataclass(frozen=True)
class Row:
    """One variant in one setting; what a machine says of it is a cell of the table.

    Attributes:
        settings: the mode, and the values of `_DETAILS`, in that order.
        variant: its name.
        baseline: that of the variant it is compared with.
    """

    settings: tuple[object, ...]
    variant: str
    baseline: str

    @property
    def order(self) -> tuple[object, ...]:
        """What rows are sorted by: setting, compiler and baseline, as `_MODES` and `_VARIANTS` have them."""
        mode, *details = map(str, self.settings)
        details = [detail.rjust(9) for detail in details]  # 8 before 16
        against = self.baseline != _USUAL, _place(self.baseline, _VARIANTS)
        return _place(mode, _MODES), details, _place(self.variant, _VARIANTS), against

    @property
    def is_ours(self) -> bool:
        """Whether fxpasses compiled the models."""
        return self.variant.partition(":")[0] == "fxpasses"

    @property
    def compiler(self) -> str:
        """Who compiled the models, in words, and what they are compared with where that is not inductor."""
        name, baseline = (_VARIANTS.get(each, f"`{each}`") for each in (self.variant, self.baseline))
        return name if self.baseline == _USUAL else f"{name}, against {baseline}"


@dataclass(frozen=True)
class Figure:
    """What one machine says of a row.

    Attributes:
        mean: the geometric mean over the models; None where one of them has no time.
        models: each model's own ratio, by name.
    """

    mean: Ratio | None
    models: Mapping[str, Ratio]


@dataclass(frozen=True)
class Means:
    """All figures, by row and machine."""

    figures: Mapping[tuple[Row, str], Figure]

    @staticmethod
    def of(reports: Sequence[Report]) -> Means:
        """The figures of result files, in whatever order they come."""
        newest: dict[tuple[Row, str], Report] = {}
        for report in sorted(reports, key=lambda report: str(report.environment.get("date"))):
            if len(report.models) > 1:
                machine = str(report.environment.get("device"))
                newest.update({(row, machine): report for row in _rows(report)})
        return Means({key: _figure(report, key[0]) for key, report in newest.items()})

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows, in the order in which they are shown."""
        return tuple(sorted({row for row, _ in self.figures}, key=lambda row: row.order))

    @cached_property
    def machines(self) -> tuple[str, ...]:
        """The machines, by name."""
        return tuple(sorted({machine for _, machine in self.figures}))

    @property
    def common(self) -> str:
        """What all rows have in common, in words, such as ``size 224, float32, cpu, 2 threads``."""
        return _words(self._varying(False), self.rows[0].settings[1:]) if self.rows else ""

    def setting(self, row: Row) -> str:
        """A row's setting in words, less what all have in common: ``inference, batch 1``."""
        mode = str(row.settings[0])
        details = _words(self._varying(True), row.settings[1:])
        return ", ".join(filter(None, (_MODES.get(mode, mode), details)))

    def _varying(self, wanted: bool) -> list[bool]:
        columns = zip(*(row.settings[1:] for row in self.rows), strict=True)
        # The batch size is said in every row.
        return [(index == 0 or len(set(column)) > 1) is wanted for index, column in enumerate(columns)]


def short(machine: str) -> str:
    """A machine's name without what says nothing: ``Intel Xeon, family 6 model 207``."""
    return machine.replace("(R)", "").replace(" Processor", "")


def _rows(report: Report) -> list[Row]:
    settings = (report.settings.get("mode"), *(report.settings.get(name) for name in _DETAILS))
    names = [name for name in report.variant_names() if name != report.baseline]
    return [Row(settings, name, report.baseline) for name in names]


def _figure(report: Report, row: Row) -> Figure:
    models = {}
    for model in report.models:
        try:
            models[model.model] = model.ratio(row.variant, row.baseline)
        except NoFigureError:
            continue
    try:
        return Figure(report.geometric_mean(row.variant, row.baseline), models)
    except NoFigureError:
        return Figure(None, models)


def _place(name: str, known: Mapping[str, str]) -> tuple[int, str]:
    """Where a name stands among those known; the others come last."""
    return (list(known).index(name), "") if name in known else (len(known), name)


def _words(chosen: Sequence[bool], values: Sequence[object]) -> str:
    pairs = zip(chosen, _DETAILS.items(), values, strict=True)
    return ", ".join(
        words.format(value)
        for wanted, (name, words), value in pairs
        if wanted and not (name == "dynamic" and value == "none")
    )
