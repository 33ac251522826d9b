"""Calls that do nothing, and that keep work on weights alone from being done ahead.

    dropout(weight, 0.1, train=False)    ->  weight
    detach_(lift_fresh_copy(constant))   ->  lift_fresh_copy(constant)
    _assert_tensor_metadata(weight)      ->                 it has held already

Only those are taken out that depend on weights and numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import GraphModule, Node

from fxpasses.passes.weights.stable import NUMBERS
from fxpasses.torch_internals.operators import METADATA_ASSERTION, HigherOrderOperator, OpOverload


def drop_idle_calls(graph_module: GraphModule, sources: Iterable[Node]) -> None:
    """Takes such calls out of what depends on the sources and on numbers alone.

    Args:
        graph_module: it is changed.
        sources: parameters and buffers.
    """
    independent = set(sources)
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or isinstance(node.target, HigherOrderOperator):
            continue
        operands = node.all_input_nodes
        if not (all(operand in independent for operand in operands) if operands else node.target in NUMBERS):
            continue
        independent.add(node)
        if node.target is METADATA_ASSERTION and not node.users:
            graph_module.graph.erase_node(node)
        elif _is_idle(node):
            node.replace_all_uses_with(operands[0], lambda user: user.op != "output")
            if not node.users:
                graph_module.graph.erase_node(node)
    graph_module.graph.lint()
    graph_module.recompile()


def _is_idle(node: Node) -> bool:
    """Whether a call gives its first operand, where no gradient is recorded."""
    if not isinstance(node.target, OpOverload):
        return False
    is_dropout = node.target._schema.name == "aten::dropout"
    return node.target is torch.ops.aten.detach_.default or (
        is_dropout and len(node.args) == 3 and node.args[2] is False
    )
