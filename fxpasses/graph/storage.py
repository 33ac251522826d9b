"""Views and what they are views of, in a graph of ATen operators, as far as schemas tell."""

from __future__ import annotations

import functools
import operator

import torch
from torch.fx import Node

from fxpasses.graph.metadata import tensor, value
from fxpasses.torch_internals.operators import OpOverload


def is_view(node: object) -> bool:
    """Whether a node's result shares the storage of what it reads."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return is_view(node.args[0])
    if not isinstance(node.target, OpOverload) or not isinstance(node.args[0] if node.args else None, Node):
        return False
    return _gives_views(node.target)


@functools.cache
def _gives_views(operator: OpOverload) -> bool:
    """Whether an operator's results are views; every node asks, so it is answered once."""
    aliases = [returned.alias_info for returned in operator._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def is_part_of_tuple(node: Node) -> bool:
    """Whether a node takes a part out of a tuple that an operator gives, by its place or by its name."""
    if node.target not in (operator.getitem, getattr):
        return False
    return isinstance(node.args[0], Node) and isinstance(value(node.args[0]), (tuple, list))


def may_write(node: Node) -> bool:
    """Whether a node may write to a tensor of the graph, as far as its schema tells."""
    if not node.op.startswith("call") or node.target is operator.getitem:
        return False
    return not isinstance(node.target, OpOverload) or node.target._schema.is_mutable


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


def is_same_pixel(node: Node) -> bool:
    """Whether `as_strided` gives an image of one pixel unchanged, as where AOTAutograd pools to one pixel.

    In both layouts such an image is one matrix of images and channels.
    """
    given = tensor(node.args[0]) if node.args else None
    if node.target is not torch.ops.aten.as_strided.default or given is None or given.dim() not in (4, 5):
        return False
    if node.kwargs or len(node.args) != 3 or not all(type(size) is int for size in given.shape):
        return False
    _, shape, strides = node.args
    assert isinstance(shape, (list, tuple))
    assert isinstance(strides, (list, tuple))
    count, channels, *pixels = given.shape
    if tuple(shape) != tuple(given.shape) or set(pixels) != {1}:
        return False
    dense = [axis for axis, size in enumerate((count, channels)) if size > 1]
    wanted = (channels, 1)
    return all(given.stride(axis) == wanted[axis] == strides[axis] for axis in dense)
