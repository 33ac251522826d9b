"""Views and what they are views of, in a graph of ATen operators, as far as schemas tell."""

from __future__ import annotations

import operator

from torch.fx import Node

from fxpasses.torch_internals.operators import OpOverload


def is_view(node: object) -> bool:
    """Whether a node's result shares the storage of what it reads."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return is_view(node.args[0])
    if not isinstance(node.target, OpOverload) or not isinstance(node.args[0] if node.args else None, Node):
        return False
    aliases = [each.alias_info for each in node.target._schema.returns]
    return any(each is not None and not each.is_write for each in aliases)


def viewed(view: Node) -> Node:
    """What a view is a view of."""
    found = view.args[0]
    assert isinstance(found, Node), "a view reads what it views"
    return found


def base_of(node: Node) -> Node:
    """The tensor that a chain of views begins with; the node itself where it is no view."""
    while is_view(node):
        node = viewed(node)
    return node
