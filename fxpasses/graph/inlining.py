"""Inlining: what export writes as a graph of its own, because a grad mode held there, in the graph around it.

    wrap_with_set_grad_enabled(False, graph, x, weight)[0]    ->    conv2d(x, weight)

For programs of which no gradient is recorded, so that the mode makes no difference.
"""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node
from torch.fx.node import Argument, map_arg

from fxpasses.graph.copying import copy_graph_module
from fxpasses.graph.levels import attribute
from fxpasses.torch_internals.operators import HigherOrderOperator, operator_name


def inline_grad_modes(module: GraphModule) -> GraphModule:
    """A copy in which no grad mode is switched by a nested graph; the module itself where none is."""
    if not any(map(_switches_grad_mode, module.graph.nodes)):
        return module
    copied = copy_graph_module(module)
    while found := [node for node in copied.graph.nodes if _switches_grad_mode(node)]:
        for node in found:
            _inline(copied, node)
    copied.graph.lint()
    copied.recompile()
    return copied


def _switches_grad_mode(node: Node) -> bool:
    target = node.target
    is_nested = isinstance(target, HigherOrderOperator) and len(node.args) > 1
    return is_nested and operator_name(target) == "wrap_with_set_grad_enabled"  # type: ignore[arg-type]


def _inline(module: GraphModule, call: Node) -> None:
    """Writes the nodes of a nested graph in front of its call, and erases the call."""
    reference = call.args[1]
    assert isinstance(reference, Node)
    path = str(reference.target)
    nested = attribute(module, path)
    assert isinstance(nested, GraphModule)
    given = iter(call.args[2:])
    values: dict[Node, Argument] = {}
    with module.graph.inserting_before(call):
        for node in nested.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "output":
                values[node] = map_arg(node.args[0], values.__getitem__)
            else:
                values[node] = twin = module.graph.node_copy(node, lambda read: values[read])
                if node.op in ("get_attr", "call_module"):
                    twin.target = f"{path}.{node.target}"
    results = values[nested.graph.output_node()]
    for user in list(call.users):
        if user.target is operator.getitem and isinstance(results, (tuple, list)):
            position = user.args[1]
            assert isinstance(position, int)
            result = results[position]
            assert isinstance(result, Node), "nested graphs give tensors"
            user.replace_all_uses_with(result)
            module.graph.erase_node(user)
    if call.users:
        assert isinstance(results, Node), "several results are taken apart"
        call.replace_all_uses_with(results)
    module.graph.erase_node(call)
    if not reference.users:
        module.graph.erase_node(reference)
