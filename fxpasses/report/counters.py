"""Counters: how often each rule has been applied in this process, and the reports that say where.

An application is counted after the graph has changed, never before. The counts are mirrored into
`torch._dynamo.utils.counters["fxpasses"]`, where users of inductor's counters look for them;
the report itself goes into torch's structured trace (`TORCH_TRACE=DIR`, read by tlparse), and as text into
the log (`TORCH_LOGS=fxpasses`; with `+fxpasses` every remark is there, too).
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from dataclasses import replace

from fxpasses.report.data import Remark
from fxpasses.report.precision import Precision
from fxpasses.report.report import Report
from fxpasses.torch_internals.dynamo import dynamo_counters, trace_artifact

_KEPT = 1000
"""How many reports are kept; the oldest are dropped first."""

log = logging.getLogger("fxpasses")

_lock = threading.Lock()
_applied: Counter[str] = Counter()
_reports: deque[Report] = deque(maxlen=_KEPT)


def record(report: Report) -> None:
    """Adds a compilation to the history and its applications to the counters."""
    trace_artifact("fxpasses_report", report.to_json)
    log.info("%s", report)
    mirror = dynamo_counters()["fxpasses"]
    with _lock:
        _reports.append(report)
        _applied.update(report.applied)
        for rule, count in report.applied.items():
            mirror[rule] += count


def amend(report: Report, *remarks: Remark, precision: Precision | None = None) -> None:
    """Adds to a recorded report, for what became known after it, unless it was forgotten.

    Args:
        report: as it was recorded, or as it was before others added to it.
        remarks: what to add to its remarks.
        precision: what takes the place of its own; None for nothing.
    """
    with _lock:
        for at, kept in enumerate(_reports):
            # Two compilations share no timings, and whoever adds to a report leaves its own there.
            if kept.seconds is report.seconds:
                amended = replace(kept, remarks=(*kept.remarks, *remarks))
                _reports[at] = amended if precision is None else replace(amended, precision=precision)
    if precision is not None:
        log.info("%s", precision)


def applied() -> Counter[str]:
    """A snapshot: rule name to number of applications since the start or the last `reset`."""
    with _lock:
        return Counter(_applied)


def reports() -> tuple[Report, ...]:
    """The reports of every compilation since the start or the last `reset`, oldest first."""
    with _lock:
        return tuple(_reports)


def last_report() -> Report | None:
    """The report of the latest compilation, or None before the first."""
    with _lock:
        return _reports[-1] if _reports else None


def reset() -> None:
    """Forgets all reports and sets the counters, the mirrored ones included, to zero."""
    with _lock:
        _reports.clear()
        _applied.clear()
        dynamo_counters()["fxpasses"].clear()
