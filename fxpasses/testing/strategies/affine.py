"""Models around conv_affine and affine_across_views: chains, and chains that are bent in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from fxpasses.testing.specimens import Specimen
from fxpasses.testing.strategies.chains import Chain, Draft, Step, held, operand_of, producer_of
from fxpasses.testing.strategies.layers import (
    FIRES,
    RIGHT_AS_THEY_ARE,
    Expectation,
    convolution,
    except_at,
    image_for,
    in_kind,
    kinds_of,
    norm_after,
    randomised,
    seeded,
)
from fxpasses.testing.strategies.readers import second_reader
from fxpasses.torch_internals.modules import BatchNormBase

Tensor = torch.Tensor

# Bent steps ------------------------------------------------------------------------------------------------


def _across(draw: st.DrawFn, draft: Draft) -> Draft:
    """Multiplied by numbers along another axis than that of the channels, which may be as long."""
    axes = [axis for axis, size in enumerate(draft.y.shape) if axis != draft.axis and size > 1]
    axis = draw(st.sampled_from(axes))
    shape = (draft.y.shape[axis], *[1] * (draft.y.dim() - axis - 1))
    return draft.then(held(draw, Step(lambda y, p: y * p), torch.zeros(shape)))


def _full(draw: st.DrawFn, draft: Draft) -> Draft:
    return draft.then(held(draw, Step(lambda y, p: y * p), torch.zeros(draft.y.shape)))


def _divided(draw: st.DrawFn, draft: Draft) -> Draft:
    operand, spread = operand_of(draw, draft.y, draft.axis)
    return draft.then(held(draw, Step(lambda y, p: y / p, spread=spread), operand))


def _scaled_by_itself(draw: st.DrawFn, draft: Draft) -> Draft:
    others = [axis for axis in range(draft.y.dim()) if axis != draft.axis]
    return draft.then(Step(lambda y: y * y.mean(others, keepdim=True)))


def _rounded(draw: st.DrawFn, draft: Draft) -> Draft:
    return draft.then(Step(lambda y: torch.div(y, 0.5, rounding_mode="floor")))


def _normalised(draw: st.DrawFn, draft: Draft) -> Draft:
    return draft.then(norm_after(draw, draft.y.dim(), draft.y.shape[1]))


def _widened(draw: st.DrawFn, draft: Draft) -> Draft:
    behind = draft.y.dim() - draft.axis - 1
    operand = torch.zeros(draft.y.shape[draft.axis], *[1] * behind)
    return draft.then(held(draw, Step(lambda y, p: y * p), operand))


# conv_affine -----------------------------------------------------------------------------------------------

_OVERWRITTEN = Expectation(except_at("aten", 0, 1), except_at("aten", "mutation"), grads=False)

CONV_AFFINE: dict[str, Expectation] = {
    **RIGHT_AS_THEY_ARE,
    "forked": FIRES,
    "written": Expectation(None, grads=False),
    # Without a batch, core ATen has a squeeze behind the convolution.
    "unbatched": Expectation(except_at("aten", 1, 0)),
    # The tracer that keeps modules sees one that pads otherwise; the others see padding, and a convolution.
    "padding-mode": Expectation(except_at("symbolic_trace", 1, 0), {"symbolic_trace": "padding-mode"}),
    "extra-user": Expectation(code="multiple-users"),
    "own-mean": Expectation(code="multiple-users"),
    "spatial-broadcast": Expectation(code="operand-shape"),
    "full-shape": Expectation(),
    "widened": Expectation(code="dtype"),
    "zero-divisor": Expectation(code="zero-divisor"),
    "rounded": Expectation(),
    "training-mode": Expectation(grads=False),
    # Core ATen has a view behind the linear layer.
    "channel-axis": Expectation(code=except_at("aten", "channel-axis")),
    "overwritten": _OVERWRITTEN,
    # What `torch.fx.symbolic_trace` records has no sizes, so they are those of the inputs.
    "symbolic-channels": Expectation(
        except_at("symbolic_trace", 0, 1), except_at("symbolic_trace", "symbolic-channels"), dynamic=True
    ),
}
"""The kinds of models, and what conv_affine must do with them at each level."""

Bend = Callable[[st.DrawFn, Draft], Draft]

_BENT: dict[str, Bend] = {
    "own-mean": _scaled_by_itself,
    "spatial-broadcast": _across,
    "full-shape": _full,
    "widened": _widened,
    "zero-divisor": _divided,
    "rounded": _rounded,
    "training-mode": _normalised,
    "channel-axis": _normalised,
}


class _Free(nn.Module):
    """A convolution whose weight is an input, so that its channels may be symbols, and no bias to add to."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.softplus(F.conv2d(torch.tanh(x), weight) * 1.5 + 0.5)


@st.composite
def conv_affine(draw: st.DrawFn) -> Specimen:
    """Convolutions and linear layers before multiplications and additions per channel, and near misses."""
    kind = draw(kinds_of(CONV_AFFINE))
    with seeded(draw):
        if kind == "symbolic-channels":
            shapes = ((3, draw(st.integers(2, 4)), 5, 7), (draw(st.integers(5, 7)), 0, 3, 3))
            x, weight = (
                torch.randn(shape[0], shape[1] or shapes[0][1], *shape[2:]).double() for shape in shapes
            )
            return CONV_AFFINE[kind].of(kind, _Free(), x.requires_grad_(), weight.requires_grad_())
        producer, x = _producer(draw, kind)
        draft = Draft(
            producer.double()(x), axis=x.dim() - 1 if kind == "channel-axis" else int(kind != "unbatched")
        )
        if kind in _BENT:
            draft = _BENT[kind](draw, draft)
        for _ in range(draw(st.integers(0, 1 if kind == "bfloat16" else 3))):
            draft = draft.affine(draw) if draw(st.integers(0, 3)) else draft.normalised(draw)
        draft = draft.affine(draw)
        fork = 0
        if kind == "forked":
            fork, draft = len(draft.steps), draft.affine(draw)
        return _specimen(draw, kind, CONV_AFFINE[kind], producer, draft, x, fork)


def _producer(draw: st.DrawFn, kind: str) -> tuple[Any, Tensor]:
    if kind == "channel-axis":
        return _sequence(draw)
    if kind == "padding-mode":
        dimensions, mode = draw(st.integers(1, 3)), draw(st.sampled_from(("reflect", "replicate")))
        producer: Any = convolution(draw, dimensions, padding=1, padding_mode=mode)
    else:
        dimensions = draw(st.integers(int(kind == "unbatched"), 3))
        producer = producer_of(draw, dimensions)
    x = image_for(draw, producer, dimensions)
    return producer, x[0] if kind == "unbatched" else x


def _sequence(draw: st.DrawFn) -> tuple[Any, Tensor]:
    """A linear layer, and a sequence of [N, T, C_in]."""
    sizes = st.integers(1, 4)
    layer = nn.Linear(draw(sizes), draw(sizes), bias=draw(st.booleans()))
    return layer, torch.randn(2, draw(st.integers(2, 4)), layer.in_features, dtype=torch.float64)


def _specimen(
    draw: st.DrawFn,
    kind: str,
    expectation: Expectation,
    producer: nn.Module,
    draft: Draft,
    x: Tensor,
    fork: int = 0,
) -> Specimen:
    read = second_reader(draw, min(draft.y.dim(), x.dim())) if kind == "extra-user" else torch.sin
    model = randomised(Chain(producer, draft.steps, kind, fork, read))
    if kind == "training-mode":
        for module in model.modules():
            module.train(isinstance(module, BatchNormBase))
    x = in_kind(kind, model, x)
    if kind == "widened":
        x = in_kind("float32", model.get_submodule("producer"), x.detach())
    return expectation.of(kind, model, x)


# affine_across_views ---------------------------------------------------------------------------------------

AFFINE_ACROSS_VIEWS: dict[str, Expectation] = {
    **RIGHT_AS_THEY_ARE,
    "nearest": FIRES,
    # Where its sizes are nodes that read it, what is reshaped has several users.
    "shape-read": Expectation(None),
    "extra-user": Expectation(code="multiple-users"),
    "spatial-broadcast": Expectation(code="operand-shape"),
    "zero-divisor": Expectation(code="zero-divisor"),
    "widened": Expectation(code="dtype"),
    "channel-axis": Expectation(code="channel-axis"),
    "overwritten": _OVERWRITTEN,
    "merged-channels": Expectation(),
    "training-mode": Expectation(grads=False),
    "dropout-on": Expectation(),
    "bilinear": Expectation(),
    "padded": Expectation(),
    "moved-twice": Expectation(),
}
"""The kinds of models, and what affine_across_views must do with them at each level."""

_OF_INDICES = Expectation(except_at("aten", 1, 0))
"""What is expected of upsampled images of other than two dimensions, which core ATen indexes."""

_BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "nearest": lambda y: F.interpolate(y, scale_factor=2, mode="nearest"),
    "shape-read": lambda y: y.reshape(y.shape[0], y.shape[1], -1),
    "bilinear": lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"),
    "dropout-on": lambda y: F.dropout(y, 0.5, training=True),
    "padded": lambda y: F.pad(y, (1, 1)),
    "merged-channels": lambda y: y.flatten(1),
    "moved-twice": lambda y: (moved := y.unsqueeze(-1)) * 2 + moved,
    "training-mode": lambda y: y.unsqueeze(-1).squeeze(-1),
    "channel-axis": lambda y: y.unsqueeze(-1).squeeze(-1),
}
"""What stands behind the producer in some kinds, instead of moves that are drawn."""


@st.composite
def affine_across_views(draw: st.DrawFn) -> Specimen:
    """Convolutions and linear layers, then views, then arithmetic per channel, and near misses."""
    kind = draw(kinds_of(AFFINE_ACROSS_VIEWS))
    expectation = AFFINE_ACROSS_VIEWS[kind]
    with seeded(draw):
        sequence = kind == "channel-axis" or (kind in RIGHT_AS_THEY_ARE and draw(st.integers(0, 2)) == 0)
        if sequence:
            producer, x = _sequence(draw)
        else:
            dimensions = 2 if kind == "bilinear" else draw(st.integers(int(kind in _BETWEEN), 3))
            producer = producer_of(draw, dimensions)
            x = image_for(draw, producer, dimensions)
        draft = Draft(producer.double()(x), x.dim() - 1 if sequence else 1)
        if kind in RIGHT_AS_THEY_ARE:
            draft = _through_moves(draw, draft)
            before, *behind = map(bool, draft.runs)
            count = sum(behind)
            # Core ATen has a view behind a linear layer of a sequence.
            at_aten = count + before if sequence else count
            return _specimen(
                draw, kind, replace(expectation, count=except_at("aten", count, at_aten)), producer, draft, x
            )
        draft = draft.through(_BETWEEN[kind], draft.axis) if kind in _BETWEEN else draft.moved(draw)
        if kind == "nearest" and draft.y.dim() != 4:
            expectation = _OF_INDICES
        if kind == "merged-channels" and draft.y.shape[1] == producer.out_channels:
            expectation = Expectation(None)
        if kind in _BENT:
            draft = _BENT[kind](draw, draft)
        for _ in range(draw(st.integers(1, 2))):
            draft = draft.affine(draw)
        return _specimen(draw, kind, expectation, producer, draft, x)


def _through_moves(draw: st.DrawFn, draft: Draft) -> Draft:
    """One or two moves, and arithmetic round them."""
    for _ in range(draw(st.integers(0, 1))):
        draft = draft.affine(draw)
    for _ in range(draw(st.integers(1, 2))):
        draft = draft.moved(draw)
        for _ in range(draw(st.integers(0, 2))):
            draft = draft.affine(draw) if draw(st.booleans()) else draft.normalised(draw)
    return draft.affine(draw)
