"""From a graph to a plan: read, solve, and say what was decided and why."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.fx import Node

from fxpasses.devices.profile import DeviceProfile
from fxpasses.devices.sizes import Seconds
from fxpasses.graph.context import GraphContext
from fxpasses.graph.layouts import C, L, Label
from fxpasses.graph.locations import location_of
from fxpasses.graph.metadata import tensor, value
from fxpasses.graph.names import base_name, canonical
from fxpasses.passes.layout.boundary import Boundary, boundary_of
from fxpasses.passes.layout.causes import Causes
from fxpasses.passes.layout.convolutions import is_weight_of, read_convolution
from fxpasses.passes.layout.costs import PRODUCT, CostModel, seconds_at
from fxpasses.passes.layout.entries import fixed
from fxpasses.passes.layout.network import Network, Tensor
from fxpasses.passes.layout.preferences import preferences
from fxpasses.passes.layout.problem import FIXED_C, FIXED_L, Problem
from fxpasses.passes.layout.reading import read_network
from fxpasses.passes.layout.solve import solve
from fxpasses.passes.layout.tuning import Tuner
from fxpasses.report.layout_plan import BoundaryTensor, ConvolutionPlan, CutEdge, Flip, LayoutPlan
from fxpasses.torch_internals.pytree import tree_leaves
from fxpasses.torch_internals.sizes import size_hint, symbol_values

_OF_ANY_LABELS = (
    "source",
    "planning_seconds",
    "tuning",
    "stock",
    "otherwise_seconds",
    "uncertainty",
    "sizes",
)
"""What a plan says that does not depend on which labels it gives."""

Goal = Literal["auto", "channels_last", "contiguous"]

_CORNERS = 3
"""Of how many size symbols the corners are visited; their number is two to the power of it."""

_FAR = 16
"""How far from its hint a size without an upper bound is tried."""


@dataclass(frozen=True)
class Assignment:
    """A solved network.

    Attributes:
        network: the graph as a problem.
        problem: the same in numbers.
        labels: of each variable.
        plan: the same as data.
        hints: the values of the size symbols when the graph was traced.
        names: what the user calls the graph's inputs.
    """

    network: Network
    problem: Problem
    labels: tuple[Label, ...]
    plan: LayoutPlan
    hints: Mapping[Any, int]
    names: Mapping[str, str]

    def label(self, node: Node) -> Label:
        """The label that a labelled operator works in."""
        return self.labels[self.network.find(self.network.variables[node])]

    def with_plan(self, **fields: Any) -> Assignment:
        """The same with other fields of the plan."""
        return replace(self, plan=replace(self.plan, **fields))

    def relabelled(self, labels: Sequence[Label]) -> Assignment:
        """The same network with other labels."""
        described = _describe(self.network, self.problem, labels, self.hints, self.names)
        kept = {name: getattr(self.plan, name) for name in _OF_ANY_LABELS}
        return replace(self, labels=tuple(labels), plan=replace(described, **kept))

    def keeping(self, nodes: Iterable[Node]) -> Assignment | None:
        """The same, but that tensors keep the label that they were traced with.

        Args:
            nodes: what makes them; of each that has its label or none, what it is made of is kept.

        Returns:
            None where nothing is left to be kept.
        """
        moved = [held for held in map(self._moved, nodes) if held is not None]
        if not moved:
            return None
        for held in moved:
            self.network.unify(held.producer, fixed(held.original))
        labels = list(self.labels)
        labels[FIXED_C], labels[FIXED_L] = C, L
        _follow_representatives(self.network, labels)
        return replace(self, problem=self.network.problem(self.hints)).relabelled(labels)

    def _moved(self, node: Node) -> Tensor | None:
        """The tensor of a node, or the nearest that it is made of, that has another label than traced."""
        while True:
            held = self.network.tensors.get(node)
            if held is not None and self.made(held) != held.original:
                return held
            above = node.args[0] if node.args else None
            if not isinstance(above, Node):
                return None
            node = above

    def is_product(self, node: Node) -> bool:
        """Whether a convolution is to be computed as a matrix product."""
        costs = self.network.convolutions.get(node)
        return costs is not None and costs[self.label(node)].implementation == PRODUCT

    def made(self, held: Tensor) -> Label:
        """The label that a tensor is made in."""
        return self.labels[self.network.find(held.producer)]


def assign(
    context: GraphContext,
    goal: Goal = "auto",
    profile: DeviceProfile | None = None,
    names: Mapping[str, str] | None = None,
    tuner: Tuner | None = None,
    boundary: Boundary | None = None,
) -> Assignment:
    """Gives every tensor of a graph a label.

    Args:
        context: a graph whose nodes carry metadata.
        goal: ``"auto"`` for the labelling of least predicted cost, or one label for all that is free.
        profile: what was measured on the device; None for the roofline alone.
        names: what the user calls the graph's inputs, where that is not what the graph calls them.
        tuner: measures what the plan depends on and the profile does not say; None to measure nothing.
        boundary: which results the plan may lay out; None for none.

    Raises:
        UnplannableError: the graph's writes tie tensors of different layouts together.
    """
    start = time.perf_counter()
    device = device_of(context)
    symbols = _symbols(context)
    hints = {symbol: hint for symbol, (hint, _, _) in symbols.items()}
    generates = context.executor == "fused" and device.type == "cuda"
    costs = CostModel(device.type, profile, hints, generates)
    network = read_network(context, costs, boundary or boundary_of(context))
    tuning = tuner.tune(network, costs, hints) if tuner is not None and goal == "auto" else None
    problem = network.problem(hints)
    labels = solve(problem) if goal == "auto" else network.uniform(goal)
    _follow_representatives(network, labels)
    plan = _describe(network, problem, labels, hints, names or {})
    plan = replace(
        plan,
        sizes=_flips(network, labels, symbols) if goal == "auto" else (),
        source=f"profile of {costs.profile.device}" if costs.profile else "roofline",
        planning_seconds=time.perf_counter() - start - (tuning.seconds if tuning else 0.0),
        tuning=tuning,
    )
    return Assignment(network, problem, tuple(labels), plan, hints, names or {})


def device_of(context: GraphContext) -> torch.device:
    """The device of the graph's first tensor."""
    for node in context.graph.nodes:
        for leaf in tree_leaves(value(node)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                return leaf.device
    return torch.device("cpu")


def _symbols(context: GraphContext) -> dict[Any, tuple[int, float, float]]:
    """The graph's size symbols: value when traced, and range."""
    for node in context.graph.find_nodes(op="placeholder"):
        found = tensor(node)
        sizes = found.shape if found is not None else (value(node),)
        for size in sizes:
            if isinstance(size, torch.SymInt):
                return symbol_values(size)
    return {}


def _follow_representatives(network: Network, labels: list[Label]) -> None:
    for variable in range(len(labels)):
        labels[variable] = labels[network.find(variable)]


def _describe(
    network: Network,
    problem: Problem,
    labels: Sequence[Label],
    hints: Mapping[Any, int],
    names: Mapping[str, str],
) -> LayoutPlan:
    made = {node: labels[held.producer] for node, held in network.tensors.items()}
    causes = Causes(network)
    edges = tuple(
        _edge(network, held, labels, hints, names, causes)
        for held in network.tensors.values()
        if any(labels[variable] != labels[held.producer] for _, variable in held.users)
    )
    wanting = {name for edge in edges for name in edge.wanted_by}
    convolutions = tuple(
        ConvolutionPlan(
            node.name,
            labels[network.variables[node]],
            costs[labels[network.variables[node]]].implementation,
            seconds_at(costs[C].seconds, hints),
            seconds_at(costs[L].seconds, hints),
            costs[C].is_measured and costs[L].is_measured,
            costs[C].is_predicted or costs[L].is_predicted,
            _flops(node, hints),
        )
        for node, costs in network.convolutions.items()
    )
    return LayoutPlan(
        labels={node.name: label for node, label in made.items()},
        convolutions=convolutions,
        cut_edges=edges,
        seconds=problem.energy(labels),
        contiguous_seconds=_uniform_energy(network, problem, C),
        channels_last_seconds=_uniform_energy(network, problem, L),
        converted=sum(made[node] != held.original for node, held in network.tensors.items()),
        weights=_weights(network, labels, names),
        boundary=_boundary(network, made, names),
        causes=dict(Counter(edge.cause for edge in edges)),
        forcing=dict(Counter(edge.forcing for edge in edges if edge.forcing)),
        forced_by_unknown=tuple(
            sorted({base_name(node) for node in network.unknown if _reader_name(node) in wanting})
        ),
    )


def _flops(node: Node, hints: Mapping[Any, int]) -> float:
    """Multiplications and additions of a convolution, or of the gradients of one."""
    found = read_convolution(node)
    return len(found.directions) * seconds_at(found.sizes.flops, hints) if found is not None else 0.0


def _boundary(
    network: Network, made: Mapping[Node, Label], names: Mapping[str, str]
) -> tuple[BoundaryTensor, ...]:
    """The images that the graph takes and gives."""
    found = []
    for node in network.boundary.inputs:
        if node in made and not any(is_weight_of(node, user) for user in node.users):
            name = names.get(node.name, node.name)
            found.append(BoundaryTensor(name, "input", made[node], made[node]))
    for node in network.boundary.results:
        if node in made:
            eager = network.tensors[node].original
            label = made[node] if node in network.free else eager
            found.append(BoundaryTensor(node.name, "result", label, eager))
    return tuple(found)


def _weights(network: Network, labels: Sequence[Label], names: Mapping[str, str]) -> dict[str, Label]:
    """The label that all its readers want an input in that is the weight of convolutions, by its name."""
    found: dict[str, Label] = {}
    for node, held in network.tensors.items():
        if node.op not in ("placeholder", "get_attr"):
            continue
        wanted = {labels[variable] for _, variable in held.users}
        if len(wanted) == 1 and all(is_weight_of(node, user) for user, _ in held.users):
            name = str(node.target)
            found[canonical(names.get(name, name))] = wanted.pop()
    return found


def _uniform_energy(network: Network, problem: Problem, label: Label) -> float:
    labels = network.uniform(label)
    _follow_representatives(network, labels)
    labels[FIXED_C], labels[FIXED_L] = C, L
    return problem.energy(labels)


def _edge(
    network: Network,
    held: Tensor,
    labels: Sequence[Label],
    hints: Mapping[Any, int],
    names: Mapping[str, str],
    causes: Causes,
) -> CutEdge:
    made = labels[held.producer]
    wanting = [user for user, variable in held.users if labels[variable] != made]
    keeping = [user for user, variable in held.users if labels[variable] == made]
    found = tensor(held.node)
    other = L if made == C else C
    cause = causes.of(held.node, wanting[0])

    def seconds(cost: Seconds) -> float:
        return seconds_at(cost, hints)

    return CutEdge(
        tensor=names.get(held.node.name, held.node.name),
        operator=base_name(held.node),
        size=tuple(map(size_hint, found.shape)) if found is not None else (),
        made=made,
        seconds=seconds_at(held.to_channels_last if made == C else held.to_contiguous, hints),
        wanted_by=tuple(map(_reader_name, wanting)),
        kept_by=tuple(map(_reader_name, keeping)),
        made_for=preferences(network, labels, [held.node, *keeping], made, None, seconds),
        wanted_for=preferences(network, labels, wanting, other, held.node, seconds),
        location=location_of(held.node),
        node=held.node.name,
        cause=cause.name,
        forcing=cause.forcing.name if cause.forcing is not None else "",
    )


def _reader_name(node: Node) -> str:
    name = base_name(node)
    return node.name if node.name.startswith(name) else f"{node.name} ({name})"


def _flips(
    network: Network, labels: Sequence[Label], symbols: Mapping[Any, tuple[int, float, float]]
) -> tuple[Flip, ...]:
    """The plan at the corners of the range of sizes, solved again."""
    corners: dict[Any, tuple[int, ...]] = {}
    for symbol, (hint, low, high) in list(symbols.items())[:_CORNERS]:
        corners[symbol] = tuple(sorted({max(int(low), 2), int(min(high, hint * _FAR))}))
    if not corners:
        return ()
    flips = []
    for choice in itertools.product(*corners.values()):
        sizes = {symbol: hint for symbol, (hint, _, _) in symbols.items()} | dict(
            zip(corners, choice, strict=True)
        )
        problem = network.problem(sizes)
        best = solve(problem)
        _follow_representatives(network, best)
        least, ours = problem.energy(best), problem.energy(labels)
        names = {str(symbol): size for symbol, size in sizes.items()}
        flips.append(Flip(names, ours <= least * (1 + 1e-9) + 1e-12, ours, least))
    return tuple(flips)
