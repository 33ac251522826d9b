"""The exact optimum, as a minimum cut (networkx).

The source side is L, the sink side is C. A variable's cost under C is an edge from the source (cut when the
variable is on the sink's side), its cost under L an edge to the sink. A value v with several users gets two
nodes of its own:

    v -> a [to_C],  a -> user [inf]        cut where v is L and some user is C
    user -> b [inf],  b -> v [to_L]        cut where v is C and some user is L

so its copy is paid once. Costs are rounded to femtoseconds, in which the arithmetic is exact. Among equal
optima the one with the fewest variables under L is taken: a change must pay.

Before the cut, variables without a cost of their own are merged with a neighbour where no optimum is lost:
with the producer of the only value that they read, when nobody else reads it and what they make costs no
more to copy; or with the only user of the one value that they make, when what they read costs no more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fxpasses.graph.layouts import C, L, Label
from fxpasses.passes.layout.problem import FIXED_C, FIXED_L, Problem, Value

if TYPE_CHECKING:
    import networkx

_UNITS = 1e15
"""How many units of cost a second is."""


def solve(problem: Problem) -> list[Label]:
    """A labelling of least energy: one label for each variable."""
    contracted = contract(problem)
    merged, representative = contracted
    sources = _source_side(merged)
    labels: list[Label] = [
        L if representative[variable] in sources else C for variable in range(problem.size)
    ]
    labels[FIXED_C], labels[FIXED_L] = C, L
    return labels


def contract(problem: Problem) -> tuple[Problem, list[int]]:
    """The problem after lossless merging, and each variable's representative in it."""
    parent = list(range(problem.size))

    def find(variable: int) -> int:
        while parent[variable] != variable:
            parent[variable] = parent[parent[variable]]
            variable = parent[variable]
        return variable

    reads, makes = _incidence(problem.values)
    for variable in range(FIXED_L + 1, problem.size):
        if problem.contiguous[variable] or problem.channels_last[variable]:
            continue
        if len(reads[variable]) != 1 or len(makes[variable]) != 1:
            continue
        read, made = reads[variable][0], makes[variable][0]
        if len(read.users) == 1 and _costs_no_more(made, read):
            parent[find(variable)] = find(read.producer)
        elif len(made.users) == 1 and _costs_no_more(read, made):
            parent[find(variable)] = find(made.users[0])
    merged = Problem([0.0] * problem.size, [0.0] * problem.size, [])
    for variable in range(problem.size):
        merged.contiguous[find(variable)] += problem.contiguous[variable]
        merged.channels_last[find(variable)] += problem.channels_last[variable]
    for value in problem.values:
        producer = find(value.producer)
        users = tuple(sorted({find(user) for user in value.users} - {producer}))
        if users:
            merged.values.append(Value(producer, users, value.to_contiguous, value.to_channels_last))
    return merged, [find(variable) for variable in range(problem.size)]


def _incidence(values: Iterable[Value]) -> tuple[dict[int, list[Value]], dict[int, list[Value]]]:
    """The values that each variable reads, and those that it makes."""
    reads: dict[int, list[Value]] = defaultdict(list)
    makes: dict[int, list[Value]] = defaultdict(list)
    for value in values:
        makes[value.producer].append(value)
        for user in value.users:
            reads[user].append(value)
    return reads, makes


def _costs_no_more(cheap: Value, dear: Value) -> bool:
    return cheap.to_contiguous <= dear.to_contiguous and cheap.to_channels_last <= dear.to_channels_last


def _source_side(problem: Problem) -> set[int]:
    """The variables under L in the optimum that has the fewest of them."""
    # Imported where it is used: `import fxpasses` is to be fast.
    import networkx
    from networkx.algorithms.flow import boykov_kolmogorov

    source, sink = -1, -2
    capacities: dict[tuple[int, int], int] = defaultdict(int)
    unlimited: list[tuple[int, int]] = []
    for variable in range(problem.size):
        gain = round(problem.contiguous[variable] * _UNITS) - round(problem.channels_last[variable] * _UNITS)
        capacities[source, variable] += max(gain, 0)
        capacities[variable, sink] += max(-gain, 0)
    fresh = problem.size
    for value in problem.values:
        to_c, to_l = round(value.to_contiguous * _UNITS), round(value.to_channels_last * _UNITS)
        if len(value.users) == 1:
            capacities[value.producer, value.users[0]] += to_c
            capacities[value.users[0], value.producer] += to_l
            continue
        a, b = fresh, fresh + 1
        fresh += 2
        capacities[value.producer, a] += to_c
        capacities[b, value.producer] += to_l
        unlimited.extend((a, user) for user in value.users)
        unlimited.extend((user, b) for user in value.users)
    graph: networkx.DiGraph[int] = networkx.DiGraph()
    graph.add_nodes_from((source, sink))
    graph.add_edges_from((u, v, {"capacity": c}) for (u, v), c in capacities.items() if c)
    # networkx takes an edge without a capacity for an unlimited one.
    graph.add_edges_from([*unlimited, (source, FIXED_L), (FIXED_C, sink)])
    residual = boykov_kolmogorov(graph, source, sink)
    return _reachable(residual, source)


def _reachable(residual: networkx.DiGraph[int], source: int) -> set[int]:
    """The nodes to which more could flow: the smallest source side of all minimum cuts."""
    seen, pending = {source}, [source]
    while pending:
        for found, edge in residual[pending.pop()].items():
            if found not in seen and edge["flow"] < edge["capacity"]:
                seen.add(found)
                pending.append(found)
    return seen
