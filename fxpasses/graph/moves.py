"""Moves: operators that carry every channel along unchanged, maybe to another axis.

transpose, permute, flatten, view, reshape, squeeze, unsqueeze, contiguous, dropout in eval mode and
upsampling by the nearest element commute with a multiplication and an addition of one number per channel.
Where the channels go is known for a transposition; for a reshape they are on the axis of the same size
before which there are as many elements as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fxpasses.graph import modules
from fxpasses.graph.canonical import operator_of, read_call
from fxpasses.graph.decline import Decline
from fxpasses.graph.metadata import tensor
from fxpasses.graph.schema import signature_of_function
from fxpasses.torch_internals.sizes import same_expression

_TRANSPOSITIONS = frozenset({"aten::transpose", "aten::swapaxes", "aten::permute"})
_RESHAPES = frozenset(
    f"aten::{name}" for name in ("view", "reshape", "flatten", "squeeze", "unsqueeze", "_unsafe_view")
)
_COPIES = frozenset({"aten::contiguous", "aten::clone"})
_UPSAMPLES = frozenset(
    f"aten::{name}{rank}d" for name in ("upsample_nearest", "_upsample_nearest_exact") for rank in (1, 2, 3)
)
_DROPOUTS: tuple[Callable[..., Any], ...] = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
_DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class Move:
    """One operator that moves channels along.

    Attributes:
        node: the node that computes it.
        source: what it reads.
        identity: whether it does nothing, as dropout in eval mode.
    """

    node: Node
    source: Node
    identity: bool = False

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The node, as other views have it."""
        return (self.node,)

    def axis_after(self, axis: int) -> int | None:
        """The axis of the result that holds what `axis` of the source held; None where none does alone."""
        name = operator_of(self.node)
        before, after = tensor(self.source), tensor(self.node)
        if before is None or after is None:
            return None
        if name in _TRANSPOSITIONS:
            return _transposed(self.node, axis, before.ndim)
        if name in _RESHAPES:
            return _reshaped(axis, before, after)
        return axis


def read_move(node: Node) -> Move | None:
    """Reads a node as a move, or None."""
    if node.op == "call_module":
        return _read_module(node)
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], Node):
        return None
    source, name = node.args[0], operator_of(node)
    if name in _TRANSPOSITIONS | _RESHAPES | _COPIES | _UPSAMPLES:
        return Move(node, source)
    if node.target in _DROPOUTS:
        bound = signature_of_function(node.target).bind(node.args, node.kwargs)
        idle = isinstance(bound, dict) and bound["training"] is False and bound["inplace"] is False
        return Move(node, source, identity=True) if idle else None
    if name == "aten::dropout":
        call = read_call(node)
        idle = not isinstance(call, Decline) and call.arguments.get("train") is False
        return Move(node, source, identity=True) if idle else None
    if node.target is F.interpolate:
        bound = signature_of_function(F.interpolate).bind(node.args, node.kwargs)
        nearest = isinstance(bound, dict) and bound["mode"] in ("nearest", "nearest-exact")
        return Move(node, source) if nearest else None
    return None


def _read_module(node: Node) -> Move | None:
    """Dropout that is switched off; modules of other kinds are left to tracers that open them."""
    found = modules.read(node, frozenset(_DROPOUT_MODULES))
    if not isinstance(found, tuple) or found[0].training or getattr(found[0], "inplace", False):
        return None
    source = found[1]["input"]
    return Move(node, source, identity=True) if isinstance(source, Node) else None


def _transposed(node: Node, axis: int, rank: int) -> int | None:
    call = read_call(node)
    if isinstance(call, Decline):
        return None
    given = call.arguments
    if "dims" in given:
        order = given["dims"]
        if not all(isinstance(dim, int) for dim in order):
            return None
        return [int(dim) % rank for dim in order].index(axis)
    pair = [given.get("dim0", given.get("axis0")), given.get("dim1", given.get("axis1"))]
    if not all(isinstance(dim, int) for dim in pair):
        return None
    first, second = (int(dim) % rank for dim in pair if dim is not None)
    return {first: second, second: first}.get(axis, axis)


def _reshaped(axis: int, before: torch.Tensor, after: torch.Tensor) -> int | None:
    channels, ahead = before.shape[axis], math.prod(before.shape[:axis])
    for position, size in enumerate(after.shape):
        if same_expression(size, channels) and same_expression(math.prod(after.shape[:position]), ahead):
            return position
    return None
