"""Producers: convolutions and linear operators, which have a weight and output channels.

    y = scale * (weight * x + bias) + shift = (scale * weight) * x + (scale * bias + shift)

holds for any of them, so what scales and shifts channels may be folded into what produces them.
"""

from __future__ import annotations

from torch import nn
from torch.fx import Node

from fxpasses.graph import modules
from fxpasses.graph.decline import Decline
from fxpasses.graph.views.convolution import (
    CONVOLUTIONS,
    Convolution,
    read_convolution,
    read_convolution_module,
)
from fxpasses.graph.views.linear import Linear, read_linear
from fxpasses.torch_internals.modules import ConvNd

Producer = Convolution | Linear


def read_producer(node: Node) -> Producer | Decline | None:
    """Reads a convolution or a linear operator that ends in `node`."""
    if node.op == "call_module":
        return _read_module(node)
    if node.target in CONVOLUTIONS:
        return read_convolution(node)
    return read_linear(node)


def _read_module(node: Node) -> Producer | Decline | None:
    found = modules.read(node, modules.PRODUCERS)
    if found is None or isinstance(found, Decline):
        return found
    module, arguments = found
    operands = modules.operands(node, module, ("weight", "bias"))
    if isinstance(module, nn.Linear):
        return Linear((node,), arguments["input"], operands["weight"], operands["bias"], weight_axis=0)  # type: ignore[arg-type]
    return read_convolution_module(node, module, arguments, operands) if isinstance(module, ConvNd) else None
