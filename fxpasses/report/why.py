"""Why a place was rewritten or left alone: every rule's verdict there, and what would change it.

A place is a module's path, a node's name, or a source line. For a rule that did not look at a place itself,
the sites next to it count: those whose anchor reads it, or is read by it, such as a convolution's batch norm.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fxpasses.errors import FxpassesError
from fxpasses.report.codes import CODES
from fxpasses.report.data import Attempt, Remark, ReportData
from fxpasses.report.drawing import LARGEST, DrawnNode, GraphDrawing
from fxpasses.report.edits import edit_here
from fxpasses.report.examples import EXAMPLES
from fxpasses.report.examples.example import Example
from fxpasses.report.text import in_code, place, predicted


@dataclass(frozen=True)
class Verdict:
    """What one rule made of a place.

    Attributes:
        rule: the rule.
        remark: its remark; None where it found no site there.
        meaning: what the remark's code means; empty where the code is a rule's own.
        advice: what to do about it.
        edit: what to change in the model at hand; empty where the graph does not tell.
        example: a model of a few lines that is left alone for the same reason, and the edit that changes it;
            None where there is none.
        tried: options under which the rule was applied more often, where a dry run has tried some.
    """

    rule: str
    remark: Remark | None
    meaning: str = ""
    advice: str = ""
    edit: str = ""
    example: Example | None = None
    tried: tuple[Attempt, ...] = ()

    def __str__(self) -> str:
        if self.remark is None:
            return f"{self.rule}: no site here"
        remark = self.remark
        reason = remark.status if remark.status == "applied" else f"{remark.status} [{remark.code}]"
        lines = [f"{self.rule} at {place(remark)}: {reason}{_how_far(remark)}", f"  {remark.message}"]
        if self.meaning:
            lines.append(f"  that is: {self.meaning}")
        if self.edit:
            lines.append(f"  → here: {self.edit}")
        if self.advice:
            lines.append(f"  → {self.advice}")
        for attempt in self.tried:
            more = attempt.gained[self.rule]
            sites = f"{more} site{'s' * (more != 1)} more{predicted(attempt)}"
            lines.append(f"  → {in_code(attempt.options)} was tried: {sites}")
        if self.example is not None:
            lines += ["  a like case in a few lines:", *(f"    {line}" for line in self.example.lines())]
        return "\n".join(lines)


@dataclass(frozen=True)
class Answer:
    """Every rule's verdict at one place.

    Attributes:
        place: what was asked for.
        verdicts: those with a site first.
        nearby: whether the sites are next to the place, and not at it.
    """

    place: str
    verdicts: tuple[Verdict, ...]
    nearby: bool = False

    def __str__(self) -> str:
        title = f"why {self.place}"
        if self.nearby:
            title += ": no rule looks at it; what reads it, or is read by it"
        silent = [verdict.rule for verdict in self.verdicts if verdict.remark is None]
        last = [f"no site here: {', '.join(silent)}"] if silent else []
        return "\n".join([title, *(str(each) for each in self.verdicts if each.remark is not None), *last])


def why(report: ReportData, wanted: str) -> Answer:
    """Every rule's verdict at a place.

    Args:
        report: of a compilation or a dry run.
        wanted: a module's path, a node's name, or the end of a source location (``model.py:41``).

    Raises:
        FxpassesError: the report knows no such place.
    """
    remarks = [remark for remark in report.remarks if _is_at(remark, wanted)]
    nodes = [node for drawing in _traced(report) for node in drawing.nodes if _is_drawn_at(node, wanted)]
    if not remarks and not nodes:
        closest = difflib.get_close_matches(wanted, _known(report), n=3, cutoff=0.4)
        hint = f" The closest: {', '.join(closest)}." if closest else ""
        if not _traced(report):
            hint += f" A graph of more than {LARGEST} nodes is not recorded: of it only sites are known."
        raise FxpassesError(f"the report knows no module, node or source line {wanted!r}.{hint}")
    nearby = not remarks
    # A rule has its site at a norm, and is asked about at the convolution.
    names = {name for drawing in _traced(report) for name in _next_to(drawing, wanted)}
    spoken = {remark.rule for remark in remarks}
    remarks += [each for each in report.remarks if each.node in names and each.rule not in spoken]
    verdicts = [_verdict(report, remark) for remark in remarks]
    rules = dict.fromkeys([*report.seconds, *(remark.rule for remark in report.remarks if remark.node)])
    silent = [rule for rule in rules if rule not in {remark.rule for remark in remarks}]
    return Answer(wanted, (*verdicts, *(Verdict(rule, None) for rule in silent)), nearby)


def _verdict(report: ReportData, remark: Remark) -> Verdict:
    if remark.status == "applied":
        return Verdict(remark.rule, remark)
    code, example = CODES.get(remark.code), EXAMPLES.get(remark.code)
    helps = [] if code is None else list(code.tries)
    return Verdict(
        remark.rule,
        remark,
        code.meaning if code is not None else "",
        code.advice if code is not None else "",
        edit_here(report.graphs, remark),
        example,
        tuple(each for each in report.tried if each.options in helps and remark.rule in each.gained),
    )


def _how_far(remark: Remark) -> str:
    """How many operators of the pattern were found, and where the rule stopped."""
    if remark.status == "applied" or not remark.pattern_size:
        return ""
    stopped = _COSTS.get(remark.code) or _STAGES.get(remark.stage, "")
    return f", {remark.matched} of {remark.pattern_size} operators found{stopped and f', {stopped}'}"


_STAGES = {
    "structure": "the pattern is not there",
    "hazards": "and what stands between them forbids it",
    "check": "and it would not be right",
    "profit": "it would be right, and not pay",
    "rewrite": "and the rewrite failed",
    "verify": "and what was written was not right",
}
"""Where a rule stopped, in words."""

_COSTS = {"multiple-users": "and what others read would be made twice"}
"""Reasons of cost that rules look for among those of correctness; `profit="always"` overrides none."""


# Places ----------------------------------------------------------------------------------------------------


def _is_at(remark: Remark, wanted: str) -> bool:
    names = (remark.node, remark.blamed if remark.status != "applied" else "")
    return wanted in names or _is_module(remark.module, wanted) or _is_line(remark.location, wanted)


def _is_drawn_at(node: DrawnNode, wanted: str) -> bool:
    return node.name == wanted or _is_module(node.module, wanted) or _is_line(node.location, wanted)


def _is_module(module: str, wanted: str) -> bool:
    """Whether a module is the one that is wanted, or inside it."""
    return bool(wanted) and (module == wanted or module.startswith(f"{wanted}."))


def _is_line(location: str, wanted: str) -> bool:
    return bool(re.search(r":\d+$", wanted)) and (location == wanted or location.endswith(f"/{wanted}"))


def _traced(report: ReportData) -> list[GraphDrawing]:
    return [drawing for drawing in report.graphs if drawing.stage == "before"]


def _next_to(drawing: GraphDrawing, wanted: str) -> Iterable[str]:
    """The names of nodes that read a place, or that it reads."""
    at = {number for number, node in enumerate(drawing.nodes) if _is_drawn_at(node, wanted)}
    for number, node in enumerate(drawing.nodes):
        if number in at:
            yield from (drawing.nodes[read].name for read in node.inputs)
        elif not at.isdisjoint(node.inputs):
            yield node.name


def _known(report: ReportData) -> Sequence[str]:
    """Everything that has a name: modules and nodes."""
    drawn = [node for drawing in _traced(report) for node in drawing.nodes]
    names = [*(remark.module for remark in report.remarks), *(remark.node for remark in report.remarks)]
    names += [*(node.module for node in drawn), *(node.name for node in drawn)]
    return list(dict.fromkeys(name for name in names if name))
