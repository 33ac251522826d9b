"""What stock inductor would do with the same graph: its one decision, and the copies that follow from it.

The decision is asked of inductor itself (`decide_layout_opt`), over the convolutions of the forward. Where
it is yes, every 2-D convolution takes input and weight channels-last, and what lies between follows; so it is
the uniform plan, but for 5-D tensors and convolutions of one dimension, which stock leaves alone, and for
gradients, which it hands out as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from fxpasses.devices.sizes import ConvolutionSizes
from fxpasses.graph.context import GraphContext
from fxpasses.graph.layouts import C, L, Label
from fxpasses.graph.metadata import tensor
from fxpasses.graph.names import base_name
from fxpasses.passes.layout.assign import Assignment
from fxpasses.passes.layout.convolutions import read_convolution
from fxpasses.passes.layout.lines import is_line
from fxpasses.passes.layout.network import Network, Tensor
from fxpasses.passes.layout.problem import FIXED_L
from fxpasses.report.layout_plan import StockPlan
from fxpasses.torch_internals.inductor import decide_stock_layout


def stock_plan(context: GraphContext, assignment: Assignment) -> tuple[StockPlan, list[Label]]:
    """Stock inductor's layouts for the graph of an assignment, as yet unchanged, and their labels."""
    backward = _backward(context.graph)
    forward = [node for node in context.graph.nodes if node not in backward]
    decision = decide_stock_layout(_as_inductor_sees_them(forward), is_inference=not backward)
    network = assignment.network
    labels: list[Label] = [C] * len(assignment.labels)
    labels[FIXED_L] = L
    if decision:
        for variable in network.connected_with(filter(_is_laid_out, network.convolutions)):
            labels[variable] = L
        for node in network.convolutions:
            if not _is_laid_out(node):
                labels[network.find(network.variables[node])] = C
    labels = [labels[network.find(variable)] for variable in range(len(labels))]
    copied = [
        held
        for held in network.tensors.values()
        if _is_copied(held, network, labels, backward) or _is_restored(held, network, labels)
    ]
    return StockPlan(decision, len(copied)), labels


def _backward(graph: Graph) -> set[Node]:
    """Everything that depends on the gradients of a joint graph's outputs."""
    found: set[Node] = set()
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and node.name.startswith("tangents")
        if is_tangent or (node.op != "output" and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def _as_inductor_sees_them(nodes: Sequence[Node]) -> list[Node]:
    """The nodes, with every convolution as the ATen operator that it will be."""
    found: list[Node] = []
    for node in nodes:
        is_other = base_name(node).startswith("conv") and not _is_inductors(node)
        read = read_convolution(node) if is_other else None
        found.append(node if read is None else _convolution(read.sizes, read.activations[0]))
    return found


def _is_inductors(node: Node) -> bool:
    """Whether a convolution is written as inductor reads it: all operands with metadata, all by position."""
    is_aten = node.target is torch.ops.aten.convolution.default and len(node.args) == 9
    return is_aten and all(
        isinstance(operand, Node) and tensor(operand) is not None for operand in node.args[:2]
    )


def _convolution(sizes: ConvolutionSizes, activation: Node) -> Node:
    """`aten.convolution` in a graph of its own, over tensors of these sizes."""
    graph, given = Graph(), tensor(activation)
    assert given is not None
    operands = graph.placeholder("input"), graph.placeholder("weight")
    operands[0].meta["val"] = given
    operands[1].meta["val"] = given.new_empty(tuple(sizes.weight))
    return graph.call_function(torch.ops.aten.convolution.default, (*operands, None, *sizes.arguments))


def _is_laid_out(convolution: Node) -> bool:
    """Whether stock inductor would lay it out: it is of images, and was so when the graph was traced."""
    return _rank(convolution) == 4 and not is_line(convolution)


def _rank(node: Node) -> int:
    """The number of dimensions of the 4-D or 5-D tensor that an operator makes or reads; else 0."""
    tensors = [tensor(neighbour) for neighbour in (node, *node.all_input_nodes)]
    return next((found.dim() for found in tensors if found is not None and found.dim() in (4, 5)), 0)


def _is_restored(held: Tensor, network: Network, labels: Sequence[Label]) -> bool:
    """Whether a result that a plan may give in another layout is copied back to eager's."""
    return held.node in network.free and labels[network.find(held.producer)] != held.original


def _is_copied(held: Tensor, network: Network, labels: Sequence[Label], backward: set[Node]) -> bool:
    made = labels[network.find(held.producer)]
    readers = [user for user, variable in held.users if labels[network.find(variable)] != made]
    if held.node in backward:
        readers = [user for user in readers if user.op != "output"]
    return bool(readers)
