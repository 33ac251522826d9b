"""By how much a plan wins, how sure that is, and what would have to cost how much more for it to be another.

gain          E(what would be done otherwise) - E(plan)
uncertainty   of that difference: costs that were not measured, under the labels in which the two differ
nearest flip  the convolution whose cost, under its label, may grow by the least before another plan wins
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import Node

from fxpasses.graph.layouts import C, L, Label
from fxpasses.passes.layout.costs import seconds_at
from fxpasses.passes.layout.network import Network, Tensor
from fxpasses.passes.layout.problem import FIXED_C, FIXED_L, Problem, Value, copy_seconds
from fxpasses.passes.layout.solve import solve
from fxpasses.report.layout_plan import NearestFlip

_LOOKED_AT = 3
"""Of how many convolutions it is found out exactly: those that seem the nearest when they flip alone."""


def uncertainty(
    network: Network, first: Sequence[Label], second: Sequence[Label], hints: Mapping[Any, int]
) -> float:
    """How many seconds the difference between two labellings may be off, as errors of one sign are rare.

    Args:
        network: the graph as a problem.
        first: one labelling.
        second: another.
        hints: the values of the size symbols.
    """
    squares = 0.0
    for node in network.priced:
        variable = network.variables[node]
        place = network.find(variable)
        if first[place] != second[place]:
            both = zip(network.own(variable), network.factors(variable), strict=True)
            squares += sum((seconds_at(seconds, hints) * (factor - 1)) ** 2 for seconds, factor in both)
    for held in network.tensors.values():
        copied = [_copy_of(network, held, labels, hints) for labels in (first, second)]
        squares += ((copied[0] - copied[1]) * (held.factor - 1)) ** 2
    return math.sqrt(squares)


def _copy_of(network: Network, held: Tensor, labels: Sequence[Label], hints: Mapping[Any, int]) -> float:
    """What the copy of a tensor costs under a labelling; 0 where all agree."""
    made = labels[network.find(held.producer)]
    if all(labels[network.find(variable)] == made for _, variable in held.users):
        return 0.0
    return seconds_at(held.to_channels_last if made == C else held.to_contiguous, hints)


def nearest_flip(
    network: Network, problem: Problem, labels: Sequence[Label], hints: Mapping[Any, int]
) -> NearestFlip | None:
    """The convolution that comes nearest to changing the plan; None where none can.

    Args:
        network: the graph as a problem.
        problem: the same in numbers.
        labels: the plan.
        hints: the values of the size symbols.
    """
    touching: dict[int, list[Value]] = defaultdict(list)
    for value in problem.values:
        for variable in {value.producer, *value.users}:
            touching[variable].append(value)
    alone: list[tuple[float, float, int, Node]] = []
    for node, costs in network.convolutions.items():
        variable = network.find(network.variables[node]) if node in network.variables else FIXED_C
        if variable not in (FIXED_C, FIXED_L):
            seconds = seconds_at(costs[labels[variable]].seconds, hints)
            more = _flipped_alone(problem, labels, variable, touching[variable])
            alone.append((more / seconds, seconds, variable, node))
    alone.sort(key=lambda found: found[0])
    least = problem.energy(labels)
    exact = [
        NearestFlip(node.name, (_forced(problem, labels, variable) - least) / seconds)
        for _, seconds, variable, node in alone[:_LOOKED_AT]
    ]
    return min(exact, key=lambda found: found.slower, default=None)


def _flipped_alone(
    problem: Problem, labels: Sequence[Label], variable: int, values: Sequence[Value]
) -> float:
    """What it costs more if one variable takes the other label, and nothing else does."""
    flipped = list(labels)
    flipped[variable] = L if labels[variable] == C else C
    own = problem.channels_last[variable] - problem.contiguous[variable]
    copies = sum(copy_seconds(value, flipped) - copy_seconds(value, labels) for value in values)
    return copies + (own if labels[variable] == C else -own)


def _forced(problem: Problem, labels: Sequence[Label], variable: int) -> float:
    """The least energy of a labelling in which one variable has the other label."""
    contiguous, channels_last = list(problem.contiguous), list(problem.channels_last)
    kept = contiguous if labels[variable] == C else channels_last
    kept[variable] += 1 + sum(contiguous) + sum(channels_last)
    other = solve(Problem(contiguous, channels_last, problem.values))
    return problem.energy(other)
