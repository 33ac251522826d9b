"""Spelling: an operator written again with other operands, the way it stands in the graph.

    torch.conv2d(x, W, b, groups=2)     torch.conv2d(x, W', b', groups=2)
    aten.addmm.default(b, x, W)         aten.addmm.default(b', x, W')
    self.conv(x), a module              torch.conv2d(x, W', b', ...)
    y.flatten(1), a move                z.flatten(1)

Arguments are replaced by name, through the operator's schema, so that all others stay as they were written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fxpasses.graph.moves import Move
from fxpasses.graph.operands import tensor_of
from fxpasses.graph.schema import with_arguments
from fxpasses.graph.views import Convolution, Linear, Producer
from fxpasses.rewrite.builder import Builder

_CONVOLUTIONS: dict[tuple[bool, int], Callable[..., Any]] = {
    (False, 1): torch.conv1d,
    (False, 2): torch.conv2d,
    (False, 3): torch.conv3d,
    (True, 1): torch.conv_transpose1d,
    (True, 2): torch.conv_transpose2d,
    (True, 3): torch.conv_transpose3d,
}


def fused_producer(producer: Producer, build: Builder, given: Node, weight: Node, bias: Node | None) -> Node:
    """The producer's operator on another weight and bias.

    Args:
        producer: the operator to repeat.
        build: where to write.
        given: its input.
        weight: a weight of the same shape as its own.
        bias: one number per output channel, [C_out], or None.
    """
    last = producer.nodes[-1]
    if isinstance(producer, Linear):
        if producer.weight_axis == 1:
            return build.mm(given, weight) if bias is None else build.addmm(bias, given, weight)
        if last.op == "call_module":
            return build.linear(given, weight, bias)
    elif last.op == "call_module":
        return _functional_convolution(producer, build, given, weight, bias)
    args, kwargs = with_arguments(last, {"input": given, "weight": weight, "bias": bias})
    assert callable(last.target)
    return build.call(last.target, args, kwargs)


def _functional_convolution(
    producer: Convolution, build: Builder, given: Node, weight: Node, bias: Node | None
) -> Node:
    found = tensor_of(producer.weight)
    assert found is not None
    function = _CONVOLUTIONS[producer.transposed, found.ndim - 2]
    spacing = {"stride": producer.stride, "padding": producer.padding, "dilation": producer.dilation}
    if producer.transposed:
        spacing["output_padding"] = producer.output_padding
    return build.call(function, (given, weight, bias), {**spacing, "groups": producer.groups})


def repeated_move(move: Move, build: Builder, given: Node) -> Node:
    """The move's operator on another tensor."""
    node = move.node
    args = (given, *node.args[1:])
    target = node.target
    assert node.op == "call_method" or callable(target), "a module that moves channels is an identity"
    return build.call(target, args, node.kwargs)
