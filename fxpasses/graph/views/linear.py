"""Matrix products with a weight: y = x @ weight.T + bias, in all of the spellings that torch has for it.

    linear(x, weight, bias)     addmm(bias, x, weight)     x @ weight + bias     mm(x, weight)

The weight is [C_out, C_in] in the first and [C_in, C_out] in the others; `weight_axis` says which.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxpasses.graph.decline import Decline
from fxpasses.graph.metadata import tensor
from fxpasses.graph.operands import Operand, tensor_of
from fxpasses.graph.schema import bind
from fxpasses.torch_internals.operators import LINEAR_FUNCTION

aten = torch.ops.aten


@dataclass(frozen=True)
class Linear:
    """A matrix product with a weight: `linear`, `addmm`, `mm`, `matmul`, or one of those and an addition.

    Attributes:
        nodes: the nodes that make it up, in program order; the last one is its result.
        input: [..., C_in].
        weight: [C_out, C_in], or [C_in, C_out] where `weight_axis` is 1.
        bias: [C_out] or None.
        weight_axis: the axis of the output channels in the weight.
    """

    nodes: tuple[Node, ...]
    input: Operand
    weight: Operand
    bias: Operand | None
    weight_axis: int

    @property
    def channel_axis(self) -> int | None:
        """The axis of the output channels in the result; None without metadata."""
        given = tensor_of(self.input)
        return None if given is None else given.ndim - 1


_LINEARS: frozenset[Any] = frozenset({LINEAR_FUNCTION, aten.linear.default})
_ADDMMS: frozenset[Any] = frozenset({torch.addmm, aten.addmm.default, "addmm"})
_PRODUCTS: frozenset[Any] = frozenset(
    {
        torch.mm,
        torch.matmul,
        operator.matmul,
        aten.mm.default,
        aten.matmul.default,
        "mm",
        "matmul",
        "__matmul__",
    }
)
_ADDITIONS: frozenset[Any] = frozenset({torch.add, operator.add, aten.add.Tensor, "add", "__add__"})


def is_linear(node: Node) -> bool:
    """Whether the node's operator is a matrix product, possibly a linear one."""
    return node.target in _LINEARS or node.target in _ADDMMS or node.target in _PRODUCTS


def read_linear(node: Node) -> Linear | Decline | None:
    """Reads a linear operator that ends in `node`, however it is spelled."""
    if node.op not in ("call_function", "call_method"):
        return None
    target = node.target
    if target in _LINEARS:
        return _read_linear_function(node)
    if target in _ADDMMS:
        return _read_addmm(node)
    if target in _PRODUCTS:
        return _read_product(node)
    if target in _ADDITIONS:
        return _read_biased_product(node)
    return None


def _read_linear_function(node: Node) -> Linear | Decline:
    bound = bind(node)
    if isinstance(bound, Decline):
        return bound
    return Linear((node,), bound["input"], bound["weight"], bound["bias"], weight_axis=0)


def _read_addmm(node: Node) -> Linear | Decline:
    bound = bind(node)
    if isinstance(bound, Decline):
        return bound
    if "out_dtype" in bound or bound["beta"] != 1 or bound["alpha"] != 1:
        return Decline("unsupported-arguments", "{} scales its operands", node, (node.name,))
    bias = tensor(bound["self"])
    if bias is None or bias.ndim != 1:
        return Decline("bias-shape", "{} adds a matrix, not one number per channel", node, (node.name,))
    return Linear((node,), bound["mat1"], bound["mat2"], bound["self"], weight_axis=1)


def _read_product(node: Node) -> Linear | Decline:
    bound = bind(node)
    if isinstance(bound, Decline):
        return bound
    given, weight = bound["self"], bound["mat2"] if "mat2" in bound else bound["other"]
    shapes = [tensor(given), tensor(weight)]
    if "out_dtype" in bound or any(shape is None or shape.ndim != 2 for shape in shapes):
        return Decline("not-a-linear", "{} is not a product of two matrices", node, (node.name,))
    return Linear((node,), given, weight, None, weight_axis=1)


def _read_biased_product(node: Node) -> Linear | Decline | None:
    """An addition of one number per channel to a product that nobody else reads."""
    bound = bind(node)
    if isinstance(bound, Decline) or bound.get("alpha", 1) != 1:
        return None
    for product, bias in ((bound["self"], bound["other"]), (bound["other"], bound["self"])):
        shape = tensor(bias)
        if not isinstance(product, Node) or shape is None or shape.ndim != 1 or len(product.users) != 1:
            continue
        found = _read_product(product) if product.target in _PRODUCTS else None
        if isinstance(found, Linear):
            return Linear((product, node), found.input, found.weight, bias, weight_axis=1)
    return None
