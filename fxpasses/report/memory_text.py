"""What training keeps for the backward pass, as a line, and row by row."""

from __future__ import annotations

from dataclasses import dataclass

from fxpasses.report.data import ReportData

_OPERATORS = 3
"""How many readers of a tensor the table names."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        tensor: what it is: its node, and the module that it came from.
        size: its operator, sizes and dtype.
        bytes: how many are kept, or would be.
        fate: ``"kept"``, ``"recomputed"`` or ``"spared"``.
        reason: who reads it, and the rule that wrote it, has it computed again, or needs it no more.
    """

    tensor: str
    size: str
    bytes: int
    fate: str
    reason: str


def memory_rows(report: ReportData) -> list[Row]:
    """What is kept, what is computed again instead, and what rules made needless; each the largest first."""
    rows = [
        Row(
            f"{one.name} ({one.module})" if one.module else one.name,
            f"{one.operator} {one.shape} {one.dtype}",
            one.bytes,
            one.fate,
            "; ".join(part for part in (_read_by(one.readers), _by(one.rule)) if part),
        )
        for one in report.saved
    ]
    rows += [
        Row(
            f"{remark.node} ({remark.module})" if remark.module else remark.node,
            "",
            int(remark.figures["kept_bytes"]),
            "spared",
            _by(remark.rule),
        )
        for remark in report.remarks
        if report.saved and remark.status == "applied" and remark.figures.get("kept_bytes")
    ]
    return sorted(rows, key=lambda row: (_FATES.index(row.fate), -row.bytes))


_FATES = ("kept", "recomputed", "spared")
_WORDS = ("kept for the backward pass", "computed again", "spared by rules")


def memory_line(report: ReportData) -> str:
    """How much is kept in one line; empty where nothing is known."""
    if not report.saved:
        return ""
    rows = memory_rows(report)
    parts = []
    least = "" if is_exact(report) else "at least "
    for fate, words in zip(_FATES, _WORDS, strict=True):
        found = [row for row in rows if row.fate == fate]
        if found:
            tensors = f"{len(found)} tensor{'s' * (len(found) != 1)}"
            parts.append(f"{words}: {least}{tensors}, {megabytes(sum(row.bytes for row in found))}")
    return "; ".join(parts)


def is_exact(report: ReportData) -> bool:
    """Whether nothing else is kept: inductor's own layouts may keep copies of inputs and weights."""
    return report.layout is not None and report.layout.is_in_force


def megabytes(count: int) -> str:
    """A size in MB, of 1,000,000 bytes."""
    return f"{count / 1e6:.3f} MB"


def _read_by(readers: tuple[str, ...]) -> str:
    more = f" and {len(readers) - _OPERATORS} more" if len(readers) > _OPERATORS else ""
    return f"read by {', '.join(readers[:_OPERATORS])}{more}" if readers else ""


def _by(rule: str) -> str:
    return f"rule {rule}" if rule else ""
