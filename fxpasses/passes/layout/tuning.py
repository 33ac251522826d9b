"""Measuring while compiling: what a plan depends on and nobody has measured, the most doubtful first.

    costs with bounds ── cut as if C were as cheap as may be ──┐
                      └─ cut as if L were as cheap as may be ──┴─ where the two agree, nothing is in doubt

Costs that were not measured have bounds: a prediction's, or those around the roofline. The labels that the
two cuts give differently are in doubt, and so is whatever decides them. Of that, what could cost the most is
measured, and the cuts are made again, until they agree or the time is over.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fxpasses.devices.keys import bytes_key
from fxpasses.devices.measuring import Measurer, Timing
from fxpasses.devices.own import OwnStore
from fxpasses.devices.profile import LAYOUT_COPY, WEIGHT_COPY, Measurement, Roofline
from fxpasses.devices.store import DeviceProfileWarning
from fxpasses.graph.layouts import C, L
from fxpasses.graph.metadata import tensor
from fxpasses.passes.layout.convolutions import is_weight
from fxpasses.passes.layout.costs import CostModel, seconds_at
from fxpasses.passes.layout.measurable import Measurable
from fxpasses.passes.layout.network import Network
from fxpasses.passes.layout.prices import price_copies
from fxpasses.passes.layout.solve import solve
from fxpasses.report.layout_plan import Tuning
from fxpasses.torch_internals.sizes import size_hint

_SHARE = 0.05
"""Which part of the time is spent on measurements before the cuts are made again."""

_CALLS = 5
"""How often an operator is called under each label, at least, to be measured."""

_COPIES = [2**exponent for exponent in range(14, 33, 2)]
"""Bytes of the copies that are measured: those of other sizes lie between two of them."""


@dataclass
class Tuner:
    """Measures for one plan, and adds what it finds to the device's store.

    Attributes:
        store: where the rows go.
        device: where the graph runs.
        seconds: how long it may take.
        thorough: whether to measure also what the plan does not depend on, after what it does.
        progress: is told how many measurements are done, and how many there will be at most.
    """

    store: OwnStore
    device: torch.device
    seconds: float
    thorough: bool = False
    progress: Callable[[int, int], None] = lambda done, total: None
    _rows: list[Measurement] = field(default_factory=list)
    _peaks: list[Roofline] = field(default_factory=list)
    _measurers: dict[torch.dtype, Measurer] = field(default_factory=dict)
    _tried: set[tuple[str, str, str]] = field(default_factory=set)

    def tune(self, network: Network, costs: CostModel, hints: Mapping[Any, int]) -> Tuning:
        """Measures what could change the plan of a graph, and gives the network its new costs.

        Args:
            network: the graph as a problem, its costs from `costs`.
            costs: what they are asked of; it learns what is measured.
            hints: the values of the size symbols.
        """
        start = time.perf_counter()
        deadline = start + self.seconds
        with self.store.measuring(self.seconds):
            self._learn(network, costs)
            try:
                self._measure(network, costs, hints, deadline)
            except (RuntimeError, MemoryError) as error:  # such as a device without memory left
                warnings.warn(f"measuring was broken off: {error}", DeviceProfileWarning, stacklevel=2)
            self._measurers.clear()  # and with them the memory that they hold
            if self._rows or self._peaks:
                self.store.add(self._rows, self._peaks)
                self._learn(network, costs)
        left = len(self._missing(network, costs, hints))
        return Tuning(len(self._rows), time.perf_counter() - start, left)

    def _measure(self, network: Network, costs: CostModel, hints: Mapping[Any, int], deadline: float) -> None:
        if not self._missing(network, costs, hints):
            return
        self._measure_device(network, deadline)
        self._learn(network, costs)
        while True:
            before = time.perf_counter()
            missing = self._missing(network, costs, hints, deadline - before)
            now = time.perf_counter()
            if not missing or now >= deadline:
                return
            # No less time for measuring than finding out what to measure has taken.
            pause = now + max(_SHARE * self.seconds, now - before)
            for each in missing:
                if time.perf_counter() >= min(pause, deadline):
                    break
                self._add(each.measure(self._measurer(each.dtype)))
                self._tried.add(_identity(each))
                self.progress(len(self._tried), len(self._tried) + len(missing))
            self._learn(network, costs)

    def _missing(
        self, network: Network, costs: CostModel, hints: Mapping[Any, int], left: float = math.inf
    ) -> list[Measurable]:
        """What is to be measured and was not: that with the most seconds in doubt first.

        In doubt is what decides labels that may be either. The rest, if wanted, comes after it. What would
        take longer than the time that is `left` is left out.
        """
        as_c = solve(network.problem(hints, favoured=C))
        as_l = solve(network.problem(hints, favoured=L))
        seconds: dict[tuple[str, str, str], float] = {}
        found: dict[tuple[str, str, str], Measurable] = {}
        for node, priced in network.priced.items():
            variable = network.variables[node]
            place = network.find(variable)
            is_settled = as_c[place] == as_l[place]
            takes = _CALLS * sum(seconds_at(cost, hints) for cost in network.own(variable))
            if (is_settled and not self.thorough) or takes > left:
                continue
            for each in priced.measurable():
                name = _identity(each)
                if name not in self._tried and costs.lacks(each.operator, each.key, each.dtype):
                    found[name] = each
                    doubt = 0.0 if is_settled else _doubt(network, variable, hints)
                    seconds[name] = seconds.get(name, 0.0) + doubt
        return [found[name] for name in sorted(found, key=lambda name: -seconds[name])]

    def _measure_device(self, network: Network, deadline: float) -> None:
        """The peaks of the device, and copies up to the largest of the graph's, where they are not known."""
        profile = self.store.profile()
        known = {(row.operator, row.dtype, row.key) for row in profile.measurements}
        for (operator, dtype), most in _largest(network).items():
            name, measurer = str(dtype).removeprefix("torch."), self._measurer(dtype)
            if profile.roofline(name) is None and all(peaks.dtype != name for peaks in self._peaks):
                self._peaks.append(measurer.peaks())
            measure = measurer.weight_copy if operator == WEIGHT_COPY else measurer.copy
            for num_bytes in [] if network.generates else _COPIES:
                is_known = (operator, name, bytes_key(num_bytes)) in known
                if not is_known and time.perf_counter() < deadline:
                    self._add(measure(num_bytes))
                if num_bytes >= most:
                    break

    def _learn(self, network: Network, costs: CostModel) -> None:
        """Gives a network the costs that follow from what is known by now."""
        costs.learn(self.store.profile().merged(self.store.of(self._rows, self._peaks)))
        for node, priced in list(network.priced.items()):
            network.price(node, priced)
        for node, held in network.tensors.items():
            found = tensor(node)
            assert found is not None
            price_copies(held, found, costs)

    def _measurer(self, dtype: torch.dtype) -> Measurer:
        if dtype not in self._measurers:
            self._measurers[dtype] = Measurer(self.device, dtype)
        return self._measurers[dtype]

    def _add(self, timings: list[Timing]) -> None:
        self._rows += [timing.measurement() for timing in timings]


def _doubt(network: Network, variable: int, hints: Mapping[Any, int]) -> float:
    """How many seconds an operator's costs may differ by from what they are expected to be."""
    return sum(
        seconds_at(seconds, hints) * (factor - 1 / factor)
        for seconds, factor in zip(network.own(variable), network.factors(variable), strict=True)
    )


def _largest(network: Network) -> dict[tuple[str, torch.dtype], int]:
    """The bytes of the largest image and weight of each dtype that may be copied, by what copying it is."""
    found: dict[tuple[str, torch.dtype], int] = {}
    for node, held in network.tensors.items():
        given = tensor(node)
        if given is not None and held.users and given.is_floating_point():
            num_bytes = math.prod(map(size_hint, given.shape)) * given.dtype.itemsize
            kind = WEIGHT_COPY if is_weight(node) else LAYOUT_COPY, given.dtype
            found[kind] = max(found.get(kind, 0), num_bytes)
    return found


def _identity(given: Measurable) -> tuple[str, str, str]:
    return given.operator, given.key, str(given.dtype)
