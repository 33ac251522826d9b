"""Timing callables of one process in turns, so that a drift of the machine hits all of them alike.

A round takes one sample of every callable, in random order; samples of one round may be compared as pairs.
A sample is the mean over enough calls to outlast the clock's resolution. On a CUDA device the calls are
queued behind a kernel that sleeps, so that their launches are over when the first one starts and the
device's time is what the events see.
"""

from __future__ import annotations

import math
import random
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fxpasses.torch_internals.cuda import cuda_sleep

_MOST_QUEUED = 200  # CUDA's launch queue holds about a thousand kernels, and a call may be several
_FASTEST_CLOCK = 2.5e9  # cycles a second: an upper bound only makes the device sleep longer than it had to


@dataclass(frozen=True)
class Effort:
    """How much time to spend.

    Attributes:
        rounds: samples of every callable, at most.
        sample_seconds: how long one sample should last at least.
        case_seconds: once all rounds together would take longer, there are fewer, down to `least`.
        least: rounds, whatever they take.
    """

    rounds: int = 20
    sample_seconds: float = 2e-3
    case_seconds: float = 2.0
    least: int = 6


def measure_interleaved(
    callables: Mapping[str, Callable[[], object]], device: torch.device, effort: Effort
) -> dict[str, list[float]]:
    """Seconds of one call of each, one value a round, all lists of the same length.

    Args:
        callables: what to time, by name.
        device: where they run.
        effort: how often.
    """
    if not callables:
        return {}
    sample = _cuda_sample if device.type == "cuda" else _cpu_sample
    numbers, estimate = {}, 0.0
    for name, function in callables.items():
        function()  # caches, autotuning and allocations are not what is measured
        once = sample(function, 1)
        numbers[name] = max(1, math.ceil(effort.sample_seconds / max(once, 1e-7)))
        if device.type == "cuda":
            numbers[name] = min(numbers[name], _MOST_QUEUED)
        estimate += once * numbers[name]
    least = min(effort.rounds, effort.least)
    rounds = max(least, min(effort.rounds, int(effort.case_seconds / max(estimate, 1e-9))))
    order, shuffled = list(callables), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in callables}
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            times[name].append(sample(callables[name], numbers[name]))
    return times


def _cpu_sample(function: Callable[[], object], number: int) -> float:
    return timeit.Timer(function).timeit(number) / number


def _cuda_sample(function: Callable[[], object], number: int) -> float:
    start, end = _event(), _event()
    torch.cuda.synchronize()
    queued = timeit.Timer(function).timeit(number)  # also fills the caches, as the calls before it would
    torch.cuda.synchronize()
    cuda_sleep(int(1.5 * queued * _FASTEST_CLOCK) + 100_000)
    start.record()
    for _ in range(number):
        function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / number


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
