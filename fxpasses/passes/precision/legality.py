"""Where a lower precision may be taken: in inference, by products of float32, on a device fast in it."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxpasses.graph import modules
from fxpasses.graph.context import GraphContext
from fxpasses.graph.decline import Decline
from fxpasses.graph.metadata import tensor, value
from fxpasses.graph.quantised import first_quantising
from fxpasses.passes.precision.operators import fits, is_product, is_whole_layer
from fxpasses.torch_internals.onednn import multiplies_bfloat16


def candidates(context: GraphContext, dtype: torch.dtype) -> list[Node]:
    """The products that compute in another type than the lower precision: convolutions and their kind."""
    return [
        node
        for node in context.graph.nodes
        if (is_product(node) and not types_of(node) <= {dtype})
        or is_whole_layer(node)
        or modules.is_instance(node, tuple(modules.PRODUCERS))
    ]


def types_of(node: Node) -> set[torch.dtype]:
    """The floating-point types of what a node reads."""
    found = (tensor(operand) for operand in node.all_input_nodes)
    return {each.dtype for each in found if each is not None and each.is_floating_point()}


def refusal_of_graph(context: GraphContext, first: Node) -> Decline | None:
    """Why all of a graph keeps its precision, if it does.

    Args:
        context: the graph.
        first: its first candidate.
    """
    if context.path:
        return Decline("nested-graph", "{} stands in a graph that an operator runs", first, (first.name,))
    if context.initial_modes.grad and _gives_gradients(context):
        return Decline(
            "records-gradients", "gradients are recorded, and may flow through {}", first, (first,)
        )
    if any(map(torch.is_autocast_enabled, {each.device.type for each in _tensors_of(first)})):
        return Decline("autocast", "autocast is on around the graph, and chooses a precision itself", first)
    if any(context.modes(node).functorch for node in context.graph.nodes):
        return Decline("functorch", "a transform of functorch is at work in the graph", first)
    if (quantising := first_quantising(context.graph.nodes)) is not None:
        return Decline("quantised", "{} quantises", quantising, (quantising.name,))
    return None


def refusal_of_node(context: GraphContext, product: Node, *, whatever_it_costs: bool) -> Decline | None:
    """Why one product keeps its precision, if it does.

    Args:
        context: the graph.
        product: a candidate.
        whatever_it_costs: whether to take a lower precision on devices that are slow in it.
    """
    if product.op == "call_module" or is_whole_layer(product):
        return Decline("whole-layer", "{} computes a whole layer", product, (product.name,))
    types, operands = types_of(product), _tensors_of(product)
    if types != {torch.float32}:
        names = ", ".join(sorted(str(each).removeprefix("torch.") for each in types))
        return Decline("dtype", "{} reads {}", product, (product.name, names))
    if context.modes(product).autocast:
        return Decline("autocast", "{} stands in a region of autocast", product, (product.name,))
    if any(product in context.writers_of(operand) for operand in product.all_input_nodes):
        return Decline("mutation", "{} writes to what it reads", product, (product.name,))
    if tensor(product) is None and context.is_written(product):
        return Decline("mutation", "one of the results of {} is written to", product, (product.name,))
    if value(product) is None:
        return Decline("no-metadata", "what {} gives is not known", product, (product.name,))
    if not fits(product):
        return Decline("unsupported-arguments", "{} is told a type", product, (product.name,))
    slow = next((each.device for each in operands if not multiplies_fast(each.device)), None)
    if slow is not None and not whatever_it_costs:
        return Decline("slow-precision", "{} has no instructions for products of bfloat16", product, (slow,))
    return None


def multiplies_fast(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16."""
    if device.type == "cpu":
        return multiplies_bfloat16()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _gives_gradients(context: GraphContext) -> bool:
    """Whether a gradient may flow from a result, or into an input that is written to."""
    inputs = context.graph.find_nodes(op="placeholder")
    return any(map(context.requires_grad, context.graph.output_node().all_input_nodes)) or any(
        context.is_written(node) and context.requires_grad(node) for node in inputs
    )


def _tensors_of(node: Node) -> list[torch.Tensor]:
    found = [tensor(operand) for operand in (*node.all_input_nodes, node)]
    return [each for each in found if each is not None]
