"""The order in memory that inductor is told: our operators read channels-last images, or contiguous ones.

    fxpasses.convolution(x)  ->  fxpasses.convolution(image_order(x))

Whoever follows values through a graph looks past those nodes.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from fxpasses.graph.metadata import set_value, tensor
from fxpasses.torch_internals.inductor import image_order, in_image_order


def in_order(graph: Graph, node: Node, *, planar: bool = False) -> Node:
    """The same tensor, which inductor is told to put into the memory that our operators read.

    Args:
        graph: where to write.
        node: a matrix or an image.
        planar: whether an image is read plane by plane.
    """
    ordered = graph.call_function(image_order(), (node, planar))
    set_value(ordered, in_image_order(value_of(node), planar))
    return ordered


def source_of(argument: object) -> Node:
    """What a node stands for, without the order in memory that inductor is told."""
    assert isinstance(argument, Node)
    while argument.target is image_order():
        argument = argument.args[0]
        assert isinstance(argument, Node)
    return argument


def readers_of(node: Node) -> set[Node]:
    """What reads a node, in whichever order in memory."""
    found: set[Node] = set()
    for user in node.users:
        found |= readers_of(user) if user.target is image_order() else {user}
    return found


def value_of(node: Node) -> torch.Tensor:
    """The metadata of a node that is known to be a tensor."""
    found = tensor(node)
    assert found is not None, "members and what they read are tensors"
    return found
