"""Hazards of any pattern: what must hold before matched nodes may be replaced by others.

- What is computed inside the pattern is read inside it only.
- All of it runs in one grad mode, autocast state, functorch level and stream, and so will the replacement.
- Nothing that it reads is written to between its first node and the place of the replacement.
- Nobody can tell whether a result shares storage with an operand, or it shares as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxpasses.graph.decline import Decline
from fxpasses.graph.modes import difference
from fxpasses.graph.operands import Operand
from fxpasses.rewrite.rule import Match
from fxpasses.torch_internals.fake_tensors import FakeTensorMode
from fxpasses.torch_internals.tensors import storage_key

MODE_CODES = {
    "grad": "grad-mode",
    "functorch": "functorch",
    "other": "region",
    "stream": "stream",
    "autocast": "autocast",
}


@dataclass(frozen=True)
class Aliasing:
    """How the replacement shares storage otherwise than the pattern.

    Attributes:
        operands: pairs of a result's index and a parameter whose storage only one of the two shares.
        results: pairs of results that share storage in only one of the two.
    """

    operands: frozenset[tuple[int, str]] = frozenset()
    results: frozenset[tuple[int, int]] = frozenset()


def aliasing_of(
    pattern: Callable[..., Any],
    replacement: Callable[..., Any],
    given: Mapping[str, Any],
    mode: FakeTensorMode,
) -> Aliasing:
    """How two functions of the same fake tensors differ in what shares storage."""
    with torch.no_grad(), mode:
        found = [_shared(function(**given), given) for function in (pattern, replacement)]
    (operands, results), (other_operands, other_results) = found
    return Aliasing(operands ^ other_operands, results ^ other_results)


def _shared(
    returned: Any, given: Mapping[str, Any]
) -> tuple[frozenset[tuple[int, str]], frozenset[tuple[int, int]]]:
    outputs = returned if isinstance(returned, (tuple, list)) else (returned,)
    keys = [storage_key(output) if isinstance(output, torch.Tensor) else None for output in outputs]
    inputs = {name: storage_key(tensor) for name, tensor in given.items() if isinstance(tensor, torch.Tensor)}
    operands = frozenset(
        (index, name) for index, key in enumerate(keys) for name, other in inputs.items() if key == other
    )
    pairs = frozenset(
        (first, second)
        for second in range(len(keys))
        for first in range(second)
        if keys[first] == keys[second]
    )
    return operands, pairs


def place_of(nodes: Sequence[Node], results: Sequence[Node], operands: Sequence[Operand]) -> Node | Decline:
    """The node before which a replacement of all results can stand: operands before it, readers after it."""
    inputs = [operand for operand in operands if isinstance(operand, Node) and operand.op != "get_attr"]
    first = min(results)
    if all(node < first for node in inputs):
        return first
    matched = set(nodes)
    readers = [user for result in results for user in result.users if user not in matched]
    place = min(readers) if readers else max(results)
    late = next((node for node in inputs if not node < place), None)
    if late is None:
        return place
    return Decline("order", "{} is computed only after a result has been read", late, (late.name,))


def first_hazard(
    match: Match,
    place: Node | Decline,
    operands: Sequence[Operand],
    holes: Mapping[str, Any],
    aliasing: Aliasing,
) -> Decline | None:
    """The first reason why the match must not be replaced, or None."""
    if isinstance(place, Decline):
        return place
    found = _inside_read_elsewhere(match)
    # A Decline is falsy, so `or` would throw it away.
    found = _other_modes(match, place) if found is None else found
    found = _written(match, place, operands) if found is None else found
    return _aliasing_seen(match, holes, aliasing) if found is None else found


def _inside_read_elsewhere(match: Match) -> Decline | None:
    matched, results = set(match.nodes), set(match.results)
    for node in match.nodes:
        if node in results:
            continue
        other = next((user for user in node.users if user not in matched), None)
        if other is not None:
            message = "the result of {} is also used by {}"
            return Decline("multiple-users", message, other, (node.name, other.name))
    return None


def _other_modes(match: Match, place: Node) -> Decline | None:
    modes = match.context.modes(match.nodes[0])
    for node in (*match.nodes[1:], place):
        apart = difference(modes, match.context.modes(node))
        if apart is not None:
            message = "{} and {} stand under another {} mode"
            details = (match.nodes[0].name, node.name, apart)
            return Decline(MODE_CODES[apart], message, node, details)
    return None


def _written(match: Match, place: Node, operands: Sequence[Operand]) -> Decline | None:
    last = max(place, match.nodes[-1])
    written = match.context.written_between(operands, match.nodes[0], last)
    if written is None:
        return None
    message = "{} may write to something that {} reads, before {} runs"
    return Decline("mutation", message, written, (written.name, match.nodes[0].name, last.name))


def _aliasing_seen(match: Match, holes: Mapping[str, Any], aliasing: Aliasing) -> Decline | None:
    """Whether a change of what shares storage could be noticed: by a write, or by the user."""
    pairs: list[tuple[Node, Operand]] = [(match.results[i], holes[name]) for i, name in aliasing.operands]
    pairs += [(match.results[i], match.results[j]) for i, j in aliasing.results]
    end = match.context.graph.find_nodes(op="output")[0]
    for result, other in pairs:
        written = match.context.written_between((result, other), match.nodes[0], end)
        if written is not None:
            message = (
                "{} would share storage with an operand, or no longer would, and {} writes to one of them"
            )
            return Decline("aliasing", message, written, (result.name, written.name))
        if _visible(match, result) and _visible(match, other):
            message = "{} would share storage with an operand, or no longer would, and the user sees both"
            return Decline("aliasing", message, result, (result.name,))
    return None


def _visible(match: Match, operand: Operand) -> bool:
    """Whether a tensor's storage is known outside the graph: it is returned, given, or a parameter's."""
    graph = match.context.graph
    if not isinstance(operand, Node):
        return True
    outside = [*graph.find_nodes(op="placeholder"), *graph.find_nodes(op="get_attr")]
    outside += graph.find_nodes(op="output")[0].all_input_nodes
    return any(match.context.may_alias(node, operand) for node in outside if node is not operand) or (
        operand.op in ("placeholder", "get_attr") or any(user.op == "output" for user in operand.users)
    )
