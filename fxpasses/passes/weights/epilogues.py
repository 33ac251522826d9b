"""Epilogues: what follows a convolution in inference and can be computed in the same pass over memory.

    activation(convolution + summand)

Inductor has decomposed the graph by the time it is read here, so an activation is a handful of nodes. A node
is part of an epilogue only if nothing outside reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch.fx import Node

from fxpasses.graph.metadata import tensor
from fxpasses.kernels.convolution import ACTIVATIONS
from fxpasses.torch_internals.sizes import same_sizes

aten = torch.ops.aten

_X = "x"
_Pattern = Any
"""`_X`, a number, the name of a limit to bind, or (operator, patterns of its arguments)."""

_SHIFTED = (aten.clamp_max.default, (aten.clamp_min.default, (aten.add.Tensor, _X, 3), 0), 6)
_SHIFTED_AT_ONCE = (aten.clamp.default, (aten.add.Tensor, _X, 3), 0, 6)
_ERF = (aten.add.Tensor, (aten.erf.default, (aten.mul.Tensor, _X, math.sqrt(0.5))), 1)
_PATTERNS: tuple[tuple[str, _Pattern], ...] = (
    ("clamp", (aten.relu.default, _X)),
    ("clamp", (aten.clamp_max.default, (aten.clamp_min.default, _X, "low"), "high")),
    ("clamp", (aten.clamp.default, _X, "low", "high")),
    ("clamp", (aten.hardtanh.default, _X, "low", "high")),
    ("silu", (aten.div.Tensor, _X, (aten.add.Tensor, (aten.exp.default, (aten.neg.default, _X)), 1))),
    ("silu", (aten.mul.Tensor, _X, (aten.sigmoid.default, _X))),
    ("silu", (aten.silu.default, _X)),
    ("hardswish", (aten.div.Tensor, (aten.mul.Tensor, _X, _SHIFTED), 6)),
    ("hardswish", (aten.div.Tensor, (aten.mul.Tensor, _X, _SHIFTED_AT_ONCE), 6)),
    ("hardswish", (aten.hardswish.default, _X)),
    ("gelu", (aten.mul.Tensor, (aten.mul.Tensor, _X, 0.5), _ERF)),
    ("gelu", (aten.gelu.default, _X)),
    ("sigmoid", (aten.sigmoid.default, _X)),
    ("hardsigmoid", (aten.div.Tensor, _SHIFTED, 6)),
    ("hardsigmoid", (aten.div.Tensor, _SHIFTED_AT_ONCE, 6)),
    ("hardsigmoid", (aten.hardsigmoid.default, _X)),
    ("leaky_relu", (aten.where.self, (aten.gt.Scalar, _X, 0), _X, (aten.mul.Tensor, _X, "low"))),
    ("leaky_relu", (aten.leaky_relu.default, _X, "low")),
)
_DEEPEST = 5
"""Of how many operators after one another the longest pattern is."""
_COMMUTATIVE = (aten.add.Tensor, aten.mul.Tensor)


@dataclass(frozen=True)
class Epilogue:
    """What one operator computes after the sums of a convolution.

    Attributes:
        last: the node whose value it is.
        nodes: those it stands for, the convolution among them.
        summand: a tensor of the result's sizes that is added, or None.
        activation: one of `ACTIVATIONS`.
        low: the lower limit of a clamp, or the slope of a leaky ReLU below zero.
        high: the upper limit of a clamp.
    """

    last: Node
    nodes: frozenset[Node]
    summand: Node | None = None
    activation: str = ACTIVATIONS[0]
    low: float = 0.0
    high: float = inf


def epilogue_of(convolution: Node, *, summand: bool) -> Epilogue:
    """The longest epilogue of a convolution, which may be empty.

    Args:
        convolution: a node of inductor's graph.
        summand: whether the operator that will compute it can add a tensor.
    """
    start = Epilogue(convolution, frozenset({convolution}))
    if summand:
        start = _with_summand(start) or start
    return _with_activation(start) or start


def _with_summand(before: Epilogue) -> Epilogue | None:
    if len(before.last.users) != 1:
        return None
    (user,) = before.last.users
    if user.target is not aten.add.Tensor or user.kwargs or len(user.args) != 2:
        return None
    others = [operand for operand in user.args if operand is not before.last]
    if len(others) != 1 or not isinstance(others[0], Node):
        return None
    found, result = tensor(others[0]), tensor(before.last)
    if found is None or result is None or not _alike(found, result):
        return None
    return Epilogue(user, before.nodes | {user}, summand=others[0])


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return same_sizes(one, other) and (one.dtype, one.device) == (other.dtype, other.device)


def _with_activation(before: Epilogue) -> Epilogue | None:
    start = before.last
    for root in _descendants(start):
        for name, pattern in _PATTERNS:
            limits: dict[str, float] = {}
            inside: set[Node] = set()
            if not _matches(root, pattern, start, limits, inside):
                continue
            if any(user not in inside for node in (inside - {root}) | {start} for user in node.users):
                continue
            found, result = tensor(root), tensor(start)
            if found is None or result is None or not _alike(found, result):
                continue
            low, high = limits.get("low", 0.0), limits.get("high", inf)
            return Epilogue(root, before.nodes | inside, before.summand, name, low, high)
    return None


def _descendants(start: Node) -> Iterator[Node]:
    """What reads a node directly or not, the farthest first, within the reach of a pattern."""
    levels = [[start]]
    for _ in range(_DEEPEST):
        levels.append(list(dict.fromkeys(user for node in levels[-1] for user in node.users)))
    yield from dict.fromkeys(node for level in reversed(levels[1:]) for node in level)


def _matches(node: object, pattern: _Pattern, x: Node, limits: dict[str, float], inside: set[Node]) -> bool:
    """Whether `node` is `pattern` of `x`; binds the limits and gathers the nodes."""
    if pattern == _X:
        return node is x
    if isinstance(pattern, str):
        if type(node) not in (int, float):
            return False
        limits[pattern] = float(node)  # type: ignore[arg-type]  # it is a number
        return True
    if isinstance(pattern, (int, float)):
        return type(node) in (int, float) and node == pattern
    operator, *operands = pattern
    if not isinstance(node, Node) or node.target is not operator or node.kwargs:
        return False
    if len(node.args) != len(operands):
        return False
    orders: list[tuple[object, ...]] = [node.args]
    if operator in _COMMUTATIVE:
        orders.append(node.args[::-1])
    for order in orders:
        trial, gathered = dict(limits), set(inside)
        if all(_matches(order[at], operand, x, trial, gathered) for at, operand in enumerate(operands)):
            limits.update(trial)
            inside |= gathered | {node}
            return True
    return False
