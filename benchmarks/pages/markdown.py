"""Rows and ratios as the tables of the pages have them."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.shared.statistics import Ratio


def format_ratio(ratio: Ratio) -> str:
    """The ratio with its interval, and where that straddles 1 or does not exist, that it says nothing."""
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f}, *inconclusive*: {ratio.n} rounds"
    note = ", *inconclusive*" if ratio.verdict == "inconclusive" else ""
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]{note}"


def table_row(cells: Sequence[str]) -> str:
    """A row of a table."""
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
