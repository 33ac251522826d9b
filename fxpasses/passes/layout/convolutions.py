"""Convolutions as the plan sees them: sizes, directions, activations, and the product that one may be.

A convolution of [N, C, H, W] with [K, C, 1, 1] and stride 1 is, channels-last, one product of matrices:

    [N·H·W, C] @ [C, K] = [N·H·W, K]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Node

from fxpasses.devices.profile import CONVOLUTION_FORWARD, CONVOLUTION_INPUT_GRAD, CONVOLUTION_WEIGHT_GRAD
from fxpasses.devices.sizes import ConvolutionSizes
from fxpasses.graph.context import GraphContext
from fxpasses.graph.metadata import tensor
from fxpasses.graph.names import base_name
from fxpasses.graph.operands import tensor_of
from fxpasses.graph.schema import bind
from fxpasses.graph.views import Convolution, read_producer
from fxpasses.passes.layout.labels import Kind, kind_of


class ConvolutionReading(NamedTuple):
    """What the plan knows of a convolution, or of the gradients of one.

    Attributes:
        sizes: of its tensors, and its arguments.
        dtype: of its input.
        directions: what it computes: `profile.CONVOLUTION_FORWARD`, or those wanted of the two gradients.
        activations: what it reads besides the weight: the input, and for gradients that of the result first.
    """

    sizes: ConvolutionSizes
    dtype: torch.dtype
    directions: tuple[str, ...]
    activations: tuple[Node, ...]


def read_convolution(node: Node) -> ConvolutionReading | None:
    """Reads a convolution, forward or backward, at any capture level; None if it cannot be read."""
    if base_name(node) == "convolution_backward":
        return _read_backward(node)
    view = read_producer(node)
    if not isinstance(view, Convolution) or not isinstance(view.input, Node):
        return None
    given, weight, result = tensor(view.input), tensor_of(view.weight), tensor(node)
    if given is None or weight is None or result is None or given.dim() not in (4, 5):
        return None
    spatial = given.dim() - 2
    lists = [_expanded(argument, spatial) for argument in (view.stride, view.padding, view.dilation)]
    output_padding = _expanded(view.output_padding, spatial)
    if view.padding == "same":
        lists[1] = [d * (k - 1) // 2 for d, k in zip(lists[2] or [], weight.shape[2:], strict=True)]
    if view.padding == "valid":
        lists[1] = [0] * spatial
    if any(values is None for values in lists):
        return None
    arguments = (*lists, bool(view.transposed), output_padding or [0] * spatial, view.groups)
    sizes = ConvolutionSizes(given.shape, weight.shape, result.shape, arguments)
    return ConvolutionReading(sizes, given.dtype, (CONVOLUTION_FORWARD,), (view.input,))


def weight_trains(context: GraphContext, node: Node) -> bool:
    """Whether a gradient may flow to the weight of a convolution."""
    view = read_producer(node)
    return isinstance(view, Convolution) and context.requires_grad(view.weight)


def may_be_product(node: Node, sizes: ConvolutionSizes) -> bool:
    """Whether a matrix product can take a convolution's place where it is channels-last.

    A profile measures it for 1x1 convolutions of stride 1.
    """
    stride, padding, _, transposed, _, groups = sizes.arguments
    numbers = (*sizes.input, *sizes.weight, *stride, *padding)
    return (
        base_name(node) != "convolution_backward"
        and all(isinstance(number, int) for number in numbers)
        and not transposed
        and groups == 1
        and set(sizes.weight[2:]) == set(stride) == {1}
        and set(padding) == {0}
        and product_operands(node) is not None
    )


def product_operands(node: Node) -> tuple[Node, Node, Node | None] | None:
    """A convolution's input, weight and bias, where all are nodes."""
    view = read_producer(node)
    if not isinstance(view, Convolution) or not isinstance(view.input, Node):
        return None
    if not isinstance(view.weight, Node) or not (view.bias is None or isinstance(view.bias, Node)):
        return None
    return view.input, view.weight, view.bias


def _read_backward(node: Node) -> ConvolutionReading | None:
    bound = bind(node)
    if not isinstance(bound, dict):
        return None
    grad, given, weight = (tensor(bound[name]) for name in ("grad_output", "input", "weight"))
    if grad is None or given is None or weight is None or given.dim() not in (4, 5):
        return None
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    sizes = ConvolutionSizes(given.shape, weight.shape, grad.shape, tuple(bound[name] for name in names))
    wanted = zip((CONVOLUTION_INPUT_GRAD, CONVOLUTION_WEIGHT_GRAD), bound["output_mask"], strict=False)
    directions = tuple(name for name, is_wanted in wanted if is_wanted)
    return ConvolutionReading(sizes, given.dtype, directions, (bound["grad_output"], bound["input"]))


def _expanded(given: Any, spatial: int) -> list[Any] | None:
    if isinstance(given, (list, tuple)):
        return list(given) if len(given) == spatial else [*given] * spatial
    return [given] * spatial if isinstance(given, (int, torch.SymInt)) else None


def is_weight(node: Node) -> bool:
    """Whether convolutions read a node as their weight, and nothing else reads it."""
    return bool(node.users) and all(is_weight_of(node, user) for user in node.users)


def is_weight_of(node: Node, user: Node) -> bool:
    """Whether a node is the weight of a convolution that reads it."""
    bound = bind(user) if kind_of(user) is Kind.PREFERRING else None
    return isinstance(bound, dict) and bound.get("weight") is node
