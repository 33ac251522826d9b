"""The tables of `benchmarks.kernel_time`, on a terminal and as JSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.layers.peak import Peaks
from benchmarks.layers.runtimes import OURS, PEERS
from benchmarks.layers.table import OUTSIDE, TOTALS, ModelTable, Row, Seconds, better_of
from benchmarks.shared.statistics import paired_ratio, summarize

_NONE = "-"


def print_model(
    table: ModelTable, runtimes: Sequence[str], peaks: Peaks, console: Console, most: int
) -> None:
    """What loses most in a model, the totals by kind, and what is not matched."""
    layers = Table(title=f"{table.model}: layers that lose most against the better peer")
    for heading in (
        "layers",
        "of",
        *(f"{runtime} ms" for runtime in runtimes),
        "lost ms",
        "of peak",
        "of bandwidth",
    ):
        layers.add_column(heading, justify="left" if heading == "layers" else "right")
    for row in table.losing_most(most):
        layers.add_row(*_row(row, runtimes, peaks))
    console.print(layers)
    console.print(_totals(table, runtimes))
    for runtime in table.wholes:
        for names, what in (
            (table.not_matched[runtime], "parts that may be layers, it is not certain which"),
            (table.not_found[runtime], "layers that are not matched"),
        ):
            if names:
                listed = escape(", ".join(list(dict.fromkeys(names))[:8]))
                console.print(f"{runtime}: {what} ({len(names)}): {listed}")


def print_failures(table: ModelTable, console: Console) -> None:
    """Why a runtime has no figures, or none has."""
    for runtime, failure in table.failures.items():
        console.print(f"{table.model}: {runtime}: [red]failed[/red]: {escape(failure)}")


def _row(row: Row, runtimes: Sequence[str], peaks: Peaks) -> list[str]:
    times = [_milliseconds(row.seconds.get(runtime)) for runtime in runtimes]
    lost = row.lost
    assert lost is not None, "a row that loses"
    told = f"{1e3 * lost.median:.3f} [{1e3 * lost.q1:.3f}, {1e3 * lost.q3:.3f}]"
    shares = [_shares(row, runtime, row.flops, peaks.flops) for runtime in (OURS, _better(row))]
    speeds = [_shares(row, runtime, row.num_bytes, peaks.bandwidth) for runtime in (OURS, _better(row))]
    sizes = "\n".join(row.sizes)
    return [sizes, str(len(row.names)), *times, told, " / ".join(shares), " / ".join(speeds)]


def _better(row: Row) -> str:
    """The better peer."""
    return min(
        (peer for peer in PEERS if peer in row.seconds), key=lambda peer: float(np.median(row.seconds[peer]))
    )


def _shares(row: Row, runtime: str, amount: float, peak: float) -> str:
    summary = row.summary(runtime)
    return _NONE if summary is None else f"{amount / summary.median / peak:.0%}"


def _milliseconds(seconds: Seconds | None) -> str:
    return _NONE if seconds is None else f"{1e3 * summarize(seconds).median:.3f}"


def _totals(table: ModelTable, runtimes: Sequence[str]) -> Table:
    shown = Table(title=f"{table.model}: milliseconds by kind")
    for heading in ("kind", *runtimes, "ours / better peer"):
        shown.add_column(heading, justify="left" if heading == "kind" else "right")
    for kind in TOTALS:
        found = table.totals.get(kind, {})
        if any(np.median(seconds) for seconds in found.values()):
            shown.add_row(kind, *(_milliseconds(found.get(runtime)) for runtime in runtimes), _ratio(found))
    parts = {
        runtime: tuple(np.subtract(whole, table.totals[OUTSIDE][runtime]).tolist())
        for runtime, whole in table.wholes.items()
    }
    shown.add_section()
    shown.add_row(
        "sum of the parts", *(_milliseconds(parts.get(runtime)) for runtime in runtimes), _ratio(parts)
    )
    wholes = table.wholes
    shown.add_row("whole call", *(_milliseconds(wholes.get(runtime)) for runtime in runtimes), _ratio(wholes))
    return shown


def _ratio(found: Mapping[str, Seconds]) -> str:
    """Our time over the better peer's, by turns, with its interval; nothing where either has no time."""
    better = better_of([found[peer] for peer in PEERS if peer in found])
    if better is None or OURS not in found or min(*better, *found[OURS]) <= 0:
        return _NONE
    ratio = paired_ratio(better, found[OURS])
    interval = "" if ratio.low is None else f" [{ratio.low:.2f}, {ratio.high:.2f}]"
    return f"{ratio.value:.2f}{interval}"


def frequent(tables: Sequence[ModelTable], count: int) -> list[tuple[tuple[str, ...], list[Row]]]:
    """The layers that there are most of over all models, and their rows; those matched nowhere left out."""
    rows: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for table in tables:
        for row in table.rows:
            if OURS in row.seconds:
                rows[row.sizes].append(row)
    counts = Counter({sizes: sum(len(row.names) for row in same) for sizes, same in rows.items()})
    return [(sizes, rows[sizes]) for sizes, _ in counts.most_common(count)]


def print_frequent(
    tables: Sequence[ModelTable], runtimes: Sequence[str], peaks: Peaks, console: Console, count: int
) -> None:
    """The share of the machine's peak that each runtime reaches on the most frequent layers."""
    shown = Table(title="the most frequent layers of all models: share of peak operations a second")
    for heading in ("layers", "of", "models", *runtimes):
        shown.add_column(heading, justify="left" if heading == "layers" else "right")
    for sizes, rows in frequent(tables, count):
        shares = []
        for runtime in runtimes:
            with_it = [row for row in rows if runtime in row.seconds]
            seconds = sum(float(np.median(row.seconds[runtime])) for row in with_it)
            flops = sum(row.flops for row in with_it)
            shares.append(f"{flops / seconds / peaks.flops:.0%}" if seconds else _NONE)
        number = sum(len(row.names) for row in rows)
        shown.add_row("\n".join(sizes), str(number), str(len(rows)), *shares)
    console.print(shown)


def to_json(tables: Sequence[ModelTable], peaks: Peaks) -> dict[str, object]:
    """What was measured; times are microseconds: the median over the turns and the quartiles."""
    return {
        "peaks": asdict(peaks) | {"flops": peaks.flops},
        "models": [
            {
                "model": table.model,
                "layers": table.layers,
                "whole": _json_seconds(table.wholes),
                "totals": {kind: _json_seconds(found) for kind, found in table.totals.items()},
                "rows": [_json_row(row) for row in table.rows],
                "not_matched": {runtime: names for runtime, names in table.not_matched.items() if names},
                "not_found": {runtime: names for runtime, names in table.not_found.items() if names},
                "failures": table.failures,
            }
            for table in tables
        ],
    }


def _json_row(row: Row) -> dict[str, object]:
    lost = row.lost
    return {
        "sizes": row.sizes,
        "kind": row.kind,
        "names": row.names,
        "flops": row.flops,
        "bytes": row.num_bytes,
        "microseconds": _json_seconds(row.seconds),
        "lost": None if lost is None else _rounded(lost.median, lost.q1, lost.q3),
        "kernels": row.kernels,
    }


def _json_seconds(seconds: Mapping[str, Seconds]) -> dict[str, list[float]]:
    summaries = {runtime: summarize(found) for runtime, found in seconds.items()}
    return {runtime: _rounded(one.median, one.q1, one.q3) for runtime, one in summaries.items()}


def _rounded(*seconds: float) -> list[float]:
    return [round(1e6 * each, 2) for each in seconds]
