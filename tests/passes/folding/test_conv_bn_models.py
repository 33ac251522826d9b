"""Real architectures: every legal pair is rewritten, and the numbers stay eager's.

The expected counts are counted on the model itself, by hand for those that the issue names: the number of
batch norms whose input is a convolution's result, less those that a concatenation, an addition or another
reader stands before.
"""

from __future__ import annotations

import copy

import pytest
import torch

import fxpasses
from fxpasses.cli.model_specs import load_model
from fxpasses.testing import assert_close_to_eager

RULE = "efficient_conv_bn_eval"

COUNTS = {
    "resnet18": 20,
    "resnet50": 53,
    "mobilenetv2_100": 52,
    "efficientnet_b0": 49,
    "regnety_008": 47,
    "densenet121": 59,
    "repvgg_a0": 44,
    "convmixer_768_32": 0,
}
"""Pairs that are legal. densenet121 has 121 batch norms, of which 62 follow a concatenation; repvgg_a0 has
61, of which 17 read the block's input themselves (its identity branches); convmixer_768_32 puts an
activation between each convolution and its batch norm, so none of its 65 is a pair."""


def build(name: str) -> torch.nn.Module:
    """The architecture in eval mode, with statistics and affine parameters that matter."""
    torch.manual_seed(0)
    model = load_model(name, default_source="timm").eval()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return model


def batch_norms(model: torch.nn.Module) -> int:
    return sum(isinstance(each, torch.nn.modules.batchnorm._BatchNorm) for each in model.modules())


@pytest.mark.parametrize(
    "name", [each if each == "resnet18" else pytest.param(each, marks=pytest.mark.full) for each in COUNTS]
)
def test_float64_outputs_and_gradients_equal_eager(name):
    eager = build(name).double()
    ours = copy.deepcopy(eager)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    compiled = torch.compile(ours, backend="fxpasses", options={"inner": "aot_eager"})
    with fxpasses.testing.expect(**{RULE: COUNTS[name]}):
        result = compiled(x)
    reference = eager(x)
    direction = torch.randn_like(reference)
    (result * direction).sum().backward()
    (reference * direction).sum().backward()
    assert_close_to_eager("output", result, reference, reference)
    gradients = [[each.grad for each in model.parameters()] for model in (ours, eager, eager)]
    assert_close_to_eager("gradient", *gradients)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", COUNTS)
def test_lower_precisions_are_as_close_to_the_truth_as_eager(name, dtype):
    exact = build(name).double()
    eager = copy.deepcopy(exact).to(dtype)
    ours = copy.deepcopy(eager)
    # The truth is the model whose parameters have been rounded already.
    exact = copy.deepcopy(eager).double()
    x = torch.randn(2, 3, 64, 64).to(dtype)
    compiled = torch.compile(ours, backend="fxpasses")
    with fxpasses.testing.expect(**{RULE: COUNTS[name]}):
        result = compiled(x)
    assert_close_to_eager("output", result.detach(), eager(x).detach(), exact(x.double()).detach())


@pytest.mark.full
def test_densenet_declines_the_norms_after_a_concatenation_each_with_its_reason():
    model = build("densenet121")
    report = fxpasses.explain(model, torch.randn(1, 3, 64, 64))
    declined = [each for each in report.remarks if each.status == "declined"]
    assert len(declined) == batch_norms(model) - COUNTS["densenet121"]
    assert {each.code for each in declined} == {"no-producer"}
    assert all("cat" in each.message and each.location and each.module for each in declined)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_explain_says_what_would_fire_and_leaves_the_model_alone(name):
    model = build(name).train()
    before = copy.deepcopy(model.state_dict())
    report = fxpasses.explain(model.eval(), torch.randn(1, 3, 64, 64))
    assert report.applied == {RULE: COUNTS[name]}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert fxpasses.last_report() is None
