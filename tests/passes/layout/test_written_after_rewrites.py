"""What a rewrite has put into a graph is written to, and looked at through views, as what it replaced was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import CAPTURES, callable_of
from torch import Tensor, nn

import fxpasses


def _view_then_write(y: Tensor) -> tuple[Tensor, Tensor]:
    view = y[:, ::2]
    y.relu_()
    return view + 1, y


def _write_through_a_view(y: Tensor) -> tuple[Tensor, Tensor]:
    y[:, ::2].relu_()
    return y.sigmoid(), y


def _read_write_read(y: Tensor) -> tuple[Tensor, Tensor]:
    before = y * 2
    y.add_(1)
    return before, y.transpose(2, 3) * 3


USES = [_view_then_write, _write_through_a_view, _read_write_read]


class Folded(nn.Module):
    """A convolution and a norm, whose result is written to, and a convolution of that."""

    def __init__(self, use: Callable[[Tensor], tuple[Tensor, Tensor]], *, affine: bool) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.use, self.affine = use, affine
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.first(x)
        y = y * self.norm.weight.view(1, -1, 1, 1) if self.affine else self.norm(y)
        found, y = self.use(y)
        return self.last(y), found, y


@pytest.mark.parametrize(
    "layout", ["channels_last", *(pytest.param(one, marks=pytest.mark.full) for one in ("contiguous", "off"))]
)
@pytest.mark.parametrize("affine", [False, True], ids=["norm", "affine"])
@pytest.mark.parametrize("use", USES, ids=[use.__name__.strip("_") for use in USES])
@pytest.mark.parametrize("level", CAPTURES)
def test_writes_after_a_rewrite_are_seen_by_the_next_passes(level, use, affine, layout):
    torch.manual_seed(0)
    model, x = Folded(use, affine=affine).eval().double(), torch.randn(2, 3, 9, 9).double()
    with torch.no_grad():
        expected = model(x)
        program = CAPTURES[level](model, (x,))
        options = {"layout": layout, "profit": "always"}
        result = fxpasses.optimize(program, (x,), options=options)
        found = tuple(callable_of(result)(x))
    if not affine:
        assert result.report.applied["efficient_conv_bn_eval"] == 1
    if layout == "channels_last" and level != "symbolic_trace":
        assert result.report.applied["layout"] == 1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert [one.stride() for one in found] == [one.stride() for one in expected]
