"""Results without a label, or of which none is asked: their strides are known where kernels look at them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import CAPTURES
from torch import nn

from fxpasses.testing.captures import rewrite_at
from tests.passes.layout.test_graphs import labelled_at_random

X = (2, 4, 6, 6)

SHAPED_BY_ONES = {
    "one channel": (lambda y: F.pad(F.pixel_shuffle(y[:, :4], 2), (1, 0, 0, 2)), nn.Conv2d(1, 4, 1)),
    "one pixel": (lambda y: F.interpolate(F.adaptive_max_pool2d(y, 1).sigmoid(), size=(4, 4)), nn.Identity()),
    "one pixel, padded": (lambda y: F.adaptive_max_pool2d(y, 1), nn.Conv2d(8, 4, 1, padding=1)),
    "one channel, repeated": (lambda y: y.amax(1, keepdim=True).relu().repeat(1, 3, 1, 1), nn.Identity()),
}
"""What makes an image of one channel or of one pixel, and the kernels that choose a layout by its strides."""


@pytest.mark.parametrize("level", ["torch", "pre_dispatch", "aten"])
@pytest.mark.parametrize("name", SHAPED_BY_ONES)
def test_kernels_that_choose_a_layout_by_dimensions_of_size_1_choose_as_in_eager(name, level):
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(4, 8, 1), last

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(between(self.first(x)))

    between, last = SHAPED_BY_ONES[name]
    model, x = Between().double().eval(), torch.randn(X, dtype=torch.float64)
    options = {"passes": ("layout",), "layout": "channels_last", "profit": "always"}
    with torch.no_grad():
        found = rewrite_at(level, model, (x,), options)
        ours, theirs = found.call(x), model(x)
    assert found.report.layout.decision == "applied"
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert ours.stride() == theirs.stride()


FOLLOWERS = {
    "pixel_shuffle": lambda y: F.pixel_shuffle(y, 2).mul(2),
    "roll": lambda y: y.roll(1, 2),
    "topk": lambda y: y.topk(3, 1)[0].sin(),
}
"""Operators that no label is asked of, and whose results lie as what they read."""


@pytest.mark.parametrize("name", FOLLOWERS)
def test_what_follows_its_operand_is_known_to_have_moved_with_it(name):
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(4, 8, 1), nn.LazyConv2d(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(FOLLOWERS[name](self.first(x)))

    model, x = Between().double().eval(), torch.randn(X, dtype=torch.float64)
    with torch.no_grad():
        model(x)
        model, x = (given.to(memory_format=torch.channels_last) for given in (model, x))
        program, expected = CAPTURES["pre_dispatch"](model, (x,)), model(x)
        for module in labelled_at_random(program, (x,), "eager", 8):
            ours = module(x)
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
            assert ours.stride() == expected.stride()


def test_a_weight_of_one_pixel_in_channels_last_says_so_to_the_kernel_that_reads_it():
    """Of a contiguous image and such a weight eager makes a channels-last result."""
    model = nn.Sequential(nn.Conv2d(4, 8, 1), Turned(), nn.Conv2d(8, 8, 1)).double().eval()
    model, x = model.to(memory_format=torch.channels_last), torch.randn(X, dtype=torch.float64)
    with torch.no_grad():
        program, expected = CAPTURES["pre_dispatch"](model, (x,)), model(x)
        assert expected.stride(1) == 1
        for module in labelled_at_random(program, (x,), "eager", 8):
            ours = module(x)
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
            assert ours.stride() == expected.stride()


class Turned(nn.Module):
    """A mask, whose kernel gives a contiguous result where metadata tell another."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(x > 1, 0.25)
