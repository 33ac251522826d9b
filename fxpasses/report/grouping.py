"""Sites that share a reason, told as one: their modules folded to patterns, their figures added up.

blocks.0.0.bn1, blocks.0.0.bn2, blocks.1.0.bn1, ...   ->   blocks.*.*.bn[1-3]
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fxpasses.report.codes import CODES
from fxpasses.report.data import Remark, ReportData

FIGURES = {
    "kept_bytes": "{} less to keep for the backward pass",
    "traffic_bytes": "{} of traffic less",
    "weight_bytes": "{} of weights moved at every call",
}
"""What figures of a rewrite say, by their names in `Remark.figures`. They are bytes."""

_SHOWN = 4
"""How many patterns a reason names."""


@dataclass(frozen=True)
class Reason:
    """Sites that a rule left alone for the same reason, or where it was applied.

    Attributes:
        count: how many sites.
        example: the remark of one of them.
        where: the patterns that their modules (or nodes) fold to, with how many sites each stands for. A
            pattern may also match modules that are none of these sites.
        figures: those of all sites, added up.
    """

    count: int
    example: Remark
    where: Mapping[str, int] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def advice(self) -> str:
        """What to do about it; empty where the code is a rule's own."""
        code = CODES.get(self.example.code)
        return code.advice if code is not None else ""

    @property
    def places(self) -> str:
        """The patterns in words; beyond the first few, how many sites there are more."""
        shown = list(self.where)[:_SHOWN]
        more = sum(list(self.where.values())[_SHOWN:])
        return ", ".join(shown) + (f" and {more} more" if more else "")

    @property
    def together(self) -> str:
        """The figures in words; empty where there are none."""
        return in_words(self.figures)


def reasons(report: ReportData) -> list[Reason]:
    """Why rules did not fire: one entry per rule and code, the nearest miss first."""
    return _grouped(report.declined)


def applications(report: ReportData) -> dict[str, Reason]:
    """Where each rule was applied, by its name."""
    found = _grouped([remark for remark in report.remarks if remark.status == "applied"])
    return {reason.example.rule: reason for reason in found}


def _grouped(remarks: Iterable[Remark]) -> list[Reason]:
    groups: dict[tuple[str, str, str], list[Remark]] = {}
    for remark in remarks:
        groups.setdefault((remark.rule, remark.status, remark.code), []).append(remark)
    return [
        Reason(len(group), group[0], patterns(map(site, group)), added(remark.figures for remark in group))
        for group in groups.values()
    ]


def site(remark: Remark) -> str:
    """The module or node that a remark is about, if it is about one, after the nested graph that holds it."""
    name = remark.module or remark.node or "the graph"
    return f"{remark.graph}: {name}" if remark.graph else name


def added(figures: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Figures of several sites, added up."""
    total: Counter[str] = Counter()
    for each in figures:
        for name, figure in each.items():
            total[name] += figure  # type: ignore[assignment]  # a Counter counts in floats as well
    return dict(total)


def in_words(figures: Mapping[str, float]) -> str:
    """Figures as words, those that the table knows."""
    known = [words.format(megabytes(figures[name])) for name, words in FIGURES.items() if figures.get(name)]
    return ", ".join(known)


def megabytes(count: float) -> str:
    """A number of bytes."""
    return f"{count / 1e6:.1f} MB" if abs(count) >= 50_000 else f"{count:.0f} bytes"


# Patterns --------------------------------------------------------------------------------------------------


def patterns(names: Iterable[str]) -> dict[str, int]:
    """Names folded to patterns, in the order of their first names, with how many names each stands for.

    Names of one shape become one pattern: a part that is a number becomes ``*`` where it differs, and a
    number at the end of a part becomes a range, ``bn[1-3]``.
    """
    shapes: dict[tuple[tuple[str, bool], ...], list[tuple[str, ...]]] = {}
    for name in names:
        parts = [found for part in name.split(".") if (found := _NUMBERED.fullmatch(part))]
        shape = tuple((part[1], bool(part[2])) for part in parts)
        shapes.setdefault(shape, []).append(tuple(part[2] for part in parts))
    folded: Counter[str] = Counter()
    for shape, numbers in shapes.items():
        columns = zip(shape, zip(*numbers, strict=True), strict=True)
        folded[".".join(_folded(stem, column) for (stem, _), column in columns)] += len(numbers)
    return dict(folded)


_NUMBERED = re.compile(r"(.*?)(\d*)", re.DOTALL)


def _folded(stem: str, numbers: Sequence[str]) -> str:
    """One part of names that agree in all but its number."""
    if len(set(numbers)) == 1:
        return f"{stem}{numbers[0]}"
    distinct = sorted(set(map(int, numbers)))
    return f"{stem}[{_ranges(distinct)}]" if stem else "*"


def _ranges(numbers: Sequence[int]) -> str:
    """``1-3,5`` for 1, 2, 3, 5."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
