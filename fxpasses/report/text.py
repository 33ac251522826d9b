"""The report as text that fits on a screen: each reason once, with its sites folded to patterns, the nearest
miss first.

Text goes through rich, as `Text` objects and never as markup, since a message may hold square brackets.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fxpasses.report.codes import CODES
from fxpasses.report.data import Attempt, Remark, ReportData, SizeBound
from fxpasses.report.grouping import Reason, applications, in_words, reasons, site
from fxpasses.report.layout_plan import DECISIONS, against_stock, how_sure
from fxpasses.report.memory_text import memory_line, memory_rows

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from fxpasses.report.layout_plan import CutEdge, LayoutPlan

WIDTH = 110
"""Columns of text that does not go to a terminal."""

_STYLES = {"applied": "green", "declined": "yellow", "failed": "bold red"}


def place(remark: Remark) -> str:
    """The site, and the end of its source line as far as it is known."""
    return f"{site(remark)} ({short(remark.location)})" if remark.location else site(remark)


def short(location: str) -> str:
    """The end of a source location: the file, the folder that it is in, and the line."""
    return "/".join(PurePath(location).parts[-2:]) if location else ""


def headline(report: ReportData) -> str:
    """Kind, level, size and time of a compilation in one line."""
    size = f"{report.nodes_before} nodes"
    if report.nodes_after != report.nodes_before:
        size = f"{report.nodes_before} -> {report.nodes_after} nodes"
    parts = [
        "dry run" if report.dry_run else "",
        f"{report.level} level" if report.level else "",
        size,
        f"{sum(report.seconds.values()):.2f} s in passes",
    ]
    return "fxpasses report: " + ", ".join(part for part in parts if part)


def notes(report: ReportData) -> list[str]:
    """What there is to say beside the tables: that nothing was done and what would change that, coverage."""
    lines = [] if report.applied else [_idle(report)]
    lines += outlook(report)
    if report.nodes_before:
        lines.append(coverage(report))
    if report.kept_tensors:
        packed = f", packed for {report.packed_tensors} convolutions" if report.packed_tensors else ""
        lines.append(
            f"kept between calls: {report.kept_tensors} tensors, {report.kept_bytes / 1e6:.1f} MB{packed}"
        )
    if report.precision is not None:
        lines.append(str(report.precision))
    if report.saved:
        lines.append(memory_line(report))
    lines += map(_size_line, report.sizes)
    if report.io:
        lines.append(io_line(report))
    now = torch.get_num_threads()
    if report.threads and report.threads != now:
        lines.append(
            f"compiled with {report.threads} threads, and torch uses {now} by now: layouts and kernels were "
            f"chosen for {report.threads}; compile again after torch.compiler.reset()"
        )
    return lines


def outlook(report: ReportData) -> list[str]:
    """Which options would apply more: those that a dry run has tried, or that would be worth a try."""
    if report.tried:
        return [_tried(attempt) for attempt in report.tried]
    if report.applied or report.dry_run:
        return []
    known = (CODES[remark.code] for remark in report.declined if remark.code in CODES)
    options = list(dict.fromkeys(in_code(options) for code in known for options in code.tries))
    if not options:
        return []
    return [f"what may change that, not tried here (fxpasses explain tries it): {' or '.join(options)}"]


def _tried(attempt: Attempt) -> str:
    count = sum(attempt.gained.values())
    rules = ", ".join(f"{rule} {number}" for rule, number in attempt.gained.items())
    together = in_words(attempt.figures)
    model = ", against the cost model" if attempt.options.get("profit") == "always" else ""
    return (
        f"tried: {in_code(attempt.options)} applies at {count} site{'s' * (count != 1)} more ({rules}){model}"
        f"{': ' if together else ''}{together}{predicted(attempt)}"
    )


def predicted(attempt: Attempt) -> str:
    """How much faster convolutions would be, copies counted, where all were measured; else empty."""
    if not attempt.seconds or not attempt.otherwise_seconds:
        return ""
    ratio = attempt.otherwise_seconds / attempt.seconds
    now, then = milliseconds(attempt.otherwise_seconds), milliseconds(attempt.seconds)
    return f"; predicted for convolutions and copies: {ratio:.2f}x ({now} now, {then} then)"


def in_code(options: Mapping[str, Any]) -> str:
    """Options as one writes them, ``weights="cached"``."""
    pairs = (
        f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}"
        for name, value in options.items()
    )
    return ", ".join(pairs)


def coverage(report: ReportData) -> str:
    """How much of a graph was reached: norms, what is known of its convolutions, copies."""
    parts = ["no batch norms"]
    if report.norms:
        parts = [f"{report.norms - report.norms_left} of {report.norms} norms folded"]
    plan = report.layout
    if plan is not None:
        share = plan.measured_share
        if share is not None:
            parts.append(f"{share:.0%} of convolution FLOPs measured".replace("%", " %"))
        parts.append(_copies_known(plan))
    else:
        parts.append("no layout plan")
    return "; ".join(parts)


def _copies_known(plan: LayoutPlan) -> str:
    if plan.decision in CARRIED_OUT:
        return copies(plan)
    return "copies not known, as too little is measured" if plan.decision in _UNMEASURED else "0 copies"


CARRIED_OUT = ("applied", "as-stock")
"""Decisions after which there are copies."""

_UNMEASURED = ("no-profile", "not-measured")
"""Decisions that leave layouts to others."""


def _size_line(bound: SizeBound) -> str:
    """For which values of a symbolic size a graph was optimised, in words."""
    others = "others are compiled anew" if bound.guarded else "others run the same program"
    return f"optimised for {bound}; it was {bound.seen} when traced, and {others}"


def io_line(report: ReportData) -> str:
    """How many of the images that a graph takes and gives are channels-last, in words."""
    counts = []
    for kind in ("input", "result"):
        count = sum(each.kind == kind and each.label == "channels_last" for each in report.io)
        counts.append(f"{count} {kind}{'s' * (count != 1)}")
    return f"io: {' and '.join(counts)} in channels_last"


class Detail(NamedTuple):
    """How much the text tells.

    Attributes:
        explained: how many reasons it has with an example.
        advised: how many with what to do about them.
        copies: how many of the dearest copies.
    """

    explained: int
    advised: int
    copies: int


_DETAILS = (Detail(2, 4, 3), Detail(2, 4, 1), Detail(1, 2, 0), Detail(0, 1, 0))
_LINES = 24
"""The text has the first of these details with which it has at most so many lines, or the last."""


def layout_line(plan: LayoutPlan) -> str:
    """The layout plan in one line: what it costs, what it changes, and whether it was carried out."""
    parts = [
        f"layout: predicted {milliseconds(plan.seconds)}",
        f"all contiguous {milliseconds(plan.contiguous_seconds)}, "
        f"all channels_last {milliseconds(plan.channels_last_seconds)} ({plan.source})",
        f"{plan.converted} of {len(plan.labels)} tensors converted, {copies(plan)}",
    ]
    if plan.stock is not None:
        parts.append(against_stock(plan))
    parts += how_sure(plan)
    if plan.decision != "applied":
        parts.append(DECISIONS[plan.decision])
    return "; ".join(parts)


def copies(plan: LayoutPlan) -> str:
    """How many copies were inserted, or would be."""
    count = plan.copies or len(plan.cut_edges)
    noun = "copy" if count == 1 else "copies"
    if plan.copies or not plan.cut_edges:
        return f"{count} {noun} inserted"
    return f"{count} {noun} foreseen"


def copies_by_cause(plan: LayoutPlan) -> str:
    """For whose sake there are copies, or would be, in words; empty where there are none."""
    found = sorted(plan.causes.items(), key=lambda each: -each[1])
    return f"copies: {', '.join(f'{count} for {cause}' for cause, count in found)}" if found else ""


def dearest(plan: LayoutPlan) -> list[CutEdge]:
    """The cut edges, the dearest first."""
    return sorted(plan.cut_edges, key=lambda edge: -edge.seconds)


def milliseconds(seconds: float) -> str:
    """A duration of a graph, in ms."""
    return f"{seconds * 1e3:.3f} ms"


def _layout_lines(plan: LayoutPlan, detail: Detail | None) -> list[str]:
    lines = [layout_line(plan)]
    if plan.decision not in CARRIED_OUT and detail is not None:
        return lines
    if causes := copies_by_cause(plan):
        lines.append(causes)
    shown = dearest(plan)[: None if detail is None else detail.copies]
    lines += [f"  cut: {replace(edge, location=short(edge.location))}" for edge in shown]
    more = len(plan.cut_edges) - len(shown)
    return [*lines, f"  and {more} more"] if shown and more > 0 else lines


def _idle(report: ReportData) -> str:
    """Why no rule fired, in a report where none did."""
    if not report.nodes_before:
        return "nothing to do: no graph was captured"
    if not report.seconds:
        return "nothing to do: the options select no pass"
    if not report.remarks:
        return "nothing to do: no rule found a site in this graph"
    return "nothing applied: every site was left as it was"


# Text ------------------------------------------------------------------------------------------------------


def summary(report: ReportData, *, everything: bool = False) -> RenderableType:
    """The report for a console of rich, on one screen.

    Args:
        report: the report.
        everything: whether every reason and every copied tensor is told in full, however long that is.
    """
    if everything:
        return _in_detail(report, None)
    for detail in _DETAILS:
        found = _in_detail(report, detail)
        if len(plain(found).splitlines()) <= _LINES:
            break
    return found


def _in_detail(report: ReportData, detail: Detail | None) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(headline(report), style="bold"), *map(Text, notes(report))]
    if report.applied:
        parts += [Text(), _applied_table(report)]
    if report.declined:
        parts += [Text(), *_reason_blocks(report, detail)]
    if report.layout is not None:
        parts += [Text(), *map(Text, _layout_lines(report.layout, detail))]
    return Group(*parts)


def _applied_table(report: ReportData) -> Table:
    from rich.text import Text

    table = table_of("applied", "sites", "seconds")
    found = applications(report)
    if any(reason.together for reason in found.values()):
        table.add_column("together", overflow="fold")
    for rule, count in report.applied.items():
        took = report.seconds.get(rule)
        seconds, together = "" if took is None else f"{took:.3f}", found[rule].together
        cells = (Text(rule, style="green"), str(count), seconds)
        table.add_row(*cells, *([Text(together)] if together else []))
    return table


def _reason_blocks(report: ReportData, detail: Detail | None) -> list[RenderableType]:
    from rich.padding import Padding
    from rich.text import Text

    parts: list[RenderableType] = [Text("not applied, nearest miss first", style="bold")]
    found, advised = reasons(report), set[str]()
    count = len(found) if detail is None else detail.advised
    for at, reason in enumerate(found[:count]):
        parts.append(_reason_line(reason))
        lines = _explained(reason) if detail is None or at < detail.explained else []
        if reason.advice and reason.advice not in advised:
            lines.append(f"→ {reason.advice}")
            advised.add(reason.advice)
        parts += [Padding(Text(line), (0, 0, 0, 4)) for line in lines]
    rest = found[count:]
    if rest:
        sites = (f"{reason.count} x {reason.example.rule} [{reason.example.code}]" for reason in rest)
        parts.append(Text(f"and {', '.join(sites)}"))
    return parts


def _reason_line(reason: Reason) -> RenderableType:
    from rich.text import Text

    example = reason.example
    status = f"{example.status} [{example.code}]"
    return Text.assemble(
        f"{reason.count} x {example.rule} ", (status, _STYLES[example.status]), f": {reason.places}"
    )


def _explained(reason: Reason) -> list[str]:
    """One site's reason, and the figures of all."""
    such = "such as " if reason.count > 1 else ""
    lines = [f"{such}{place(reason.example)}: {reason.example.message}"]
    if reason.together and reason.count > 1:
        lines.append(f"together it would mean {reason.together}")
    return lines


def remark_table(report: ReportData) -> Table:
    """One row per site, for a console of rich."""
    from rich.text import Text

    table = table_of("rule", "status", "code", "where", "message")
    for remark in report.remarks:
        cells = (remark.rule, remark.status, remark.code, place(remark), remark.message)
        style = _STYLES[remark.status]
        table.add_row(*(Text(cell, style=style if cell is remark.status else "") for cell in cells))
    return table


def memory_table(report: ReportData) -> Table:
    """One row per tensor that the backward pass reads, for a console of rich."""
    from rich.text import Text

    table = table_of("tensor", "made by", "MB", "fate", "why")
    for row in memory_rows(report):
        table.add_row(*map(Text, (row.tensor, row.size, f"{row.bytes / 1e6:.3f}", row.fate, row.reason)))
    return table


def table_of(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in _NUMBERS else "left")
    return table


_NUMBERS = ("sites", "seconds", "MB")


def render_text(report: ReportData) -> str:
    """The report as plain text of at most `WIDTH` columns, on one screen unless there are many reasons."""
    return plain(summary(report))


def render_remarks(report: ReportData) -> str:
    """All remarks as a plain table of at most `WIDTH` columns."""
    return plain(remark_table(report))


def plain(renderable: RenderableType) -> str:
    """Something of rich's as text without colours, whatever the terminal or the environment."""
    from rich.console import Console

    buffer = io.StringIO()
    console = Console(
        file=buffer,
        width=WIDTH,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        legacy_windows=False,
    )
    console.print(renderable)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())
