"""Affine steps: multiplications and additions with one number per channel, however they are spelled.

A step reads `source` and an operand:

    mul:  source · operand          add:  sign · source + factor · operand
    div:  source / operand

so `t - y`, `torch.sub(y, t, alpha=2)` and `aten.rsub` are additions with signs and factors. Whether the
operand has one number per channel is told by its shape, aligned from the right as broadcasting does: of all
its sizes only the one on the channel axis may differ from 1. A size that is a symbol is not 1 and equals
another one only where it is the same expression; no guard is added to find out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Node

from fxpasses.graph.canonical import operator_of, read_call
from fxpasses.graph.decline import Decline
from fxpasses.graph.metadata import tensor
from fxpasses.graph.operands import Operand
from fxpasses.torch_internals.sizes import same_expression

Kind = Literal["mul", "div", "add"]

_KINDS: dict[object, Kind] = {
    "aten::mul": "mul",
    "aten::multiply": "mul",
    "aten::div": "div",
    "aten::divide": "div",
    "aten::true_divide": "div",
    "aten::add": "add",
    "aten::sub": "add",
    "aten::subtract": "add",
    "aten::rsub": "add",
}
_SUBTRACTIONS = ("aten::sub", "aten::subtract")


@dataclass(frozen=True)
class Affine:
    """One step; see the module's docstring.

    Attributes:
        node: the node that computes it.
        source: what is scaled or shifted.
        kind: which step it is.
        operand: a tensor, or a number.
        sign, factor: the numbers before source and operand in an addition.
    """

    node: Node
    source: Node
    kind: Kind
    operand: Operand | float
    sign: float = 1.0
    factor: float = 1.0

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The node, as other views have it."""
        return (self.node,)


def is_affine(node: Node) -> bool:
    """Whether the node multiplies, divides, adds or subtracts, not in place."""
    return node.op in ("call_function", "call_method") and operator_of(node) in _KINDS


def affine_steps(node: Node) -> list[Affine] | Decline:
    """The ways to read a node as a step: of a product or a sum of two nodes, each may be the source."""
    call = read_call(node)
    if isinstance(call, Decline):
        return call
    name, given = call.operator, call.arguments
    kind = _KINDS[name]
    if given.get("rounding_mode") is not None:
        return Decline("unsupported-arguments", "{} rounds what it divides", node, (node.name,))
    first, second, alpha = given["self"], given["other"], given.get("alpha", 1)
    if not all(map(_is_operand, (first, second))) or not _is_number(alpha):
        return Decline("non-constant", "{} has an operand that is computed in the graph", node, (node.name,))
    if kind == "div":
        return [Affine(node, first, kind, second)] if isinstance(first, Node) else []
    if kind == "mul":
        pairs = ((first, second), (second, first))
        return [Affine(node, a, kind, b) for a, b in pairs if isinstance(a, Node)]
    # result = left · first + right · second
    left, right = (1.0, float(alpha))
    if name in _SUBTRACTIONS:
        right = -right
    elif name == "aten::rsub":
        left, right = -right, 1.0
    steps = [Affine(node, first, kind, second, left, right)] if isinstance(first, Node) else []
    return steps + ([Affine(node, second, kind, first, right, left)] if isinstance(second, Node) else [])


def _is_operand(given: object) -> bool:
    return isinstance(tensor(given), torch.Tensor) if isinstance(given, Node) else _is_number(given)


def _is_number(given: object) -> bool:
    return isinstance(given, (int, float)) and not isinstance(given, bool)


# Shapes ----------------------------------------------------------------------------------------------------


def same_shape(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors have the same sizes, without adding a guard."""
    return first.ndim == second.ndim and all(map(same_expression, first.shape, second.shape))


def is_per_channel(operand: torch.Tensor, result: torch.Tensor, axis: int) -> bool:
    """Whether broadcasting gives every channel of `axis` one number of `operand`, and no size grows."""
    missing = result.ndim - operand.ndim
    if missing < 0:
        return False
    for position, size in enumerate(operand.shape, start=missing):
        if isinstance(size, int) and size == 1:
            continue
        if position != axis or not same_expression(size, result.shape[axis]):
            return False
    return True


# Divisors --------------------------------------------------------------------------------------------------

_VIEWS = frozenset(
    f"aten::{name}"
    for name in (
        "view", "reshape", "unsqueeze", "squeeze", "to", "_to_copy", "contiguous", "clone", "expand",
        "detach", "float", "double", "half", "type_as", "alias",
    )
)  # fmt: skip
_NEVER_NEGATIVE = frozenset(
    f"aten::{name}" for name in ("sqrt", "abs", "exp", "sigmoid", "softplus", "relu", "square")
)


def is_never_zero(given: Operand | float) -> bool:
    """Whether a divisor cannot be zero: a number, sqrt(v + 1e-5), |v| + 1e-5, a clamp from above zero.

    A channel that is divided by zero is infinite in eager, with the sign that each element has; a folded
    weight would give NaN. sqrt(v + eps) is zero for v = -eps alone, where eager's batch norm is not defined
    either.
    """
    if not isinstance(given, Node):
        return isinstance(given, (int, float)) and given != 0
    name = operator_of(given)
    if not given.all_input_nodes:
        return False
    if name in _VIEWS:
        return is_never_zero(given.all_input_nodes[0])
    call = read_call(given)
    if isinstance(call, Decline):
        return False
    inner, other = call.arguments.get("self"), call.arguments.get("other")
    if name == "aten::sqrt":
        return isinstance(inner, Node) and _adds_positive(inner)
    if name == "aten::add":
        return _is_positive(other) and isinstance(inner, Node) and _base(inner) in _NEVER_NEGATIVE
    if name in ("aten::clamp", "aten::clamp_min"):
        return _is_positive(call.arguments.get("min"))
    return False


def _adds_positive(node: Node) -> bool:
    while operator_of(node) in _VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    call = read_call(node) if operator_of(node) == "aten::add" else None
    return not isinstance(call, (Decline, type(None))) and _is_positive(call.arguments.get("other"))


def _base(node: Node) -> object:
    while operator_of(node) in _VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return operator_of(node)


def _is_positive(given: object) -> bool:
    return _is_number(given) and given > 0  # type: ignore[operator]  # a number, just checked
