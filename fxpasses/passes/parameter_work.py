"""Parameter work: what depends on parameters and buffers alone is split off, to be done once per version.

    graph(parameters, x)  =  main(parameters, x, prologue(parameters))

The prologue holds every pure, deterministic node whose inputs are all parameters or buffers that nothing in
the graph writes to: folded batch norms, normalised weights, casts. Views are not kept, since they are free;
what they view is. On a CPU inductor lays convolution weights out channels-last at every call, so those
copies belong to the prologue too.

Kept tensors never hold more bytes than the parameters and buffers they come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.metadata import set_value, tensor
from fxpasses.graph.modes import difference
from fxpasses.graph.views import CONVOLUTIONS
from fxpasses.rewrite.decline import Decline
from fxpasses.torch_internals import is_deterministic, is_module_tensor, mark_as_static_input


@dataclass(frozen=True)
class ParameterWork:
    """A graph split in two.

    Attributes:
        main: the rest of the graph; its placeholders are those of the whole that it reads, then one per kept
            tensor.
        inputs: positions of the placeholders of the whole that `main` has.
        prologue: from the tensors at `sources` to the kept tensors.
        sources: positions of the placeholders that the prologue reads.
        examples: the metadata of the kept tensors.
    """

    main: GraphModule
    inputs: tuple[int, ...]
    prologue: GraphModule
    sources: tuple[int, ...]
    examples: tuple[torch.Tensor, ...]

    @property
    def kept_bytes(self) -> int:
        """Size of the kept tensors, in bytes."""
        return sum(map(_bytes, self.examples))


def split_parameter_work(context: GraphContext, *, channels_last: bool) -> ParameterWork | Decline:
    """Splits the graph of `context`, which becomes `main` and is changed in place.

    Args:
        context: a graph from Dynamo, with gradients off.
        channels_last: whether to keep the weights of 2-D convolutions in that layout.

    Returns:
        The two parts, or why there is nothing to keep.
    """
    placeholders = context.graph.find_nodes(op="placeholder")
    sources = [each for each in placeholders if is_module_tensor(each) and not context.is_written(each)]
    stable = _stable_nodes(context, set(sources))
    if channels_last:
        _add_layout_copies(context, stable)
    kept = _kept_nodes(context, stable)
    if not kept:
        return Decline("no-parameter-work", "no node depends on parameters alone")
    total, bound = (sum(_bytes(tensor(each)) for each in group) for group in (kept, sources))
    if total > bound:
        return Decline(
            "cached-memory", "keeping {} bytes, more than the {} of the parameters", None, (total, bound)
        )
    prologue, read = _prologue(context, kept, placeholders)
    _replace_by_inputs(context, kept, stable, placeholders[-1])
    examples = tuple(_metadata(each) for each in kept)
    inputs = _drop_unread(context, placeholders)
    return ParameterWork(context.module, inputs, prologue, read, examples)


def _stable_nodes(context: GraphContext, sources: set[Node]) -> dict[Node, None]:
    """Nodes that depend on the sources alone, in program order, the sources first."""
    stable: dict[Node, None] = dict.fromkeys(sources)
    for node in context.graph.nodes:
        if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
            continue
        if all(each in stable for each in node.all_input_nodes) and _is_repeatable(node, context):
            stable[node] = None
    return stable


def _is_repeatable(node: Node, context: GraphContext) -> bool:
    """Whether running the node at another time gives the same tensor and leaves no other trace."""
    found = tensor(node)
    if found is None or not all(type(size) is int for size in found.shape):
        return False
    apart = difference(context.modes(node), context.initial_modes)
    return apart is None and not node.is_impure() and is_deterministic(node) and not context.is_written(node)


def _add_layout_copies(context: GraphContext, stable: dict[Node, None]) -> None:
    """Gives every 2-D convolution whose weight is stable a channels-last copy of it."""
    copies: dict[Node, Node] = {}
    for node in context.graph.nodes:
        if node.target not in CONVOLUTIONS or node in stable:
            continue
        for weight in node.all_input_nodes:
            found = tensor(weight)
            if weight not in stable or found is None or found.ndim != 4:
                continue
            if weight not in copies:
                copies[weight] = _channels_last_copy(context, weight, found)
                stable[copies[weight]] = None
            node.replace_input_with(weight, copies[weight])


def _channels_last_copy(context: GraphContext, weight: Node, found: torch.Tensor) -> Node:
    with context.graph.inserting_after(weight):
        copied = context.graph.call_method("contiguous", (weight,), {"memory_format": torch.channels_last})
    layout = {"memory_format": torch.channels_last}
    set_value(copied, context.evaluator.call(torch.Tensor.contiguous, (weight,), layout), like=weight)
    context.adopt(copied, context.modes(weight))
    return copied


def _kept_nodes(context: GraphContext, stable: dict[Node, None]) -> list[Node]:
    """Stable nodes that the rest of the graph reads, directly or through views, in program order."""
    kept: set[Node] = set()
    pending = [
        each
        for node in context.graph.nodes
        if node not in stable
        for each in node.all_input_nodes
        if each in stable
    ]
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node in seen or node.op == "placeholder":
            continue
        seen.add(node)
        if context.may_return_argument(node) and node.target != "contiguous":
            pending.extend(node.all_input_nodes)
        else:
            kept.add(node)
    return [node for node in context.graph.nodes if node in kept]


def _prologue(
    context: GraphContext, kept: list[Node], placeholders: list[Node]
) -> tuple[GraphModule, tuple[int, ...]]:
    """The graph that computes the kept nodes, and the positions of the placeholders that it reads."""
    needed: set[Node] = set()
    pending = list(kept)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    graph = Graph()
    twins: dict[Node, Node] = {}
    read = [position for position, each in enumerate(placeholders) if each in needed]
    for node in context.graph.nodes:
        if node in needed:
            twins[node] = graph.node_copy(node, twins.__getitem__)
    graph.output(tuple(twins[node] for node in kept))
    return GraphModule(torch.nn.Module(), graph), tuple(read)


def _replace_by_inputs(
    context: GraphContext, kept: list[Node], stable: dict[Node, None], last_placeholder: Node
) -> None:
    """Makes each kept node an input of the graph, and erases what only they needed."""
    graph = context.graph
    for node in kept:
        with graph.inserting_after(last_placeholder):
            last_placeholder = graph.placeholder(f"kept_{node.name}")
        set_value(last_placeholder, _metadata(node), like=node)
        mark_as_static_input(last_placeholder)
        node.replace_all_uses_with(last_placeholder)
    for node in reversed(list(graph.nodes)):
        if node in stable and node.op != "placeholder" and not node.users:
            graph.erase_node(node)
    graph.lint()
    context.module.recompile()


def _drop_unread(context: GraphContext, placeholders: list[Node]) -> tuple[int, ...]:
    """Erases tensor inputs that nothing reads, each of which costs every call; returns what is left.

    Sizes stay: they tell what the symbols in the metadata stand for.
    """
    left = []
    for position, placeholder in enumerate(placeholders):
        if placeholder.users or tensor(placeholder) is None or not is_module_tensor(placeholder):
            left.append(position)
        else:
            context.graph.erase_node(placeholder)
    context.module.recompile()
    return tuple(left)


def _metadata(node: Node) -> torch.Tensor:
    found = tensor(node)
    assert found is not None, "only tensors are kept"
    return found


def _bytes(found: torch.Tensor | None) -> int:
    return 0 if found is None else math.prod(found.shape) * found.element_size()
