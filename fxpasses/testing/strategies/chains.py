"""Chains: a convolution or linear layer, and steps after it that scale, shift or move its channels.

A chain is drawn step by step along an example: what the steps so far make of the producer's result tells
which step may follow, on which axis its operand has its numbers, and how often a rule must fire.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from fxpasses.testing.strategies.layers import convolution, norm_after
from fxpasses.testing.strategies.readers import Reader

Tensor = torch.Tensor

# Steps -----------------------------------------------------------------------------------------------------

_WITH_TENSOR: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda y, p: y * p,
    lambda y, p: p * y,
    lambda y, p: torch.mul(y, other=p),
    lambda y, p: torch.multiply(p, y),
    lambda y, p: y + p,
    lambda y, p: p.add(y),
    lambda y, p: torch.add(y, p, alpha=2),
    lambda y, p: torch.add(p, y, alpha=-0.5),
    lambda y, p: y - p,
    lambda y, p: p - y,
    lambda y, p: torch.sub(y, p, alpha=3),
    lambda y, p: p.sub(y, alpha=0.5),
    lambda y, p: torch.rsub(y, p),
)
_DIVISIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda y, p: y / (p.abs() + 0.5),
    lambda y, p: torch.div(y, torch.sqrt(p.square() + 0.1)),
    lambda y, p: y.true_divide(p.clamp(min=0.25)),
)
"""By what is never zero, told by how it is computed: by parameters, since `torch.fx.symbolic_trace` computes
with buffers while it traces."""
_WITH_NUMBER: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda y: y * 1.5,
    lambda y: -0.5 * y,
    lambda y: y / 4,
    lambda y: torch.div(y, -0.5),
    lambda y: y + 1,
    lambda y: 0.75 - y,
    lambda y: torch.sub(y, 2, alpha=0.25),
    lambda y: y.add(0.5, alpha=-1),
    lambda y: torch.rsub(y, 1.0, alpha=2),
)
"""Numbers stand in the code, since Dynamo makes those of modules inputs where sizes are symbols."""


class Step(nn.Module):
    """A step with one number for each channel, or one in all."""

    def __init__(
        self, spelled: Callable[..., Tensor], operand: Tensor | None = None, spread: Any = None
    ) -> None:
        super().__init__()
        self.spelled, self.spread = spelled, spread
        self.operand = operand

    def forward(self, y: Tensor) -> Tensor:
        if self.operand is None:
            return self.spelled(y)
        return self.spelled(y, self.operand if self.spread is None else self.spread(self.operand))


_SPREADS: dict[int, tuple[Callable[[Tensor], Tensor], ...]] = {
    0: (lambda p: p[None], lambda p: p.view(1, -1)),
    1: (lambda p: p[:, None], lambda p: p.unsqueeze(-1), lambda p: p.reshape(1, -1, 1)),
    2: (lambda p: p[:, None, None], lambda p: p.view(-1, 1, 1), lambda p: p.reshape(1, -1, 1, 1)),
    3: (lambda p: p[:, None, None, None], lambda p: p.view(1, -1, 1, 1, 1)),
}
"""How a vector is laid along the channels, by the number of axes behind them."""


def operand_of(draw: st.DrawFn, y: Tensor, axis: int, *, vector: bool = True) -> tuple[Tensor, Any]:
    """A tensor for the numbers of a step, and what is done with it in the graph.

    Without `vector` it has two axes at least.
    """
    channels, behind = y.shape[axis], y.dim() - axis - 1
    kinds = ("held", "held", "one", "spread") if axis and behind in _SPREADS else ("held", "one")
    kind, spread = draw(st.sampled_from(kinds)), None
    shape: Sequence[int]
    if kind == "one":
        shape = draw(st.sampled_from(((), (1,) * (1 + (not vector)), (1,) * y.dim())))
    elif kind == "spread":
        shape, spread = (channels,), draw(st.sampled_from(_SPREADS[behind]))
    else:
        ahead = draw(st.integers(0 if vector or behind else 1, axis))
        shape = (*[1] * ahead, channels, *[1] * behind)
    return torch.zeros(shape), spread


def held(draw: st.DrawFn, step: Step, operand: Tensor, *, trains: bool | None = None) -> Step:
    """The step with its operand as a parameter or as a buffer."""
    del step.operand
    if draw(st.booleans()) if trains is None else trains:
        step.register_parameter("operand", nn.Parameter(operand))
    else:
        step.register_buffer("operand", operand)
    return step


def _affine_step(draw: st.DrawFn, y: Tensor, axis: int, *, vector: bool = True) -> Step:
    kind = draw(st.sampled_from(("number", "division", "tensor", "tensor", "tensor", "tensor")))
    if kind == "number":
        return Step(draw(st.sampled_from(_WITH_NUMBER)))
    operand, spread = operand_of(draw, y, axis, vector=vector)
    if kind == "division":
        return held(draw, Step(draw(st.sampled_from(_DIVISIONS)), spread=spread), operand, trains=True)
    return held(draw, Step(draw(st.sampled_from(_WITH_TENSOR)), spread=spread), operand)


# Moves -----------------------------------------------------------------------------------------------------

_MOVES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda y: y.transpose(1, -1),
    lambda y: torch.swapaxes(y, -1, 1),
    lambda y: y.transpose(0, 1),
)
_KEEPING_CHANNELS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda y: y.unsqueeze(-1),
    lambda y: y.unsqueeze(-1).squeeze(-1),
)
_IDLE: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda y: y,
    lambda y: y.contiguous(),
    lambda y: y.clone(),
    lambda y: F.dropout(y, 0.5, training=False),
)
"""What core ATen may leave out, so that it never stands alone."""


def _move(draw: st.DrawFn, y: Tensor, axis: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """A move that y can take, and the axis of the channels behind it."""
    choices = [(move, _axis_behind(move, y, axis)) for move in _MOVES]
    if axis == 1 and y.dim() < 5:
        shape = (*y.shape[:2], -1)
        choices += [(move, 1) for move in (*_KEEPING_CHANNELS, lambda y: y.reshape(shape))]
    if axis == 1 and y.dim() > 3:
        choices += [(move, _axis_behind(move, y, axis)) for move in _moves_of_images(y.dim())]
    (move, behind), idle = draw(st.sampled_from(choices)), draw(st.sampled_from(_IDLE))
    return (lambda y: idle(move(y))), behind


def _moves_of_images(rank: int) -> tuple[Callable[[Tensor], Tensor], ...]:
    spatial = range(2, rank)
    last, swapped = (0, *spatial, 1), (1, 0, *spatial)
    return (
        lambda y: y.flatten(2),
        lambda y: torch.flatten(y, 2, -1),
        lambda y: y.permute(last),
        lambda y: torch.permute(y, swapped),
    )


def _axis_behind(move: Callable[[Tensor], Tensor], y: Tensor, axis: int) -> int:
    """Where a move takes an axis, which is told by its number of entries."""
    sizes = [2 + index for index in range(y.dim())]
    return list(move(torch.zeros(sizes)).shape).index(sizes[axis])


# Chains ----------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """A producer and the steps after it, bent in one way or not at all."""

    late: Tensor

    def __init__(
        self,
        producer: nn.Module,
        steps: Sequence[nn.Module],
        kind: str,
        fork: int,
        read: Reader = torch.sin,
    ) -> None:
        super().__init__()
        self.producer, self.steps, self.read = producer, nn.ModuleList(steps), read
        self.kind, self.fork = kind, fork
        if kind == "overwritten":
            self.late = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        # A new tensor, so that writing to it is nobody else's business.
        x = torch.tanh(x)
        late = self.late + 1.5 if self.kind == "overwritten" else None
        y = self.producer(x)
        if self.kind in ("written", "overwritten"):
            x.add_(0.5)
        if late is not None:
            late.add_(0.25)
            y = y * late
        forked = y
        for index, step in enumerate(self.steps):
            y = step(y)
            forked = y if index < self.fork else forked
        return (F.softplus(y), self.read(forked)) if self.kind in ("extra-user", "forked") else F.softplus(y)


class _Product(nn.Module):
    """A matrix product, and maybe an addition to it that is a linear layer's."""

    def __init__(self, spelled: Callable[..., Tensor], inputs: int, outputs: int, bias: int) -> None:
        super().__init__()
        self.spelled, self.in_features = spelled, inputs
        self.weight, self.bias = nn.Parameter(torch.zeros(inputs, outputs)), nn.Parameter(torch.zeros(bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.spelled(x, self.weight, self.bias)


_PRODUCTS: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    lambda x, w, b: x @ w,
    lambda x, w, b: x.matmul(w) + b,
    lambda x, w, b: b + torch.mm(x, w),
    lambda x, w, b: torch.addmm(b, x, w),
    lambda x, w, b: F.linear(x, w.t()),
)


def producer_of(draw: st.DrawFn, dimensions: int) -> Any:
    """A convolution, or for no dimensions a linear layer or a matrix product."""
    if dimensions:
        return convolution(draw, dimensions, transposed=draw(st.booleans()))
    inputs, outputs = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    if draw(st.booleans()):
        return nn.Linear(inputs, outputs, bias=draw(st.booleans()))
    return _Product(draw(st.sampled_from(_PRODUCTS)), inputs, outputs, draw(st.sampled_from((1, outputs))))


@dataclass(frozen=True)
class Draft:
    """A chain that is being drawn.

    Attributes:
        y: what the steps so far make of the producer's result.
        axis: that of the channels.
        steps: the steps so far.
        runs: numbers of arithmetic steps between moves: `runs[0]` of those before the first move.
    """

    y: Tensor
    axis: int
    steps: tuple[nn.Module, ...] = ()
    runs: tuple[int, ...] = (0,)

    def then(self, step: nn.Module) -> Draft:
        """With a step of arithmetic after it."""
        y = step.eval().double()(self.y)
        return replace(self, y=y, steps=(*self.steps, step), runs=(*self.runs[:-1], self.runs[-1] + 1))

    def moved(self, draw: st.DrawFn) -> Draft:
        """With a move after it."""
        move, axis = _move(draw, self.y, self.axis)
        return self.through(move, axis)

    def through(self, move: Callable[[Tensor], Tensor], axis: int = 1) -> Draft:
        """With any other operator after it, which leaves the channels on an axis."""
        return Draft(move(self.y), axis, (*self.steps, Step(move)), (*self.runs, 0))

    def affine(self, draw: st.DrawFn) -> Draft:
        """With a multiplication or an addition after it."""
        # A vector added to a matrix product is its bias.
        return self.then(_affine_step(draw, self.y, self.axis, vector=self.y.dim() > 2 or bool(self.steps)))

    def normalised(self, draw: st.DrawFn) -> Draft:
        """With a batch norm after it, where one would read the channels."""
        y = self.y
        # Eager's own gradient of a batch norm is wrong for such strides (CPU, torch 2.13 and 2.15): those of
        # torch.rand(2, 3, 2).transpose(1, 2).unsqueeze(-1), which are channels_last up to a size of one.
        ambiguous = y.dim() == 4 and 1 in y.shape[2:] and not y.is_contiguous()
        if self.axis != 1 or y.dim() > 5 or ambiguous:
            return self
        return self.then(norm_after(draw, self.y.dim(), self.y.shape[1]))
