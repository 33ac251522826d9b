"""Whether autograd has anything to record of a graph from Dynamo."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.metadata import has_value, value
from fxpasses.graph.modes import Modes
from fxpasses.torch_internals.pytree import tree_leaves


def records_gradients(graph_module: GraphModule) -> bool:
    """Whether gradients are on, and one may flow from a result or through an input that is written to.

    It is what AOTAutograd asks: a graph whose results are made under `no_grad`, or from tensors that need no
    gradient, is an inference graph, whatever the grad mode around it. What has no metadata may require grad.
    """
    if not torch.is_grad_enabled():
        return False
    graph = graph_module.graph
    if any(map(_may_require_grad, graph.output_node().all_input_nodes)):
        return True
    context = GraphContext(graph_module, Modes(grad=True))
    inputs = graph.find_nodes(op="placeholder")
    return any(context.is_written(node) for node in inputs if _may_require_grad(node))


def _may_require_grad(node: Node) -> bool:
    if not has_value(node):
        return True
    leaves = tree_leaves(value(node))
    return any(leaf.requires_grad for leaf in leaves if isinstance(leaf, torch.Tensor))
