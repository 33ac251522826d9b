"""Runs one after the other, each within what its stage has left, and the file of what is known so far."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.device_check.bars import Bar, bars_of
from benchmarks.device_check.plan import STAGES, Run
from benchmarks.models.results import Report, ResultsError, load_report

FILE, LOG = "device_check.json", "log.txt"
_TAIL = 4000
_STOPPING = 5.0
"""Seconds between the end of a run's time and the end of its processes, which may write what they know."""


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        run: which.
        status: ``"passed"``, ``"failed"``, ``"cut short"`` or ``"not begun"``.
        seconds: that it took.
        tail: the last that it printed, unless it passed.
        report: of `benchmarks.models`, if it wrote one.
    """

    run: Run
    status: str = "not begun"
    seconds: float = 0.0
    tail: str = ""
    report: Report | None = field(default=None, repr=False)


class Check:
    """All runs and what they found; `device_check.json` is written whenever one ended."""

    def __init__(self, runs: Sequence[Run], folder: Path, environment: Mapping[str, object]) -> None:
        self.outcomes = [Outcome(run) for run in runs]
        self.folder = folder
        self.environment = environment

    def go(self, limits: Sequence[float], told: Callable[[Outcome], None]) -> None:
        """Runs everything.

        Args:
            limits: seconds of each stage.
            told: called with each outcome.
        """
        self._write()
        for stage, limit in zip(STAGES, limits, strict=True):
            end = time.monotonic() + limit
            for outcome in self.outcomes:
                left = end - time.monotonic()
                if outcome.run.stage != stage or left <= 0:
                    continue
                self._run(outcome, left)
                self._write()
                told(outcome)

    @property
    def bars(self) -> list[Bar]:
        """What is known of the bars."""
        tests = [
            outcome.status == "passed"
            for outcome in self.outcomes
            if outcome.run.stage == "tests" and outcome.status != "not begun"
        ]
        reports = [(outcome.run, outcome.report) for outcome in self.outcomes if outcome.report is not None]
        speed = {run.name: report for run, report in reports if run.stage == "speed"}
        memory = next((report for run, report in reports if run.stage == "memory"), None)
        return bars_of(tests, speed, memory)

    def _run(self, outcome: Outcome, seconds: float) -> None:
        start = time.monotonic()
        log = self.folder / LOG
        with log.open("ab") as output:
            output.write(f"\n=== {outcome.run.name}: {' '.join(outcome.run.command)}\n".encode())
            output.flush()
            begin = output.tell()
            # A group of its own: workers end with it.
            with subprocess.Popen(
                outcome.run.command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            ) as process:
                try:
                    status = "passed" if process.wait(seconds) == 0 else "failed"
                except subprocess.TimeoutExpired:
                    status = "cut short"
                    _stop(process)
        outcome.status, outcome.seconds = status, time.monotonic() - start
        outcome.report = _report(outcome.run.result)
        if status != "passed":
            outcome.tail = log.read_bytes()[begin:][-_TAIL:].decode(errors="replace")

    def _write(self) -> None:
        content = {
            "environment": self.environment,
            "bars": [asdict(bar) for bar in self.bars],
            "runs": [_json(outcome) for outcome in self.outcomes],
        }
        partial = self.folder / f"{FILE}.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.folder / FILE)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a run and the processes that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(_STOPPING)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    process.wait()


def _report(path: Path | None) -> Report | None:
    try:
        return None if path is None else load_report(path)
    except ResultsError:
        return None


def _json(outcome: Outcome) -> dict[str, Any]:
    found = {"stage": outcome.run.stage, "name": outcome.run.name, "command": list(outcome.run.command)}
    found |= {"status": outcome.status, "seconds": round(outcome.seconds, 1), "tail": outcome.tail}
    return found | {"report": None if outcome.report is None else outcome.report.to_json()}
