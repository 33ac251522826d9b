"""What a layout benchmark shows and stores: tables, JSON, CSV and plots of the measured variants."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib
import scipy.stats  # type: ignore[import-untyped]  # its stubs are no test requirement
from rich import box
from rich.table import Table

from benchmarks.layout.measure import Comparison, Variant, compare
from benchmarks.shared.statistics import Ratio
from fxpasses.devices.profile import LAYOUT_COPY, WEIGHT_COPY, DeviceProfile

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the backend is chosen before it is loaded

_COLUMNS = (
    "operator",
    "key",
    "dtype",
    "layout",
    "implementation",
    "status",
    "seconds",
    "iqr",
    "samples",
    "reason",
)


def by_operator(variants: Sequence[Variant]) -> list[list[Variant]]:
    """The variants of each operator, key and dtype, in the order in which they came."""
    groups: dict[tuple[str, str, str], list[Variant]] = defaultdict(list)
    for variant in variants:
        groups[variant.operator, variant.key, variant.dtype].append(variant)
    return list(groups.values())


def comparisons(variants: Sequence[Variant]) -> list[Comparison]:
    """The fastest implementation of each layout against the other's, where both were measured.

    Copies are left out: one direction is no alternative to the other.
    """
    groups = [group for group in by_operator(variants) if group[0].operator not in (LAYOUT_COPY, WEIGHT_COPY)]
    return [found for group in groups if (found := compare(group)) is not None]


def comparison_tables(variants: Sequence[Variant], device: str) -> list[Table]:
    """A table for each key: implementations in rows, with the speed-up of channels_last over contiguous."""
    groups: dict[str, list[list[Variant]]] = defaultdict(list)
    for group in by_operator(variants):
        groups[group[0].key].append(group)
    tables = []
    for key, of_key in groups.items():
        table = Table(title=f"{device}: {key}", title_justify="left", box=box.SIMPLE_HEAD)
        for column in ("operator", "dtype", "implementation"):
            table.add_column(column)
        for column in ("contiguous", "channels_last", "speed-up"):
            table.add_column(column, justify="right", no_wrap=True)
        for group in of_key:
            for cells in _rows(group):
                table.add_row(*cells)
            table.add_section()
        tables.append(table)
    return tables


def _rows(group: Sequence[Variant]) -> Iterator[tuple[str, ...]]:
    names = list(dict.fromkeys(variant.implementation for variant in group))
    for name in names:
        cells = {variant.layout: _cell(variant) for variant in group if variant.implementation == name}
        found = compare(group, name)
        yield (
            group[0].operator,
            group[0].dtype,
            name,
            cells.get("contiguous", ""),
            cells.get("channels_last", ""),
            _speedup(found.speedup) if found else "",
        )
    fastest = compare(group)
    if fastest is not None and len(names) > 1:
        chosen = fastest.contiguous.implementation, fastest.channels_last.implementation
        yield ("", "", "fastest of each", *chosen, _speedup(fastest.speedup))


def sweep_table(compared: Sequence[Comparison], profile: DeviceProfile) -> Table:
    """One row for each operator and dtype: how often each layout wins, and the geometric mean speed-up."""
    what = f"fastest implementations, {profile.operands} operands"
    table = Table(title=f"channels_last over contiguous on {profile.device}, {what}")
    table.add_column("operator")
    table.add_column("dtype")
    for column in ("cases", "faster", "slower", "inconclusive", "geometric mean", "channels_last by"):
        table.add_column(column, justify="right")
    groups: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for comparison in compared:
        groups[comparison.contiguous.operator, comparison.contiguous.dtype].append(comparison)
    for (operator, dtype), group in groups.items():
        verdicts = Counter(comparison.speedup.verdict for comparison in group)
        winners = Counter(comparison.channels_last.implementation for comparison in group)
        table.add_row(
            operator,
            dtype,
            str(len(group)),
            *(str(verdicts[name]) for name in ("faster", "slower", "inconclusive")),
            f"{scipy.stats.gmean([comparison.speedup.value for comparison in group]):.2f}x",
            ", ".join(f"{name} {count}" for name, count in winners.most_common()),
        )
    return table


def to_json(variants: Sequence[Variant], compared: Sequence[Comparison]) -> dict[str, object]:
    """All samples and all speed-ups."""
    speedups = [
        {
            "operator": comparison.contiguous.operator,
            "key": comparison.contiguous.key,
            "dtype": comparison.contiguous.dtype,
            "contiguous": comparison.contiguous.implementation,
            "channels_last": comparison.channels_last.implementation,
            "speedup": comparison.speedup.to_json(),
        }
        for comparison in compared
    ]
    return {"variants": [asdict(variant) for variant in variants], "speedups": speedups}


def write_csv(path: Path, variants: Sequence[Variant]) -> None:
    """One line for each variant, times in seconds."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for variant in variants:
            figures: dict[str, float] = {"samples": 0}
            if variant.times:
                summary = variant.summary
                figures = {"seconds": summary.median, "iqr": summary.iqr, "samples": summary.n}
            writer.writerow(asdict(variant) | figures)


def plot_speedups(compared: Sequence[Comparison], path: Path) -> None:
    """A bar for each operator with its confidence interval, on a logarithmic axis."""
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.4 * len(compared)), layout="constrained")
    names = [
        f"{comparison.contiguous.operator} {comparison.contiguous.dtype}\n{comparison.contiguous.key}"
        for comparison in compared
    ]
    for row, comparison in enumerate(compared):
        ratio = comparison.speedup
        low, high = ratio.low or ratio.value, ratio.high or ratio.value
        error = [[max(0.0, ratio.value - low)], [max(0.0, high - ratio.value)]]
        axes.barh(row, ratio.value - 1, left=1, xerr=error, capsize=3, color="tab:blue")
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("time in contiguous / time in channels_last (above 1: channels_last is faster)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_times(compared: Sequence[Comparison], path: Path) -> None:
    """Time in channels_last over time in contiguous: a point for each case, a colour for each operator."""
    figure, axes = plt.subplots(figsize=(8, 7), layout="constrained")
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for comparison in compared:
        times = comparison.contiguous.summary.median, comparison.channels_last.summary.median
        points[f"{comparison.contiguous.operator} {comparison.contiguous.dtype}"].append(times)
    for name, pairs in points.items():
        axes.scatter([x for x, _ in pairs], [y for _, y in pairs], s=12, label=name)
    both = [time for pairs in points.values() for pair in pairs for time in pair]
    if both:
        axes.plot([min(both), max(both)], [min(both), max(both)], color="black", linewidth=1)
        axes.legend(fontsize=7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("seconds in contiguous")
    axes.set_ylabel("seconds in channels_last (below the line: channels_last is faster)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _cell(variant: Variant) -> str:
    if variant.status != "measured":
        return variant.status
    summary = variant.summary
    return f"{1e3 * summary.median:.4g} ± {1e3 * summary.iqr:.2g} ms"


def _speedup(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f}x inconclusive (n = {ratio.n})"
    verdict = "channels_last" if ratio.verdict == "faster" else "contiguous"
    winner = "inconclusive" if ratio.verdict == "inconclusive" else verdict
    return f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}] {winner}"
