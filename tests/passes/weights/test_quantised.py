"""Quantised graphs keep their weights live and their norms unfolded, and say why."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn

import fxpasses


class FakeQuantised(nn.Module):
    """A convolution and a norm as quantisation-aware training writes them; `where` is what is quantised."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("scale", torch.full((4,), 0.01))
        self.register_buffer("zero", torch.zeros(4, dtype=torch.int32))

    def forward(self, x):
        weight = self.conv.weight
        if self.where == "weight":
            weight = torch.fake_quantize_per_channel_affine(weight, self.scale, self.zero, 0, -128, 127)
        elif self.where == "image":
            x = torch.fake_quantize_per_tensor_affine(x, 0.02, 0, -128, 127)
        return self.norm(nn.functional.conv2d(x, weight, self.conv.bias))


class Integers(nn.Module):
    """A weight of int8 that is read through its scale."""

    def __init__(self) -> None:
        super().__init__()
        importlib.import_module("torch.ao.quantization.fx")  # which registers the operators
        self.register_buffer("weight", torch.randint(-100, 100, (4, 3, 3, 3), dtype=torch.int8))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        weight = torch.ops.quantized_decomposed.dequantize_per_tensor(
            self.weight, 0.01, 0, -128, 127, torch.int8
        )
        return self.norm(nn.functional.conv2d(x, weight))


MODELS = {
    "fake, weight": lambda: FakeQuantised("weight"),
    "fake, image": lambda: FakeQuantised("image"),
    "int8": Integers,
}


@pytest.mark.parametrize("kind", MODELS)
def test_cached_weights_leave_a_quantised_graph_alone(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    run = torch.compile(model, backend="fxpasses", options={"weights": "cached", "profit": "always"})
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        torch.testing.assert_close(run(x), expected)
    report = fxpasses.last_report()
    assert report.kept_tensors == 0
    assert not report.applied
    assert "quantised" in {remark.code for remark in report.remarks if remark.rule == "kept_weights"}


@pytest.mark.parametrize("where", ["weight", "image"])
def test_norms_behind_quantised_values_are_not_folded(where):
    model = FakeQuantised(where).eval()
    x = torch.randn(2, 3, 8, 8)
    report = fxpasses.explain(model, x, options={"profit": "always"})
    (remark,) = [one for one in report.remarks if one.rule == "efficient_conv_bn_eval"]
    assert (remark.status, remark.code) == ("declined", "quantised")


def test_a_graph_with_quantiles_is_not_quantised():
    class Quantiles(FakeQuantised):
        def forward(self, x):
            return super().forward(x) - torch.quantile(x, 0.5)

    model = Quantiles("nothing").eval()
    run = torch.compile(model, backend="fxpasses", options={"weights": "cached"})
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))
    assert fxpasses.last_report().applied["efficient_conv_bn_eval"] == 1
    assert fxpasses.last_report().kept_tensors > 0
