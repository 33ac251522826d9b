"""Layers as eager computes them: which there are, what kind each is, and how much work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.layers.layer import Layer, layers_of


class Net(nn.Module):
    """Two readers of one tensor, a weight that is used twice, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 7, stride=2, padding=3)
        self.left = nn.Conv2d(8, 4, 1)
        self.right = nn.Conv2d(8, 6, 1)
        self.again = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(6, 2, 2, stride=2)
        self.head = nn.Linear(2, 5, bias=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        image = self.first(image)
        left, right = self.left(image), self.right(image)
        return self.head(self.up(right).mean((2, 3))) + self.again(self.again(left)).mean()


@pytest.fixture(scope="module")
def layers():
    return layers_of(Net().eval(), (torch.randn(2, 3, 16, 16),))


def test_every_layer_has_the_name_of_its_weight_in_order_of_execution(layers):
    names = ["first", "left", "right", "up", "head", "again"]
    assert [layer.name for layer in layers] == [*(f"{name}.weight" for name in names), "again.weight#2"]


def test_layers_that_read_the_same_tensor_say_so(layers):
    sources = {layer.name: layer.source for layer in layers}
    assert sources["left.weight"] == sources["right.weight"]
    assert len({layer.source for layer in layers}) == len(layers) - 1


def test_operations_are_two_for_each_product_of_a_filter_and_a_pixel(layers):
    flops = {layer.name: layer.flops for layer in layers}
    assert flops["first.weight"] == 2 * (2 * 8 * 8 * 8) * (3 * 7 * 7)
    assert flops["left.weight"] == 2 * (2 * 4 * 8 * 8) * 8
    assert flops["again.weight"] == 2 * (2 * 4 * 8 * 8) * 9
    assert flops["up.weight"] == 2 * (2 * 6 * 8 * 8) * (2 * 2 * 2)
    assert flops["head.weight"] == 2 * (2 * 5) * 2


def test_bytes_are_those_of_image_weight_and_result_once(layers):
    num_bytes = {layer.name: layer.num_bytes for layer in layers}
    assert num_bytes["first.weight"] == 4 * (2 * 3 * 16 * 16 + 8 * 3 * 7 * 7 + 2 * 8 * 8 * 8)
    assert num_bytes["again.weight"] == 4 * (2 * 2 * 4 * 8 * 8 + 4 * 9)
    assert num_bytes["head.weight"] == 4 * (2 * 2 + 5 * 2 + 2 * 5)


def convolution(channels, filters, taps, size=8, stride=1, groups=1):
    padding, dilation = (taps // 2,) * 2, (1, 1)
    result = (1, filters, size // stride, size // stride)
    weight = (filters, channels // groups, taps, taps)
    spaces = ((stride,) * 2, padding, dilation)
    return Layer("", (1, channels, size, size), weight, result, *spaces, groups)


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (convolution(64, 64, 1), "1x1"),
        (convolution(64, 64, 1, stride=2), "strided"),
        (convolution(64, 64, 1, size=1), "linear"),
        (convolution(64, 64, 3), "3x3"),
        (convolution(64, 64, 3, stride=2), "strided"),
        (convolution(64, 64, 3, groups=64), "depthwise"),
        (convolution(64, 64, 3, stride=2, groups=64), "depthwise"),
        (convolution(64, 64, 3, groups=4), "grouped"),
        (convolution(64, 64, 5), "other convolution"),
        (convolution(64, 64, 7), "first or 7x7"),
        (convolution(3, 64, 3, stride=2), "first or 7x7"),
        (Layer("", (8, 64), (10, 64), (8, 10)), "linear"),
    ],
)
def test_the_kind_of_a_layer(layer, kind):
    assert layer.kind == kind


def test_sizes_in_words_tell_apart_what_does_other_work():
    wide = convolution(64, 64, 3)
    assert wide.sizes == "3x3 64→64 on 8x8, batch 1"
    assert convolution(64, 64, 3, stride=2).sizes == "3x3 64→64 on 8x8, stride 2, batch 1"
    assert convolution(64, 64, 3, groups=64).sizes == "3x3 64→64 on 8x8, depthwise, batch 1"
    assert Layer("", (8, 64), (10, 64), (8, 10)).sizes == "linear 64→10, 8 rows"
