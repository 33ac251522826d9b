"""Two reports compared: rewrites lost and gained, by module, and what that costs.

A site is known by its rule and its module, or by its node where no module is known. Copies are those of the
layout plans, as are times, which are compared only where both come from the same source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fxpasses.report.data import Remark, ReportData
from fxpasses.report.grouping import added, in_words, megabytes, site
from fxpasses.report.layout_plan import LayoutPlan
from fxpasses.report.text import CARRIED_OUT, short

SLOWER = 1.01
"""How many times as long the prediction must be to count as slower."""


@dataclass(frozen=True)
class Change:
    """A rewrite that one report has and the other has not.

    Attributes:
        rule: the rule.
        place: the module or node.
        location: the user's source line, where known.
        code, message: why the site was left alone in the report that has not got it; empty where that report
            has no such site.
        figures: what the rewrite saved and cost, as in `Remark.figures`.
    """

    rule: str
    place: str
    location: str
    code: str
    message: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """What differs between two reports; pairs are (before, after), and None where it cannot be told.

    Attributes:
        lost, gained: rewrites that are only in the one before, or only in the one after.
        norms, norms_folded: how many batch norms there are, and how many were folded.
        saved_bytes: what all rewrites save of what is kept for the backward pass.
        copies: how many copies the layout plans make.
        seconds: what the layout plans predict.
        unlike: why the two may not be comparable, in words.
    """

    lost: tuple[Change, ...]
    gained: tuple[Change, ...]
    norms: tuple[int, int]
    norms_folded: tuple[int, int]
    saved_bytes: tuple[float, float]
    copies: tuple[int, int] | None = None
    seconds: tuple[float, float] | None = None
    unlike: tuple[str, ...] = ()

    @staticmethod
    def of(before: ReportData, after: ReportData) -> Difference:
        """The difference of two reports."""
        plans = [report.layout for report in (before, after)]
        known = [plan for plan in plans if plan is not None]
        copies = [_copies(plan) for plan in known]
        alike = len(known) == 2 and known[0].source == known[1].source
        return Difference(
            lost=_changes(before, after),
            gained=_changes(after, before),
            norms=(before.norms, after.norms),
            norms_folded=(before.norms - before.norms_left, after.norms - after.norms_left),
            saved_bytes=(_saved(before), _saved(after)),
            copies=(copies[0], copies[1]) if len(copies) == 2 else None,
            seconds=(known[0].seconds, known[1].seconds) if alike else None,
            unlike=_unlike(before, after),
        )

    @property
    def slower(self) -> bool:
        """Whether the plan after is predicted to take longer, by more than a hundredth."""
        return self.seconds is not None and self.seconds[1] > self.seconds[0] * SLOWER

    def to_dict(self) -> dict[str, Any]:
        """The difference as what JSON knows."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"not quite comparable: {reason}" for reason in self.unlike]
        for word, changes in (("lost", self.lost), ("gained", self.gained)):
            count = len(changes)
            lines.append(f"{word}: {count} rewrite{'s' * (count != 1)}")
            for change in changes:
                lines += _lines(change, lost=word == "lost")
        norms = [f"{folded} of {count}" for folded, count in zip(self.norms_folded, self.norms, strict=True)]
        lines.append(_pair("norms folded", norms))
        saved = [*map(megabytes, self.saved_bytes)]
        lines.append(_pair("rewrites save of what is kept for the backward pass", saved))
        lines.append(_pair("copies of the layout plan", self.copies))
        seconds = self.seconds and [f"{each * 1e3:.3f} ms" for each in self.seconds]
        lines.append(_pair("predicted by the layout plan", seconds))
        return "\n".join(lines)


def _pair(what: str, pair: Iterable[object] | None) -> str:
    if pair is None:
        return f"{what}: cannot be compared, since a report has no plan or costs come from another source"
    before, after = map(str, pair)
    return f"{what}: {before}, as before" if before == after else f"{what}: {before} -> {after}"


def _lines(change: Change, *, lost: bool) -> list[str]:
    where = f"{change.place} ({short(change.location)})" if change.location else change.place
    why = f"[{change.code}] {change.message}" if change.code else "there is no such site any more"
    lines = [f"  {change.rule} at {where}" + (f": {why}" if lost else "")]
    if figures := in_words(change.figures):
        lines.append(f"    {'that was' if lost else 'that is'} {figures}")
    return lines


def _changes(one: ReportData, other: ReportData) -> tuple[Change, ...]:
    """The rewrites of one report that another has not got."""
    left: dict[tuple[str, str], list[Remark]] = {}
    for remark in other.remarks:
        if remark.status == "applied":
            left.setdefault((remark.rule, site(remark)), []).append(remark)
    refused = {(remark.rule, site(remark)): remark for remark in reversed(other.declined)}
    found = []
    for remark in one.remarks:
        key = (remark.rule, site(remark))
        if remark.status != "applied":
            continue
        if left.get(key):
            left[key].pop()
            continue
        reason = refused.get(key)
        found.append(
            Change(
                rule=remark.rule,
                place=key[1],
                location=(reason or remark).location,
                code=reason.code if reason is not None else "",
                message=reason.message if reason is not None else "",
                figures=remark.figures,
            )
        )
    return tuple(found)


def _copies(plan: LayoutPlan) -> int:
    return (plan.copies or len(plan.cut_edges)) if plan.decision in CARRIED_OUT else 0


def _saved(report: ReportData) -> float:
    figures = added(remark.figures for remark in report.remarks if remark.status == "applied")
    return figures.get("kept_bytes", 0)


def _unlike(before: ReportData, after: ReportData) -> tuple[str, ...]:
    found = []
    if before.dry_run != after.dry_run:
        found.append("one is a dry run and the other is not")
    if before.level != after.level:
        found.append(f"they are of two capture levels, {before.level} and {after.level}")
    return tuple(found)
