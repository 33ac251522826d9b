"""Copies of graph modules: the caller's graph is never mutated.

The copy has nodes and nested graphs of its own and shares every parameter, buffer and leaf module. What
Dynamo and AOTAutograd keep on the side (sources of placeholders, names of parameters) comes along, or the
copy could not be compiled in the original's place.
"""

from __future__ import annotations

import copy

import torch
from torch.fx import Graph, GraphModule, Node

from fxpasses.graph.levels import nested_graphs
from fxpasses.torch_internals.graphs import make_graph_module


def copy_graph_module(module: GraphModule) -> GraphModule:
    """A copy with its own graph, nested graphs included, and shared parameters and leaf modules."""
    graph = _copy_graph(module.graph)
    result = make_graph_module(module, graph, type(module).__name__)
    for name, value in module.__dict__.items():
        if name not in result.__dict__:
            result.__dict__[name] = value
    result.meta = copy.copy(module.meta)
    for path, child, _ in nested_graphs(module):
        _set_submodule(result, path, copy_graph_module(child))
    return result


def _set_submodule(module: torch.nn.Module, path: str, child: GraphModule) -> None:
    """Puts `child` at a dotted path; the modules on the way are copied too, since the caller owns them."""
    *parents, name = path.split(".")
    for parent in parents:
        owned = copy.copy(module.get_submodule(parent))
        owned._modules = dict(owned._modules)
        module._modules[parent] = owned
        module = owned
    module._modules[name] = child


def _copy_graph(graph: Graph) -> Graph:
    nodes: dict[Node, Node] = {}
    result = Graph(tracer_cls=getattr(graph, "_tracer_cls", None))
    for node in graph.nodes:
        twin = result.node_copy(node, lambda operand: nodes[operand])
        nodes[node] = twin
        twin.name = node.name
        # Dynamo keeps the source of a graph input as an attribute of its placeholder.
        if "_dynamo_source" in node.__dict__:
            twin.__dict__["_dynamo_source"] = node.__dict__["_dynamo_source"]
    result._codegen = copy.deepcopy(graph._codegen)
    return result
