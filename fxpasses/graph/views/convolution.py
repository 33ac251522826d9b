"""Convolutions; in one group and one spatial dimension, where q = stride * p + dilation * k - padding:

    direct        y[n, o, p] = bias[o] + sum of weight[o, i, k] * x[n, i, q] over i and k
    transposed    y[n, o, q] = bias[o] + sum of weight[i, o, k] * x[n, i, p] over i and p, k that lead to q

A view is of any number of groups and dimensions, and reads functions, ATen's operators and torch.nn alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxpasses.graph.decline import Decline
from fxpasses.graph.operands import Operand, tensor_of
from fxpasses.graph.schema import bind
from fxpasses.torch_internals.modules import ConvNd

aten = torch.ops.aten


@dataclass(frozen=True)
class Convolution:
    """A convolution, direct or transposed, of any number of spatial dimensions.

    Attributes:
        nodes: the nodes that make it up, in program order; the last one is its result.
        input: [N, C_in, *spatial], or [C_in, *spatial] when it is not batched.
        weight: [C_out, C_in/groups, *kernel]; transposed: [C_in, C_out/groups, *kernel].
        bias: [C_out] or None.
        stride, padding, dilation, output_padding: as given: a number, one per dimension, or
            ``"same"``/``"valid"`` for the padding.
        transposed: whether it is a transposed convolution.
        groups: how many groups the channels fall into.
    """

    nodes: tuple[Node, ...]
    input: Operand
    weight: Operand
    bias: Operand | None
    stride: Any
    padding: Any
    dilation: Any
    transposed: bool
    output_padding: Any
    groups: int

    @property
    def channel_axis(self) -> int | None:
        """The axis of the output channels in the result; None without metadata."""
        given, weight = tensor_of(self.input), tensor_of(self.weight)
        if given is None or weight is None:
            return None
        return 1 if given.ndim == weight.ndim else 0


CONVOLUTIONS: frozenset[Any] = frozenset(
    {
        torch.conv1d, torch.conv2d, torch.conv3d,
        torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d, torch.convolution,
        aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding,
        aten.conv3d.default, aten.conv3d.padding, aten.conv_transpose1d.default,
        aten.conv_transpose2d.input, aten.conv_transpose3d.input,
        aten.convolution.default, aten._convolution.default,
    }
)  # fmt: skip

_TRANSPOSED: frozenset[Any] = frozenset(
    {
        torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
        aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
    }
)  # fmt: skip


def read_convolution(node: Node) -> Convolution | Decline:
    """Reads the convolution that `node` calls; `node.target in CONVOLUTIONS` holds."""
    bound = bind(node)
    if isinstance(bound, Decline):
        return bound
    transposed = bound.get("transposed", node.target in _TRANSPOSED)
    if not isinstance(bound["groups"], int) or not isinstance(transposed, bool):
        return Decline("non-constant", "{} has a number of groups that is not a constant", node, (node.name,))
    operands = [bound["input"], bound["weight"], bound["bias"]]
    if not all(isinstance(operand, Node) for operand in operands[:2]) or not _is_optional_node(operands[2]):
        return Decline("unsupported-arguments", "{} has operands that are not tensors", node, (node.name,))
    return Convolution(
        nodes=(node,),
        input=bound["input"],
        weight=bound["weight"],
        bias=bound["bias"],
        stride=bound["stride"],
        padding=bound["padding"],
        dilation=bound["dilation"],
        transposed=transposed,
        output_padding=bound.get("output_padding", 0),
        groups=bound["groups"],
    )


def read_convolution_module(
    node: Node, module: ConvNd, arguments: Mapping[str, Any], operands: Mapping[str, Operand | None]
) -> Convolution | Decline:
    """Reads a call of a convolution of torch.nn.

    Args:
        node: the call.
        module: what is called.
        arguments: the arguments of the call, by name.
        operands: the module's weight and bias.
    """
    if module.padding_mode != "zeros":
        return Decline(
            "padding-mode",
            "{} pads with {!r}, which a functional convolution cannot",
            node,
            (node.target, module.padding_mode),
        )
    if arguments.get("output_size") is not None:
        return Decline(
            "output-size", "{} is called with output_size, which sets its padding anew", node, (node.target,)
        )
    return Convolution(
        nodes=(node,),
        input=arguments["input"],
        weight=operands["weight"],  # type: ignore[arg-type]
        bias=operands["bias"],
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        transposed=module.transposed,
        output_padding=module.output_padding,
        groups=module.groups,
    )


def _is_optional_node(given: object) -> bool:
    return given is None or isinstance(given, Node)
