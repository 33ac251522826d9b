"""Convolutions over one dimension, written as those of images of height 1, for which there are kernels.

    conv1d(x, w)    becomes    squeeze(conv2d(unsqueeze(contiguous(x)), unsqueeze(w)))

`write_as_images` does so in the graph that was captured, where the weight is kept between calls. Over one
dimension eager convolves a contiguous copy, so that its result is contiguous, too, and over two it does not.

In inductor's graph, whose results have eager's strides by then, `join_images` has convolutions read sequences
[N, T, C] as the images in channels-last that they are, without that copy; and what stands between two
convolutions compute on images too, so that it is read as one with them:

    transpose ── clone ── unsqueeze ── conv2d           becomes    transpose ── unsqueeze ── conv2d
    conv2d ── squeeze ── relu ── unsqueeze ── conv2d    becomes    conv2d ── relu ── conv2d
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fxpasses.graph.context import GraphContext
from fxpasses.graph.frames import is_one
from fxpasses.graph.layouts import order_of
from fxpasses.graph.metadata import tensor
from fxpasses.graph.modes import Modes
from fxpasses.graph.names import base_name
from fxpasses.graph.operands import tensor_of
from fxpasses.graph.views import CONVOLUTIONS, Convolution, read_producer
from fxpasses.rewrite.builder import Builder
from fxpasses.torch_internals.operators import is_deterministic, is_elementwise

aten = torch.ops.aten

_HEIGHT = 2
"""Where the dimension of size 1 is."""

_RULE = "kept_weights"


def write_as_images(context: GraphContext, stable: Collection[Node]) -> bool:
    """Writes a captured graph's batched 1-D convolutions whose weights are stable; whether there was one."""
    filters: dict[Node, Node] = {}
    for node in list(context.graph.nodes):
        found = read_producer(node) if node.target in CONVOLUTIONS and node not in stable else None
        if not isinstance(found, Convolution) or not isinstance(found.input, Node):
            continue
        given, weight = tensor(found.input), tensor_of(found.weight)
        if given is None or weight is None or (given.dim(), weight.dim()) != (3, 3):
            continue
        if isinstance(found.weight, Node) and found.weight in stable and not _is_strided_over(context, node):
            _write_as_image(context, found, found.input, found.weight, filters)
    return bool(filters)


def _is_strided_over(context: GraphContext, node: Node) -> bool:
    """Whether a node's memory is written to by `as_strided`, which torch compiles over no view."""
    return context.is_written(node) and any(
        base_name(view) == "as_strided" and context.may_alias(view, node) for view in context.graph.nodes
    )


def _write_as_image(
    context: GraphContext, found: Convolution, given: Node, weight: Node, filters: dict[Node, Node]
) -> None:
    node = found.nodes[-1]
    build = Builder(context, found.nodes[0], node, rule=_RULE, replaced=found.nodes)
    if weight not in filters:
        read = build.call("contiguous", (weight,))  # what is in another order is not packed
        filters[weight] = build.call("unsqueeze", (read, _HEIGHT))
    bias = None if found.bias is None else build.operand(found.bias)
    image = build.call("unsqueeze", (build.call("contiguous", (given,)), _HEIGHT))
    operands = (image, filters[weight], bias)
    stride, dilation = (_pair(1, numbers) for numbers in (found.stride, found.dilation))
    padding = found.padding if isinstance(found.padding, str) else _pair(0, found.padding)
    if found.transposed:
        rest = (stride, padding, _pair(0, found.output_padding), found.groups, dilation)
        written = build.call(torch.conv_transpose2d, (*operands, *rest))
    else:
        written = build.call(torch.conv2d, (*operands, stride, padding, dilation, found.groups))
    node.replace_all_uses_with(build.call("squeeze", (written, _HEIGHT)))
    for one in reversed(found.nodes):
        context.graph.erase_node(one)


def _pair(height: int, given: int | Sequence[int]) -> tuple[int, Any]:
    return height, given[0] if isinstance(given, (list, tuple)) else given


def join_images(graph: Graph) -> None:
    """Has elementwise operators and concatenations between views of images compute on the images.

    Args:
        graph: inductor's, in inference.
    """
    assert graph.owning_module is not None, "inductor's graphs have a module"
    context = GraphContext(graph.owning_module, Modes(grad=False), executor="fused")
    for copied in graph.find_nodes(op="call_function", target=aten.clone.default):
        _read_in_place(context, copied)
    images: dict[Node, Node] = {}
    for node in list(graph.nodes):
        viewed = _squeezed(node)
        if viewed is not None:
            images[node] = viewed
        elif _unsqueezes(node) and node.args[0] in images:
            node.replace_all_uses_with(images[node.args[0]])
        elif _may_be_lifted(node, images):
            build = Builder(context, node, node, rule=_RULE, replaced=(node,))
            args, kwargs = (_lifted(given, build, images) for given in (node.args, node.kwargs))
            if node.target is aten.cat.default:
                args = (args[0], _dimension(node) + (_dimension(node) >= _HEIGHT))
            image = build.call(node.target, args, kwargs)
            flat = build.call(aten.squeeze.dim, (image, _HEIGHT))
            images[flat] = image
            node.replace_all_uses_with(flat)
    for node in reversed(list(graph.nodes)):
        if not node.users and (node in images or _may_be_dropped(node)):
            graph.erase_node(node)


def _read_in_place(context: GraphContext, copied: Node) -> None:
    """Has convolutions read what a copy is made of, where it is an image in channels-last as it lies."""
    given = copied.args[0]
    if not isinstance(given, Node) or copied.kwargs.get("memory_format") != torch.contiguous_format:
        return
    images = list(copied.users)
    if not images or not all(_unsqueezes(image) and _only_convolved(image) for image in images):
        return
    build = Builder(context, copied, images[0], rule=_RULE, replaced=(copied, *images))
    image = build.call(aten.unsqueeze.default, (given, _HEIGHT))
    lies = tensor(image)
    if lies is None or order_of(lies) != "channels_last":
        context.graph.erase_node(image)
        return
    for one in images:
        one.replace_all_uses_with(image)
        context.graph.erase_node(one)
    context.graph.erase_node(copied)


def _only_convolved(image: Node) -> bool:
    return all(
        reader.target is aten.convolution.default and reader.args[0] is image and image not in reader.args[1:]
        for reader in image.users
    )


def _squeezed(node: Node) -> Node | None:
    """The image of which a node is a view without its height, if it is one."""
    if node.target is aten.squeeze.dim:
        dims: Sequence[Any] = node.args[1:2]
    elif node.target is aten.squeeze.dims:
        dims = node.args[1]  # type: ignore[assignment]  # a list of numbers
    else:
        return None
    (given, *_) = node.all_input_nodes
    found = tensor(given)
    fits = found is not None and found.dim() == 4 and is_one(found.shape[_HEIGHT])
    return given if fits and list(dims) in ([_HEIGHT], [_HEIGHT - 4]) else None


def _unsqueezes(node: Node) -> bool:
    found = tensor(node)
    is_view = node.target is aten.unsqueeze.default and found is not None and found.dim() == 4
    return is_view and node.args[1] in (_HEIGHT, _HEIGHT - 4)


def _may_be_lifted(node: Node, images: Collection[Node]) -> bool:
    """Whether a node computes one value of [N, C, W], elementwise or end to end, from one that is a view."""
    found = tensor(node)
    if found is None or found.dim() != 3 or not any(operand in images for operand in node.all_input_nodes):
        return False
    if node.target is aten.cat.default:
        return all(operand in images for operand in node.all_input_nodes)
    if node.target is aten.constant_pad_nd.default:
        return len(node.args[1]) == 2  # type: ignore[arg-type]  # a list: of the last dimension alone
    return is_elementwise(node.target) and is_deterministic(node)


def _lifted(given: Any, build: Builder, images: dict[Node, Node]) -> Any:
    """Arguments with an image for each view of one, and a height for what is broadcast against them."""

    def image(operand: Node) -> Node:
        found = tensor(operand)
        if operand in images or found is None or found.dim() < 2:
            return images.get(operand, operand)
        return build.call(aten.unsqueeze.default, (operand, -2))

    return map_arg(given, image)


def _dimension(node: Node) -> int:
    """The dimension of [N, C, W] along which a node concatenates."""
    given = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(given, int)
    return given % 3


def _may_be_dropped(node: Node) -> bool:
    """Whether a node that nobody reads is a view, or what was lifted."""
    views = (aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)
    moves = (aten.cat.default, aten.constant_pad_nd.default)
    return node.target in (*views, *moves) or is_elementwise(node.target)
