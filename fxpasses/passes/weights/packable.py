"""Which convolutions over kept weights oneDNN computes with the weight packed, and as which operator."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from fxpasses.graph.decline import Decline
from fxpasses.graph.metadata import tensor
from fxpasses.passes.weights.stride_order import in_order
from fxpasses.torch_internals.onednn import (
    inductor_tells_packed_weights,
    onednn_takes,
    packed_convolution,
    packed_sizes,
    transposed_convolution,
)


def convolves_with(node: Node, weight: Node) -> bool:
    """Whether a node is a convolution with that weight."""
    return node.target is torch.ops.aten.convolution.default and node.args[1] is weight


def unpackable(node: Node, weight: Node) -> Decline | None:
    """Why a user of a kept weight cannot take it packed."""
    if not convolves_with(node, weight):
        return Decline("other-reader", "the weight is also read by {}", node, (node.name,))
    image, found = tensor(node.args[0]), tensor(weight)
    if image is None or found is None or found.ndim not in (4, 5):
        return Decline("unpackable", "only 2-D and 3-D convolutions are packed", node)
    if image.dtype != found.dtype or not onednn_takes(found.dtype):
        return Decline("unpackable", "oneDNN does not pack {} on this CPU", node, (found.dtype,))
    if node.args[6] and _is_output_padding_large(node):
        return Decline("unpackable", "oneDNN takes no output_padding as large as the stride", node)
    return None


def _is_output_padding_large(transposed: Node) -> bool:
    """Whether the padding of the output is as large as the stride, which a dilation allows."""
    stride, output_padding = (list(transposed.args[at]) for at in (3, 7))  # type: ignore[arg-type]  # lists
    spatial = max(len(stride), len(output_padding))
    stride, output_padding = (given * (spatial // len(given)) for given in (stride, output_padding))
    return any(padding >= step for padding, step in zip(output_padding, stride, strict=True))


def sizes_of_packed(convolution: Node, dense: torch.Tensor) -> tuple[int, ...]:
    """The sizes under which a graph is to declare the packed weight of a convolution."""
    arguments: tuple[Any, ...] = convolution.args
    if not _takes_any_sizes(arguments) and inductor_tells_packed_weights():
        return tuple(dense.shape)
    return packed_sizes(arguments, dense.shape)


def write_packed(graph: Graph, convolution: Node, packed: Node) -> Node:
    """Writes a convolution over a packed weight, at the place where the graph is written.

    Args:
        graph: inductor's.
        convolution: `aten.convolution`, which stays as it is.
        packed: reads the weight.
    """
    arguments: tuple[Any, ...] = convolution.args
    if _takes_any_sizes(arguments):
        image, _, bias, stride, padding, dilation, _, output_padding, groups = arguments
        given = (in_order(graph, image), packed, bias, stride, padding, dilation, output_padding, groups)
        return graph.call_function(transposed_convolution(), given)
    return graph.call_function(*packed_convolution(arguments, packed))


def _takes_any_sizes(arguments: tuple[Any, ...]) -> bool:
    """Whether a convolution is a transposed one of sizes that are symbols, which our operator computes."""
    image = tensor(arguments[0])
    assert image is not None
    return bool(arguments[6]) and any(not isinstance(size, int) for size in image.shape)
