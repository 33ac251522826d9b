"""What the parts of several runtimes say of layers: rows of equal layers, and totals by kind.

    groups    layers that some runtime computes in one part belong together, in all runtimes
    rows      groups of layers of equal sizes
    lost      our seconds less those of the better peer, turn by turn

A runtime has no seconds for a group where one of its layers is in no part that is certain to be its own. What
a call takes beside its parts is `outside`; profiles add a little to each part, so that this may be negative.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx
import numpy as np

from benchmarks.layers.layer import KINDS, Layer
from benchmarks.layers.part import OTHERS, Part
from benchmarks.layers.runtimes import OURS, PEERS
from benchmarks.shared.statistics import Summary, summarize

Seconds = tuple[float, ...]
"""Of each turn."""

SEVERAL, NOT_MATCHED, OUTSIDE = "several at once", "not matched", "outside"
TOTALS = (*KINDS, SEVERAL, NOT_MATCHED, *OTHERS, OUTSIDE)
"""The kinds of totals, in the order of the table."""


@dataclass(frozen=True)
class Measured:
    """What one runtime told of one model.

    Attributes:
        wholes: seconds of a call that was not profiled, of each turn.
        turns: the parts of each turn.
        failure: why there is nothing, if there is nothing.
    """

    wholes: Seconds = ()
    turns: tuple[tuple[Part, ...], ...] = ()
    failure: str = ""


@dataclass(frozen=True)
class Row:
    """Groups of layers of equal sizes.

    Attributes:
        sizes: those of the layers of one group, in words.
        kind: of `TOTALS`.
        names: of the layers of each group.
        flops, num_bytes: of all groups together.
        seconds: of all groups together, by runtime; a runtime that is not there is not matched.
        kernels: which compute them, by runtime.
    """

    sizes: tuple[str, ...]
    kind: str
    names: tuple[tuple[str, ...], ...]
    flops: int
    num_bytes: int
    seconds: Mapping[str, Seconds]
    kernels: Mapping[str, tuple[str, ...]]

    def summary(self, runtime: str) -> Summary | None:
        """The seconds of a runtime; None where it is not matched."""
        return summarize(self.seconds[runtime]) if runtime in self.seconds else None

    @property
    def lost(self) -> Summary | None:
        """Seconds that ours takes more than the better peer; None without one."""
        better = better_of([self.seconds[peer] for peer in PEERS if peer in self.seconds])
        if better is None or OURS not in self.seconds:
            return None
        return summarize(np.subtract(self.seconds[OURS], better).tolist())


@dataclass(frozen=True)
class ModelTable:
    """What is known of one model.

    Attributes:
        model: its specification.
        layers: how many it has.
        rows: of layers.
        totals: seconds of each turn by kind and runtime.
        wholes: seconds of a call by runtime.
        not_matched: the names of parts that may be layers, and it is not certain which, by runtime.
        not_found: the names of layers that no part is certain to compute, by runtime. A runtime may do their
            work in a kernel of another kind.
        failures: why a runtime has nothing.
    """

    model: str
    layers: int = 0
    rows: tuple[Row, ...] = ()
    totals: Mapping[str, Mapping[str, Seconds]] = field(default_factory=dict)
    wholes: Mapping[str, Seconds] = field(default_factory=dict)
    not_matched: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    not_found: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)

    def losing_most(self, count: int) -> list[Row]:
        """The rows that lose most, those that lose nothing left out."""
        lost = {row.sizes: row.lost for row in self.rows}
        medians = {sizes: summary.median for sizes, summary in lost.items() if summary is not None}
        rows = [row for row in self.rows if medians.get(row.sizes, 0.0) > 0]
        return sorted(rows, key=lambda row: -medians[row.sizes])[:count]


def better_of(several: Sequence[Seconds]) -> Seconds | None:
    """Whichever has the smaller median; None of none."""
    return min(several, key=lambda seconds: float(np.median(seconds)), default=None)


def table_of(model: str, layers: Sequence[Layer], measured: Mapping[str, Measured]) -> ModelTable:
    """The table of a model.

    Args:
        model: its specification.
        layers: in order of execution.
        measured: by runtime.
    """
    known = {runtime: one for runtime, one in measured.items() if not one.failure}
    groups = _groups(len(layers), [part for one in known.values() for part in one.turns[0]])
    seconds = {runtime: _by_group(groups, one.turns) for runtime, one in known.items()}
    rows = _rows(layers, groups, seconds, known)
    return ModelTable(
        model,
        len(layers),
        rows,
        _totals(layers, groups, seconds, known),
        {runtime: one.wholes for runtime, one in known.items()},
        {runtime: _unmatched(one.turns[0]) for runtime, one in known.items()},
        {runtime: _not_found(layers, one.turns[0]) for runtime, one in known.items()},
        {runtime: one.failure for runtime, one in measured.items() if one.failure},
    )


def _unmatched(parts: Sequence[Part]) -> tuple[str, ...]:
    return tuple(part.name for part in parts if part.layers is None)


def _not_found(layers: Sequence[Layer], parts: Sequence[Part]) -> tuple[str, ...]:
    found = {position for part in parts for position in part.layers or ()}
    return tuple(layer.name for position, layer in enumerate(layers) if position not in found)


Groups = tuple[tuple[int, ...], ...]


def _groups(count: int, parts: Sequence[Part]) -> Groups:
    """Layers that belong together, in order of execution."""
    graph = nx.Graph()
    graph.add_nodes_from(range(count))
    for part in parts:
        nx.add_path(graph, part.layers or ())
    return tuple(sorted(tuple(sorted(group)) for group in nx.connected_components(graph)))


def _by_group(groups: Groups, turns: Sequence[Sequence[Part]]) -> dict[tuple[int, ...], Seconds]:
    """The seconds of each group that is all there."""
    of_layer = {layer: group for group in groups for layer in group}
    found: dict[tuple[int, ...], Seconds] = {}
    covered = {layer for part in turns[0] for layer in part.layers or ()}
    sums = [defaultdict[tuple[int, ...], float](float) for _ in turns]
    for turn, parts in zip(sums, turns, strict=True):
        for part in parts:
            if part.layers:
                turn[of_layer[part.layers[0]]] += part.seconds
    for group in groups:
        if covered.issuperset(group):
            found[group] = tuple(turn[group] for turn in sums)
    return found


def _rows(
    layers: Sequence[Layer],
    groups: Groups,
    seconds: Mapping[str, Mapping[tuple[int, ...], Seconds]],
    measured: Mapping[str, Measured],
) -> tuple[Row, ...]:
    equal: dict[tuple[str, ...], list[tuple[int, ...]]] = defaultdict(list)
    for group in groups:
        equal[tuple(layers[position].sizes for position in group)].append(group)
    rows = []
    for sizes, same in equal.items():
        of_row = [position for group in same for position in group]
        rows.append(
            Row(
                sizes,
                _kind(layers, same[0]),
                tuple(tuple(layers[position].name for position in group) for group in same),
                sum(layers[position].flops for position in of_row),
                sum(layers[position].num_bytes for position in of_row),
                {
                    runtime: tuple(np.sum([found[group] for group in same], axis=0).tolist())
                    for runtime, found in seconds.items()
                    if all(group in found for group in same)
                },
                {runtime: _kernels(set(of_row), one.turns[0]) for runtime, one in measured.items()},
            )
        )
    return tuple(rows)


def _kernels(positions: set[int], parts: Sequence[Part]) -> tuple[str, ...]:
    """Names of kernels, each with how often it is there."""
    counts = Counter(part.kernel for part in parts if positions.intersection(part.layers or ()))
    return tuple(f"{count} x {name}" for name, count in sorted(counts.items()))


def _kind(layers: Sequence[Layer], group: Sequence[int]) -> str:
    kinds = {layers[position].kind for position in group}
    return kinds.pop() if len(kinds) == 1 else SEVERAL


def _totals(
    layers: Sequence[Layer],
    groups: Groups,
    seconds: Mapping[str, Mapping[tuple[int, ...], Seconds]],
    measured: Mapping[str, Measured],
) -> dict[str, dict[str, Seconds]]:
    """By kind and runtime; each runtime's add up to its whole.

    A layer counts as its kind where all runtimes have it, else as not matched.
    """
    kinds = {
        position: _kind(layers, group)
        for group in groups
        if all(group in found for found in seconds.values())
        for position in group
    }
    totals: dict[str, dict[str, Seconds]] = {kind: {} for kind in TOTALS}
    for runtime, one in measured.items():
        sums = {kind: np.zeros(len(one.turns)) for kind in TOTALS}
        for turn, parts in enumerate(one.turns):
            for part in parts:
                of_layers = kinds.get(part.layers[0], NOT_MATCHED) if part.layers else NOT_MATCHED
                sums[part.kind or of_layers][turn] += part.seconds
        sums[OUTSIDE] = np.asarray(one.wholes) - sum(sums.values())
        for kind, total in sums.items():
            totals[kind][runtime] = tuple(total.tolist())
    return totals
