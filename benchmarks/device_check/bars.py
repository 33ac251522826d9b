"""What the results say of the bars: each with its figure, as far as it is known."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.device_check import networks
from benchmarks.device_check.plan import OURS, RACED, STOCK
from benchmarks.models.results import NoFigureError, Report

SLOWEST, REFUSED_MEAN, PEAK, STEP = 0.99, 1.15, 0.6, 1.0


@dataclass(frozen=True)
class Bar:
    """A bar and what is known of it.

    Attributes:
        asked: in words.
        figure: what was found; None where nothing was.
        holds: whether it is met; None where nothing was found.
        over: of how many cases the figure is.
    """

    asked: str
    figure: float | None
    holds: bool | None
    over: int


def bars_of(tests: Sequence[bool], speed: Mapping[str, Report], memory: Report | None) -> list[Bar]:
    """The bars.

    Args:
        tests: of each run of tests that ended, whether all passed.
        speed: the reports of the speed stage by name of the run, which says whether the batch was dynamic.
        memory: the report of the memory stage.
    """
    raced = _ratios(speed, RACED)
    refused = [
        ratio
        for (run, model), ratio in raced.items()
        if "dynamic" in run or any(model.endswith(f":{name}") for name in networks.REFUSED)
    ]
    slowest = min(raced.values(), default=None)
    mean = statistics.geometric_mean(refused) if refused else None
    peak, step = _memory(memory)
    return [
        Bar("pytest -m gpu: all pass", None, all(tests) if tests else None, len(tests)),
        _at_least(f"in the race, each model at least {SLOWEST} of stock", slowest, SLOWEST, len(raced)),
        _at_least(
            f"in the race, at least {REFUSED_MEAN} in the mean over refused layouts and dynamic batches",
            *(mean, REFUSED_MEAN, len(refused)),
        ),
        Bar(
            f"frozen training: peak memory at most {PEAK} of stock's",
            *(peak, None if peak is None else peak <= PEAK, int(peak is not None)),
        ),
        _at_least(f"frozen training: a step at least {STEP} of stock", step, STEP, int(step is not None)),
    ]


def _at_least(asked: str, figure: float | None, bound: float, over: int) -> Bar:
    return Bar(asked, figure, None if figure is None else figure >= bound, over)


def _ratios(reports: Mapping[str, Report], name: str) -> dict[tuple[str, str], float]:
    found = {}
    for run, report in reports.items():
        for model in report.models:
            try:
                found[run, model.model] = model.ratio(name, STOCK).value
            except NoFigureError:
                continue
    return found


def _memory(report: Report | None) -> tuple[float | None, float | None]:
    """Ours over stock's peak, and stock's time over ours."""
    for model in report.models if report else ():
        try:
            ours, stock = model.variant(OURS), model.variant(STOCK)
            peak = ours.peak_bytes / stock.peak_bytes if ours.peak_bytes and stock.peak_bytes else None
            return peak, model.ratio(OURS, STOCK).value
        except NoFigureError:
            continue
    return None, None
