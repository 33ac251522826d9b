"""Stable nodes: those that depend on parameters and constants alone, and that anyone may compute ahead.

    graph(parameters, x)  =  rest(parameters, x, prologue(parameters))

A node is stable where it is pure, deterministic and of static sizes, nothing in the graph writes to it, and
all that it reads is stable. The sources (parameters, buffers) are the first of them. Where all is done ahead,
a node may also be written to, as long as stable nodes alone do that, and before anyone else reads it:

    bias = clone(weight);  zero_(slice(bias, 4, 8));  linear(x, weight, bias)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxpasses.graph.context import GraphContext
from fxpasses.graph.metadata import tensor, value
from fxpasses.graph.modes import Modes, difference
from fxpasses.torch_internals.operators import is_deterministic, writes_in_place

aten = torch.ops.aten


def stable_nodes(
    context: GraphContext,
    sources: Iterable[Node],
    *,
    visible: Collection[Node] = (),
    ahead: bool = False,
) -> dict[Node, None]:
    """Nodes that depend on the sources and on constants alone, in program order, the sources first.

    Args:
        context: the graph.
        sources: parameters and buffers that nothing in the graph writes to.
        visible: nodes that are none, whatever they read.
        ahead: whether operators that give several tensors, such as `split`, and writes to tensors that
            stable nodes make are stable too.
    """
    sources = list(sources)
    excluded = set(visible)
    while True:
        stable = _reached(context, sources, excluded, ahead)
        disturbed = _disturbed(context, stable)
        if not disturbed:
            return stable
        excluded |= disturbed


def _reached(
    context: GraphContext, sources: Iterable[Node], excluded: Collection[Node], ahead: bool
) -> dict[Node, None]:
    stable: dict[Node, None] = dict.fromkeys(sources)
    for node in context.graph.nodes:
        if node.op not in ("call_function", "call_method") or node in excluded:
            continue
        if not node.all_input_nodes and node.target not in NUMBERS:
            continue
        known = all(operand in stable for operand in node.all_input_nodes)
        if known and _has_static_sizes(node, ahead) and _is_repeatable(node, context, ahead):
            stable[node] = None
    return stable


def _disturbed(context: GraphContext, stable: Collection[Node]) -> set[Node]:
    """The stable nodes whose memory others write to, or read before the last write."""
    disturbed: set[Node] = set()
    for node in stable:
        writers = context.writers_of(node)
        if writers and not (
            all(writer in stable for writer in writers)
            and all(user in stable or user > writers[-1] for user in node.users)
        ):
            disturbed.update(other for other in stable if context.writers_of(other) == writers)
    return disturbed


NUMBERS: frozenset[Any] = frozenset(
    {
        *(torch.eye, torch.full, torch.zeros, torch.ones, torch.arange),
        *(aten.eye.default, aten.eye.m, aten.full.default, aten.zeros.default, aten.ones.default),
        *(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.scalar_tensor.default),
    }
)
"""What makes a tensor out of numbers. Alone it is no parameter work; an identity that is folded in is."""


def _has_static_sizes(node: Node, several: bool) -> bool:
    """Whether a node gives a tensor of static sizes (or several, where that counts)."""
    found = value(node)
    parts = found if several and isinstance(found, (tuple, list)) else (found,)
    return bool(parts) and all(
        isinstance(part, torch.Tensor) and all(type(size) is int for size in part.shape) for part in parts
    )


def _is_repeatable(node: Node, context: GraphContext, ahead: bool) -> bool:
    """Whether running the node at another time gives the same tensor and leaves no other trace.

    Args:
        node: a node.
        context: its graph.
        ahead: whether it may be written to, and may write.
    """
    apart = difference(_beside_gradients(context.modes(node)), _beside_gradients(context.initial_modes))
    if apart is not None or not is_deterministic(node):
        return False
    is_pure = not node.is_impure() and not context.is_written(node)
    return is_pure or (ahead and (writes_in_place(node.target) or not node.is_impure()))


def _beside_gradients(modes: Modes) -> Modes:
    """What of a state matters where no gradient is recorded: neither grad mode nor inference mode."""
    other = tuple(name for name in modes.other if not name.startswith("_enter_inference_mode"))
    return replace(modes, grad=False, other=other)


def sources_of(stable: Iterable[Node]) -> dict[Node, frozenset[Node]]:
    """For each stable node the sources that it is made of; none for what is made of numbers alone."""
    found: dict[Node, frozenset[Node]] = {}
    for node in stable:
        if node.op in ("placeholder", "get_attr"):
            found[node] = frozenset((node,))
        else:
            found[node] = frozenset().union(*(found[operand] for operand in node.all_input_nodes))
    return found


def read_outside(context: GraphContext, stable: Collection[Node]) -> list[Node]:
    """The stable nodes that nodes which are not stable read."""
    return [
        operand
        for node in context.graph.nodes
        if node not in stable
        for operand in node.all_input_nodes
        if operand in stable
    ]


def kept_nodes(context: GraphContext, stable: dict[Node, None]) -> list[Node]:
    """Stable nodes that the rest of the graph reads, directly or through views, in program order.

    Views are free, so that what they view is kept. Those that depend on no parameter are left where they are.
    """
    kept: set[Node] = set()
    made_of = sources_of(stable)
    pending = read_outside(context, stable)
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node in seen or node.op == "placeholder" or not made_of[node]:
            continue
        seen.add(node)
        if context.may_return_argument(node) and not _is_copy(node):
            pending.extend(node.all_input_nodes)
        else:
            kept.add(node)
    return [node for node in context.graph.nodes if node in kept]


def _is_copy(node: Node) -> bool:
    """Whether it is one of the methods that may give what they are called on, and does not here."""
    if node.target == "to":
        given, found = (tensor(one) for one in (node.args[0], node))
        return given is not None and found is not None and given.dtype != found.dtype
    return node.target == "contiguous"  # which `parameter_work` writes where the layout differs


def prologue_of(
    context: GraphContext, kept: Sequence[Node], sources: Sequence[Node]
) -> tuple[GraphModule, tuple[Node, ...]]:
    """The graph that computes the kept nodes, and which of the sources are its arguments."""
    needed: set[Node] = set()
    pending = list(kept)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend((*node.all_input_nodes, *context.writers_of(node)))
    prologue = Graph()
    read = tuple(node for node in sources if node in needed)
    twins = {node: prologue.placeholder(node.name) for node in read}
    for node in context.graph.nodes:
        if node in needed and node not in twins:
            twins[node] = prologue.node_copy(node, twins.__getitem__)
    prologue.output(tuple(twins[node] for node in kept))
    return GraphModule(torch.nn.Module(), prologue), read


def keys_of(prologue: Graph) -> tuple[str, ...]:
    """A digest of what each result of a prologue is made of, down to the names of its inputs.

    Equal ones are the same work, in this process: functions are told apart by their addresses.
    """
    spelled: dict[Node, str] = {}
    for node in prologue.nodes:
        given: Any = map_arg((node.args, node.kwargs), spelled.__getitem__)
        made_of = node.name if node.op == "placeholder" else f"{node.op} {node.target!r} {given!r}"
        spelled[node] = hashlib.sha256(made_of.encode()).hexdigest()
        if node.op == "output":
            ((results,), _) = given
            return tuple(results)
    raise AssertionError("every graph has an output")


def metadata_of(node: Node) -> torch.Tensor:
    """The metadata of a node that is known to be one tensor."""
    found = tensor(node)
    assert found is not None, "only tensors are kept"
    return found


def bytes_of(found: torch.Tensor | None) -> int:
    """The size of a tensor of static sizes, in bytes; 0 for None."""
    return 0 if found is None else math.prod(found.shape) * found.element_size()
