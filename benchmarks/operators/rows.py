"""Rows of the operator benchmark: from the samples of an operator to speed-ups and totals.

Each sample counts as often as it occurred in the log. With c_i occurrences of sample i, and median times
a_i and b_i of two configurations A and B, the ratio A/B is

    quantiles of b_i / a_i, weighted by c_i          total = sum(c_i b_i) / sum(c_i a_i)

so that above 1 A is the faster one. A quantile q is the least value whose share of the weight reaches q.
"""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

import numpy as np

from benchmarks.operators.runs import Measurement, Outcome
from benchmarks.shared.statistics import quantiles
from fxpasses.errors import FxpassesError

LEVELS = (0.2, 0.5, 0.8)
EAGER = "eager"
RowStatus = Literal["ok", "inaccurate", "failed", "skipped"]


@dataclass(frozen=True)
class Ratio:
    """How much faster the first of two configurations is: weighted quantiles over samples, and in total."""

    low: float
    median: float
    high: float
    total: float


@dataclass(frozen=True)
class Row:
    """An operator's line.

    Attributes:
        operator: its name.
        status: the worst of its samples', or ``skipped`` where none was run.
        reason: of the status, or why some samples were not run.
        measurements: what was measured of each sample.
        occurrences_logged: how often the log has the operator, with whatever inputs.
        elapsed_seconds: wall time of compiling, checking and timing.
        seconds: for eager and each configuration, its median times weighted by occurrence and summed.
        ratios: for each pair A/B of configurations.
    """

    operator: str
    status: RowStatus
    reason: str
    measurements: tuple[Measurement, ...]
    occurrences_logged: int
    elapsed_seconds: float
    seconds: Mapping[str, float]
    ratios: Mapping[str, Ratio]

    @property
    def measured(self) -> list[Measurement]:
        """The samples that were run."""
        return [measurement for measurement in self.measurements if not measurement.reason]

    @property
    def occurrences(self) -> int:
        """How often the samples that were run occurred in the log."""
        return sum(measurement.sample.count for measurement in self.measured)

    def compile_seconds(self, configuration: str) -> float:
        """What compiling all samples, and running each for the first time, took."""
        outcomes = [measurement.outcomes[configuration] for measurement in self.measured]
        return math.fsum(outcome.compile_seconds for outcome in outcomes if outcome.status == "ok")


def make_row(
    operator: str,
    reason: str,
    measurements: Sequence[Measurement],
    configurations: Sequence[str],
    occurrences_logged: int,
    elapsed_seconds: float,
) -> Row:
    """Sums up an operator.

    Args:
        operator: its name.
        reason: why it was skipped as a whole, or empty.
        measurements: what was measured of each sample.
        configurations: the names of those that were run, in order.
        occurrences_logged: how often the log has it.
        elapsed_seconds: what measuring it took.
    """
    status, why = _status(reason, measurements, configurations)
    samples = [measurement for measurement in measurements if not measurement.reason]
    counts = [sample.sample.count for sample in samples]
    # A configuration that fails on one input of an operator has no figure for the operator.
    right = [
        name for name in configurations if all(sample.outcomes[name].status == "ok" for sample in samples)
    ]
    times = {name: [_median(sample, name) for sample in samples] for name in [EAGER, *right] if samples}
    ratios = {
        f"{a}/{b}": _ratio(times[a], times[b], counts)
        for a, b in pairs(configurations)
        if a in times and b in times
    }
    seconds = {name: _weighted_sum(medians, counts) for name, medians in times.items()}
    return Row(
        operator, status, why, tuple(measurements), occurrences_logged, elapsed_seconds, seconds, ratios
    )


def pairs(configurations: Sequence[str]) -> list[tuple[str, str]]:
    """What is compared: every configuration with eager, and the further ones with the first."""
    first = configurations[0]
    return [(name, EAGER) for name in configurations] + [(name, first) for name in configurations[1:]]


def total_seconds(rows: Iterable[Row], configurations: Sequence[str]) -> dict[str, float]:
    """Seconds weighted by occurrence, over the operators that eager and all configurations completed."""
    names = [EAGER, *configurations]
    complete = [row for row in rows if all(name in row.seconds for name in names)]
    return {name: math.fsum(row.seconds[name] for row in complete) for name in names} if complete else {}


def weighted_quantiles(
    values: Sequence[float], counts: Sequence[int], levels: Sequence[float] = LEVELS
) -> list[float]:
    """The quantiles of values that occur `counts` times each, by the inverted distribution function.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values: there is no quantile")
    order = np.argsort(values)
    shares = np.cumsum(np.asarray(counts, dtype=np.float64)[order])
    places = np.searchsorted(shares, np.asarray(levels) * shares[-1])
    return [float(values[order[min(place, len(values) - 1)]]) for place in places]


class CsvError(FxpassesError, ValueError):
    """A file that rows cannot be appended to."""


class CsvRows:
    """Writes rows to a CSV file as they come, each at once, so that an interrupted run keeps them.

    `run` is what else the rows are of (dtype, device, ...): columns at the end, the same in each row.
    """

    def __init__(
        self,
        file: TextIO,
        configurations: Sequence[str],
        run: Mapping[str, str] | None = None,
        *,
        begun: bool = False,
    ) -> None:
        """Writes the header, unless the file is `begun` already."""
        self._file = file
        self._configurations = configurations
        self._run = run or {}
        self._writer = csv.writer(file)
        if not begun:
            self._write(csv_header(configurations, self._run))

    def add(self, row: Row) -> None:
        """Appends a row and hands it to the operating system."""
        measured = len(row.measured)
        cells: list[object] = [row.operator, row.status, row.reason, measured]
        cells += [len(row.measurements) - measured, row.occurrences, row.occurrences_logged]
        cells += [f"{row.elapsed_seconds:.3f}", _cell(row.seconds.get(EAGER))]
        for name in self._configurations:
            seconds = row.seconds.get(name)
            cells += [_cell(seconds), "" if seconds is None else _cell(row.compile_seconds(name))]
        for a, b in pairs(self._configurations):
            ratio = row.ratios.get(f"{a}/{b}")
            cells += [""] * 4 if ratio is None else map(_cell, vars(ratio).values())
        self._write([*cells, *self._run.values()])

    def _write(self, cells: Sequence[object]) -> None:
        self._writer.writerow(cells)
        self._file.flush()


def csv_header(configurations: Sequence[str], run: Iterable[str] = ()) -> list[str]:
    """The columns of a run's CSV file."""
    header = ["operator", "status", "reason", "inputs", "inputs not run", "occurrences"]
    header += ["occurrences logged", "elapsed s", "eager s"]
    header += [f"{name} {column}" for name in configurations for column in ("s", "compile s")]
    columns = [f"q{level:.0%}".rstrip("%") for level in LEVELS]
    header += [f"{a}/{b} {column}" for a, b in pairs(configurations) for column in (*columns, "total")]
    return [*header, *run]


def can_append(path: Path, header: Sequence[str]) -> bool:
    """Whether a file does not exist, is empty, or begins with this header."""
    if not path.exists() or not path.stat().st_size:
        return True
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        try:
            return next(csv.reader(file), []) == list(header)
        except csv.Error:  # Python 3.10 reads no line with a NUL
            return False


@contextlib.contextmanager
def appended_rows(path: Path, configurations: Sequence[str], run: Mapping[str, str]) -> Iterator[CsvRows]:
    """Appends to a CSV file, which keeps the rows of earlier runs.

    Raises:
        CsvError: the file has other columns, or cannot be written.
    """
    try:
        if not can_append(path, csv_header(configurations, run)):
            raise CsvError(
                f"{path} has other columns than these configurations give; name another file by --csv."
            )
        before = path.read_bytes() if path.exists() else b""
        file = path.open("a", newline="", encoding="utf-8")
    except OSError as error:
        raise CsvError(f"{path} cannot be written ({error.strerror}); name another file by --csv.") from error
    with file:
        if before and not before.endswith(b"\n"):  # a run was killed while it wrote
            file.write("\r\n")
        yield CsvRows(file, configurations, run, begun=bool(before))


def row_in_words(row: Row) -> str:
    """An operator's line, for people: the ratios with their quantiles, and what else there is to say."""
    parts = [
        f"{name} {ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"
        for name, ratio in row.ratios.items()
    ]
    if row.reason:
        parts.append(f"{row.status}: {row.reason}")
    inputs = len(row.measured)
    parts.append(f"{inputs} {'input' if inputs == 1 else 'inputs'}, {row.elapsed_seconds:.1f} s")
    return f"{row.operator}: {'; '.join(parts)}"


def row_to_json(row: Row) -> dict[str, object]:
    """A row with its samples and the quantiles of their times (seconds)."""
    return {
        "operator": row.operator,
        "status": row.status,
        "reason": row.reason,
        "occurrences_logged": row.occurrences_logged,
        "occurrences": row.occurrences,
        "elapsed_seconds": row.elapsed_seconds,
        "seconds": dict(row.seconds),
        "ratios": {name: vars(ratio) for name, ratio in row.ratios.items()},
        "samples": [_measurement_to_json(measurement) for measurement in row.measurements],
    }


def _measurement_to_json(measurement: Measurement) -> dict[str, object]:
    data: dict[str, object] = {
        "inputs": measurement.sample.text,
        "count": measurement.sample.count,
        "source": measurement.sample.source,
    }
    if measurement.reason:
        return data | {"reason": measurement.reason}
    outcomes = {name: _outcome_to_json(outcome) for name, outcome in measurement.outcomes.items()}
    return data | {EAGER: _times_to_json(measurement.eager), "configurations": outcomes}


def _outcome_to_json(outcome: Outcome) -> dict[str, object]:
    if outcome.status != "ok":
        return {"status": outcome.status, "reason": outcome.reason}
    return {"status": "ok", "compile_seconds": outcome.compile_seconds, **_times_to_json(outcome.times)}


def _times_to_json(times: Sequence[float]) -> dict[str, object]:
    return {"quantiles": dict(zip(map(str, LEVELS), quantiles(times, LEVELS), strict=True)), "n": len(times)}


def _status(
    reason: str, measurements: Sequence[Measurement], configurations: Sequence[str]
) -> tuple[RowStatus, str]:
    """The worst status, and where it comes from."""
    if reason:
        return "skipped", reason
    not_run = [measurement for measurement in measurements if measurement.reason]
    if len(not_run) == len(measurements):
        return "skipped", not_run[0].reason if not_run else "no inputs from the given start index on"
    wanted: tuple[Literal["inaccurate", "failed"], ...] = ("inaccurate", "failed")
    for status in wanted:
        for measurement in measurements:
            for name in configurations:
                if measurement.outcomes and measurement.outcomes[name].status == status:
                    where = measurement.sample.source
                    return status, f"{name}: {measurement.outcomes[name].reason} [{where}]"
    partly = f"{len(not_run)} of {len(measurements)} inputs not run: {not_run[0].reason}" if not_run else ""
    return "ok", partly


def _median(measurement: Measurement, name: str) -> float:
    times = measurement.eager if name == EAGER else measurement.outcomes[name].times
    return quantiles(times, (0.5,))[0]


def _ratio(times: Sequence[float], baseline: Sequence[float], counts: Sequence[int]) -> Ratio:
    low, median, high = weighted_quantiles([b / a for a, b in zip(times, baseline, strict=True)], counts)
    return Ratio(low, median, high, _weighted_sum(baseline, counts) / _weighted_sum(times, counts))


def _weighted_sum(times: Sequence[float], counts: Sequence[int]) -> float:
    return math.fsum(count * seconds for count, seconds in zip(counts, times, strict=True))


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
