"""Models around efficient_conv_bn_eval: a convolution or linear layer before a batch norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from fxpasses.testing.captures import LEVELS
from fxpasses.testing.specimens import Specimen
from fxpasses.testing.strategies.layers import (
    FIRES,
    NAMES_SURVIVE,
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
from fxpasses.testing.strategies.readers import Reader, second_reader

CONV_BN: dict[str, Expectation] = {
    "plain": FIRES,
    "symbolic": Expectation(1, dynamic=True),
    "bfloat16": FIRES,
    # A rewrite in the convolution's place gets it right; only the values are compared.
    "written": Expectation(None, grads=False),
    "extra-user": Expectation(code="multiple-users"),
    "written-result": Expectation(
        code={**dict.fromkeys(LEVELS, "no-producer"), **dict.fromkeys(NAMES_SURVIVE, "multiple-users")}
    ),
    "overwritten": Expectation(except_at("aten", 0), except_at("aten", "mutation"), grads=False),
    # Core ATen has other operators for batch statistics; no site is looked at there.
    "training-mode": Expectation(code=except_at("aten", "training-mode"), grads=False),
    "no-statistics": Expectation(code=except_at("aten", "training-mode")),
    "other-axis": Expectation(code=except_at("aten", "channel-axis", "no-producer")),
    "spatial-broadcast": Expectation(code="no-producer"),
    "cast": Expectation(code="no-producer"),
    # What `torch.fx.symbolic_trace` records has no sizes, so they are those of the inputs.
    "symbolic-channels": Expectation(
        except_at("symbolic_trace", 0), except_at("symbolic_trace", "symbolic-channels"), dynamic=True
    ),
}
"""The kinds of models, and what the rule must do with them at each level.

Autograd refuses to differentiate through what was written over, running statistics included."""


class _ConvBn(nn.Module):
    """A convolution and a batch norm, bent in one way or not at all."""

    factor: torch.Tensor

    def __init__(self, producer: nn.Module, norm: Any, kind: str, read: Reader = torch.sin) -> None:
        super().__init__()
        self.producer, self.norm, self.kind, self.read = producer, norm, kind, read

    def forward(self, x: torch.Tensor) -> Any:
        # A new tensor, so that writing to it is nobody else's business.
        x = torch.tanh(x)
        produced = self.producer(x)
        if self.kind == "written":
            x.add_(0.5)
        elif self.kind == "spatial-broadcast":
            produced = produced * self.factor
        elif self.kind == "cast":
            produced = produced.to(torch.float64)
        elif self.kind == "written-result":
            produced.mul_(2.0)
        result = nn.functional.softplus(self.norm(produced))
        return (result, self.read(produced)) if self.kind == "extra-user" else result


class _Overwritten(_ConvBn):
    """What the convolution reads and what the norm reads are both written to after the convolution.

    So there is no place at which all operands have the values that eager reads.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, norm = torch.tanh(x), self.norm
        mean = norm.running_mean + torch.zeros_like(x.detach()).sum()
        produced = self.producer(x)
        x.add_(0.5)
        mean.add_(0.25)
        given = (mean, norm.running_var, norm.weight, norm.bias)
        return nn.functional.softplus(nn.functional.batch_norm(produced, *given, eps=norm.eps))


class _Free(nn.Module):
    """A grouped transposed convolution whose weight is an input, so that its channels may be symbols."""

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
    ) -> torch.Tensor:
        produced = nn.functional.conv_transpose2d(torch.tanh(x), weight, groups=2)
        return nn.functional.softplus(nn.functional.batch_norm(produced, mean, var, gamma, beta))


@st.composite
def conv_bn(draw: st.DrawFn) -> Specimen:
    """Convolutions and linear layers of every kind before a batch norm, and near misses."""
    kind = draw(kinds_of(CONV_BN))
    dimensions = 0 if kind == "other-axis" else draw(st.integers(0, 3))
    with seeded(draw):
        if kind == "symbolic-channels":
            return CONV_BN[kind].of(kind, _Free(), *_free_inputs(draw))
        producer, x = _producer(draw, dimensions, kind == "other-axis")
        channels = producer.out_channels if dimensions else producer.out_features
        norm = norm_after(draw, 2 + dimensions, channels)
        if kind == "no-statistics":
            norm = type(norm)(channels, track_running_stats=False)
        bent = _Overwritten if kind == "overwritten" else _ConvBn
        read = second_reader(draw, 2 + dimensions) if kind == "extra-user" else torch.sin
        model = randomised(bent(producer, norm, kind, read))
        norm.train(kind == "training-mode")
        x = in_kind(kind, model, x)
        if kind == "cast":
            x = in_kind("float32", producer, x.detach())
        if kind == "spatial-broadcast":
            # Along the last axis, or along the batch: also where that has as many entries as channels.
            last = producer(torch.zeros_like(x)).shape
            model.register_buffer("factor", torch.randn((last[0], 1) if len(last) == 2 else last[-1:]).to(x))
    return CONV_BN[kind].of(kind, model, x)


def _producer(draw: st.DrawFn, dimensions: int, other_axis: bool) -> tuple[Any, torch.Tensor]:
    if dimensions:
        layer: Any = convolution(draw, dimensions, transposed=draw(st.booleans()))
        return layer, image_for(draw, layer, dimensions)
    inputs, outputs = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    layer = nn.Linear(inputs, outputs, bias=draw(st.booleans()))
    # On [N, C, T] the batch norm's axis is not the linear layer's, even where the sizes are the same.
    shape = (2, outputs, inputs) if other_axis else (draw(st.integers(2, 4)), inputs)
    return layer, torch.randn(shape, dtype=torch.float64)


def _free_inputs(draw: st.DrawFn) -> Sequence[torch.Tensor]:
    inputs, outputs = 2 * draw(st.integers(2, 4)), 2 * draw(st.integers(5, 7))
    shapes = ((3, inputs, 5, 7), (inputs, outputs // 2, 3, 3), (outputs,), (outputs,), (outputs,), (outputs,))
    made = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    made[3] = made[3].abs() + 0.5
    for tensor in (*made[:2], *made[4:]):
        tensor.requires_grad_()
    return made
