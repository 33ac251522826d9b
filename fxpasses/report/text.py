"""The report as text that fits on a screen: each reason once, the nearest miss first.

Text goes through rich, as `Text` objects and never as markup, since a message may hold square brackets.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING

import torch

from fxpasses.report.data import Remark, ReportData, SizeBound
from fxpasses.report.layout_plan import DECISIONS, against_stock, how_sure

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from fxpasses.report.layout_plan import CutEdge, LayoutPlan

WIDTH = 110
"""Columns of text that does not go to a terminal."""

_STYLES = {"applied": "green", "declined": "yellow", "failed": "bold red"}


@dataclass(frozen=True)
class Reason:
    """Sites that a rule left alone for the same reason.

    Attributes:
        count: how many sites.
        example: the remark of one of them.
    """

    count: int
    example: Remark


def reasons(report: ReportData) -> list[Reason]:
    """Why rules did not fire: one entry per rule and code, the nearest miss first."""
    groups: dict[tuple[str, str, str], list[Remark]] = {}
    for remark in report.declined:  # the nearest miss comes first
        groups.setdefault((remark.rule, remark.status, remark.code), []).append(remark)
    return [Reason(len(group), group[0]) for group in groups.values()]


def site(remark: Remark) -> str:
    """The module or node that a remark is about, if it is about one, after the nested graph that holds it."""
    name = remark.module or remark.node or "the graph"
    return f"{remark.graph}: {name}" if remark.graph else name


def place(remark: Remark) -> str:
    """The site, and the end of its source line as far as it is known."""
    return f"{site(remark)} ({_short(remark.location)})" if remark.location else site(remark)


def _short(location: str) -> str:
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
    """What there is to say beside the tables: that nothing was done, what is kept between calls."""
    lines = [] if report.applied else [_idle(report)]
    if report.kept_tensors:
        packed = f", packed for {report.packed_tensors} convolutions" if report.packed_tensors else ""
        lines.append(
            f"kept between calls: {report.kept_tensors} tensors, {report.kept_bytes / 1e6:.1f} MB{packed}"
        )
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


DEAREST = 3
"""How many cut edges the text has."""


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


def _layout_lines(plan: LayoutPlan) -> list[str]:
    edges = [replace(edge, location=_short(edge.location)) for edge in dearest(plan)[:DEAREST]]
    causes = copies_by_cause(plan)
    lines = [layout_line(plan), *([causes] if causes else []), *(f"  cut: {edge}" for edge in edges)]
    more = len(plan.cut_edges) - DEAREST
    return [*lines, f"  and {more} more"] if more > 0 else lines


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


def summary(report: ReportData) -> RenderableType:
    """The report on one screen, for a console of rich."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(headline(report), style="bold"), *map(Text, notes(report))]
    if report.applied:
        parts += [Text(), _applied_table(report)]
    if report.declined:
        parts += [Text(), _reason_table(report)]
    if report.layout is not None:
        parts += [Text(), *map(Text, _layout_lines(report.layout))]
    return Group(*parts)


def _applied_table(report: ReportData) -> Table:
    from rich.text import Text

    table = table_of("applied", "sites", "seconds")
    for rule, count in report.applied.items():
        took = report.seconds.get(rule)
        table.add_row(Text(rule, style="green"), str(count), "" if took is None else f"{took:.3f}")
    return table


def _reason_table(report: ReportData) -> Table:
    from rich.text import Text

    table = table_of("not applied", "sites", "nearest example")
    for reason in reasons(report):
        example = reason.example
        label = Text(f"{example.rule}\n{example.status} [{example.code}]", style=_STYLES[example.status])
        table.add_row(label, str(reason.count), Text(f"{place(example)}: {example.message}"))
    return table


def remark_table(report: ReportData) -> Table:
    """One row per site, for a console of rich."""
    from rich.text import Text

    table = table_of("rule", "status", "code", "where", "message")
    for remark in report.remarks:
        cells = (remark.rule, remark.status, remark.code, place(remark), remark.message)
        style = _STYLES[remark.status]
        table.add_row(*(Text(cell, style=style if cell is remark.status else "") for cell in cells))
    return table


def table_of(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in _NUMBERS else "left")
    return table


_NUMBERS = ("sites", "seconds")


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
