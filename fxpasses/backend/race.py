"""The race: two programs compute the same, the user's calls go to them in turns, and the slower is dropped.

    call     1      2      3      4      5      6   ...    40 at most
    program  ours   stock  ours   stock  ours   stock
             (first calls: not timed)  └── a pair ──┘      ratio = ours / stock, of one signature

Both are right, so nothing is computed twice. In training a call is a whole step: what the forward took, and
what the backward of the same program took, which autograd runs later. When the interval of the ratio's
median leaves 1, the slower program is let go, and with it all that it holds; where none does, the one with
the smaller median stays.

The interval is the exact one of order statistics (W. J. Conover, "Practical Nonparametric Statistics", 3.2).
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxpasses.devices.profile import Verdict
from fxpasses.torch_internals.aot_autograd import backward_node

MOST_CALLS = 40
"""After so many calls the race is over, whatever is known."""

_UNTIMED = 1
"""How many calls of each program are not timed: caches fill and pages are faulted in."""
_FEWEST = 8
"""How many pairs a verdict takes: the interval of 8 is their range, with 99 % confidence."""
_CONFIDENCE = 0.95

Program = Callable[..., Any]


@dataclass
class _Sample:
    """One timed call.

    Attributes:
        name: of the program.
        signature: what calls must have in common to be compared.
        forward: seconds.
    """

    name: str
    signature: Hashable
    forward: float
    began: float = 0.0


class Race:
    """Calls programs in turns until one is known to be the fastest, and that one from then on."""

    def __init__(self, programs: Mapping[str, Program], decided: Callable[[Verdict], None]) -> None:
        """Args:
        programs: by name, the one that is compared with the others first.
        decided: is told the verdict, once.
        """
        self._programs = dict(programs)
        self._first = next(iter(self._programs))
        self._decided = decided
        self._calls = 0
        self._timed: dict[Hashable, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._winner: Program | None = None
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        winner = self._winner
        return winner(*args) if winner is not None else self._raced(args)

    def _raced(self, args: tuple[Any, ...]) -> Any:
        drawn = self._draw()
        if drawn is None:
            return self(*args)
        turn, name, program = drawn
        synchronise = _synchroniser(args)
        synchronise()
        start = time.perf_counter()
        result = program(*args)
        synchronise()
        sample = _Sample(name, _signature(args), time.perf_counter() - start)
        if turn >= _UNTIMED:
            node = backward_node(result) if torch.is_grad_enabled() else None
            if node is None:
                self._add(sample, sample.forward)
            else:
                self._follow(node, sample, synchronise)
        if self._calls >= MOST_CALLS:
            self._decide(over=True)
        return result

    def _draw(self) -> tuple[int, str, Program] | None:
        """The round and whose turn it is; None where another thread's call has decided the race."""
        with self._lock:
            if self._winner is not None:
                return None
            names = list(self._programs)
            turn, number = divmod(self._calls, len(names))
            self._calls += 1
            return turn, names[number], self._programs[names[number]]

    def _follow(self, node: Any, sample: _Sample, synchronise: Callable[[], None]) -> None:
        """Times the backward of a call when autograd gets to it."""

        def before(_: object) -> None:
            synchronise()
            sample.began = time.perf_counter()

        def after(*_: object) -> None:
            synchronise()
            if sample.began:
                self._add(sample, sample.forward + time.perf_counter() - sample.began)
                sample.began = 0.0

        node.register_prehook(before)
        node.register_hook(after)

    def _add(self, sample: _Sample, seconds: float) -> None:
        with self._lock:
            self._timed[sample.signature][sample.name].append(seconds)
        self._decide(over=False)

    def _decide(self, *, over: bool) -> None:
        with self._lock:
            if self._winner is not None:
                return
            others = [name for name in self._programs if name != self._first]
            ratios = {name: self._ratios(name) for name in others}
            verdicts = {name: verdict_of(self._first, name, found) for name, found in ratios.items() if found}
            for name, verdict in verdicts.items():
                if (over or verdict.is_certain) and len(ratios[name]) >= (1 if over else _FEWEST):
                    del self._programs[name if verdict.winner == self._first else self._first]
                    self._first = verdict.winner
                    break
            else:
                if not over:
                    return
                # Nothing could be timed: the first one stays.
                verdict = Verdict(self._first, others[0], 1.0, 0.0, math.inf, 0)
                for name in others:
                    del self._programs[name]
            if len(self._programs) > 1:
                return
            self._winner = self._programs[self._first]
            self._programs.clear()
            self._timed.clear()
        self._decided(verdict)

    def _ratios(self, other: str) -> list[float]:
        """The first program's time over another's, of calls that followed one another."""
        return [
            first / second
            for timed in self._timed.values()
            for first, second in zip(timed[self._first], timed[other], strict=False)
        ]


def verdict_of(first: str, other: str, ratios: Sequence[float]) -> Verdict:
    """Which of two programs is faster, by the median of the ratios of their times.

    Args:
        first: the name of one.
        other: that of the other.
        ratios: the time of the first over that of the other, a pair of calls each.
    """
    ordered = sorted(ratios)
    ratio = statistics.median(ordered)
    low, high = _interval(ordered)
    return Verdict(
        first if ratio <= 1 else other, other if ratio <= 1 else first, ratio, low, high, len(ordered)
    )


def _interval(ordered: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the median with the confidence wanted; unbounded where there are too few."""
    count = len(ordered)
    outside, at = 0.0, 0
    while True:
        outside += math.comb(count, at) / 2**count
        if 2 * outside > 1 - _CONFIDENCE or 2 * at >= count:
            break
        at += 1
    return (ordered[at - 1], ordered[count - at]) if at else (0.0, math.inf)


def _signature(args: Sequence[Any]) -> Hashable:
    """What decides how long a call takes: sizes, and whether gradients are on."""

    def kind(given: Any) -> Hashable:
        if isinstance(given, torch.Tensor):
            return tuple(given.shape)
        return given if isinstance(given, (int, float)) else str(type(given))

    return (tuple(map(kind, args)), torch.is_grad_enabled())


def _synchroniser(args: Sequence[Any]) -> Callable[[], None]:
    """Waits for what runs on a GPU; does nothing on a CPU."""
    on_gpu = any(isinstance(given, torch.Tensor) and given.is_cuda for given in args)
    return torch.cuda.synchronize if on_gpu else _nothing


def _nothing() -> None:
    pass
