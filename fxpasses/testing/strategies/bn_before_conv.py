"""Models around bn_before_conv: a batch norm before a convolution or linear layer, and near misses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from fxpasses.testing.specimens import Specimen
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
from fxpasses.testing.strategies.readers import Reader, second_reader

Tensor = torch.Tensor

BN_BEFORE_CONV: dict[str, Expectation] = {
    **RIGHT_AS_THEY_ARE,
    "frozen": FIRES,
    "shared-input": FIRES,
    "padded": Expectation(code="border"),
    "transposed": Expectation(code="border"),
    "extra-user": Expectation(code="multiple-users"),
    "two-layers": Expectation(code="multiple-users"),
    "training-mode": Expectation(grads=False),
    "no-statistics": Expectation(),
    "activation": Expectation(),
    # Core ATen has a view before the linear layer.
    "channel-axis": Expectation(code=except_at("aten", "channel-axis")),
    "written": Expectation(except_at("aten", 0, 1), except_at("aten", "mutation"), grads=False),
    # What `torch.fx.symbolic_trace` records has no sizes, so they are those of the inputs.
    "symbolic-channels": Expectation(
        except_at("symbolic_trace", 0, 1), except_at("symbolic_trace", "symbolic-channels"), dynamic=True
    ),
}
"""The kinds of models, and what bn_before_conv must do with them at each level."""


class _BnConv(nn.Module):
    """A batch norm and the layer after it, bent in one way or not at all."""

    def __init__(self, norm: nn.Module, layer: nn.Module, kind: str, read: Reader) -> None:
        super().__init__()
        self.norm, self.layer, self.kind, self.read = norm, layer, kind, read

    def forward(self, x: Tensor) -> Any:
        # A new tensor, so that writing to it is nobody else's business.
        x = torch.tanh(x)
        normalised = self.norm(x)
        if self.kind == "written":
            x.add_(0.5)
        elif self.kind == "activation":
            normalised = F.softplus(normalised)
        result = F.softplus(self.layer(normalised))
        if self.kind == "two-layers":
            return result, self.layer(normalised)
        if self.kind == "shared-input":
            return result, x.sin()
        return (result, self.read(normalised)) if self.kind == "extra-user" else result


class _Free(nn.Module):
    """A grouped convolution whose weight is an input, so that its channels may be symbols."""

    def forward(self, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        normalised = F.batch_norm(torch.tanh(x), mean, var)
        return F.softplus(F.conv2d(normalised, weight, groups=2))


@st.composite
def bn_before_conv(draw: st.DrawFn) -> Specimen:
    """Batch norms before convolutions and linear layers of every kind, and near misses."""
    kind = draw(kinds_of(BN_BEFORE_CONV))
    with seeded(draw):
        if kind == "symbolic-channels":
            return BN_BEFORE_CONV[kind].of(kind, _Free(), *_free_inputs(draw))
        layer, x = _layer(draw, kind)
        norm = norm_after(draw, x.dim(), x.shape[1])
        if kind == "no-statistics":
            norm = type(norm)(norm.num_features, track_running_stats=False)
        read = second_reader(draw, x.dim()) if kind == "extra-user" else torch.sin
        model = randomised(_BnConv(norm, layer, kind, read))
        norm.train(kind == "training-mode")
        norm.requires_grad_(kind != "frozen")
        x = in_kind(kind, model, x)
    return BN_BEFORE_CONV[kind].of(kind, model, x)


def _layer(draw: st.DrawFn, kind: str) -> tuple[Any, Tensor]:
    needs_window = kind in ("padded", "transposed")
    dimensions = 0 if kind == "channel-axis" else draw(st.integers(int(needs_window), 3))
    layer: Any
    if not dimensions:
        inputs, sizes = draw(st.integers(1, 5)), st.integers(2, 4)
        layer = nn.Linear(inputs, draw(st.integers(1, 5)), bias=draw(st.booleans()))
        # On [N, C, T] the batch norm's axis is not the one that is summed over, even where both are as long.
        shape = (2, draw(sizes), inputs) if kind == "channel-axis" else (draw(sizes), inputs)
        return layer, torch.randn(shape, dtype=torch.float64)
    if kind == "padded":
        layer = convolution(draw, dimensions, padding=1)
    else:
        transposed = kind == "transposed"
        more = {"padding": "valid"} if not transposed and draw(st.booleans()) else {}
        layer = convolution(draw, dimensions, transposed=transposed, padded=False, **more)
    return layer, image_for(draw, layer, dimensions)


def _free_inputs(draw: st.DrawFn) -> list[Tensor]:
    channels, outputs = 2 * draw(st.integers(2, 4)), 2 * draw(st.integers(5, 7))
    x, weight = torch.randn(3, channels, 5, 7).double(), torch.randn(outputs, channels // 2, 3, 3).double()
    mean, var = torch.randn(channels).double(), torch.rand(channels).double() + 0.5
    return [x.requires_grad_(), weight.requires_grad_(), mean, var]
