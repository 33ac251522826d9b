"""Whatever takes a gradient, no more bytes are kept for the backward pass than without us, and we say why.

{everything, all but the convolutions, all but the norms, the norms, the input, nothing} x models.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxpasses
from benchmarks.models.saved_tensors import saved_bytes
from fxpasses.cli.model_specs import load_model

NORM = nn.modules.batchnorm._BatchNorm

EXPECTED = {
    "all": "applied",
    "conv frozen": "adds-weight-gradient",
    "BN affine frozen": "nothing-saved",
    "BN only": "adds-weight-gradient",
    "input only": "nothing-saved",
    "none": "live-weights",
}
"""What becomes of a pair of convolution and batch norm behind inductor."""


def choose(model: nn.Module, what: str) -> None:
    """Lets a part of the model train."""

    def owned(kinds: type | tuple[type, ...]) -> set[int]:
        return {id(p) for each in model.modules() if isinstance(each, kinds) for p in each.parameters()}

    norms, convolutions = owned(NORM), owned(nn.Conv2d)
    trains: dict[str, Callable[[nn.Parameter], bool]] = {
        "all": lambda p: True,
        "conv frozen": lambda p: id(p) not in convolutions,
        "BN affine frozen": lambda p: id(p) not in norms,
        "BN only": lambda p: id(p) in norms,
    }
    for parameter in model.parameters():
        parameter.requires_grad_(trains.get(what, lambda p: False)(parameter))


def kept(model: nn.Module, x: torch.Tensor, *, ours: bool) -> int:
    torch.compiler.reset()
    compiled = torch.compile(model, backend="fxpasses") if ours else torch.compile(model)
    return saved_bytes([compiled(x)], [*model.parameters(), *model.buffers(), x])


def check(model: nn.Module, what: str, rules: dict[str, str]) -> None:
    choose(model, what)
    x = torch.randn(2, 3, 64, 64, requires_grad=what == "input only")
    stock = kept(copy.deepcopy(model), x, ours=False)
    fxpasses.reset()
    ours = kept(model, x, ours=True)
    report = fxpasses.last_report()
    assert report is not None
    assert ours <= stock
    if what == "all":
        assert ours < stock
    for rule, code in rules.items():
        remarks = [each for each in report.remarks if each.rule == rule and each.code != "no-producer"]
        assert remarks
        assert Counter(each.code for each in remarks).keys() == {code}
        # A decision about profit gives its figures.
        assert all(any(c.isdigit() for c in each.message) for each in remarks if each.status == "declined")


def small() -> nn.Module:
    """Convolutions of three kinds, so that each layout's cost is in it."""
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, groups in ((3, 16, 3, 1), (16, 16, 3, 16), (16, 24, 1, 1)):
        layers += [
            nn.Conv2d(inputs, outputs, kernel, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4)).eval()


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("what", EXPECTED)
def test_a_small_network_keeps_no_more_than_stock_before_code_is_generated(what: str) -> None:
    check(small(), what, {"efficient_conv_bn_eval": EXPECTED[what]})


@pytest.mark.full
@pytest.mark.parametrize("what", EXPECTED)
def test_a_small_network_keeps_no_more_than_stock(what: str) -> None:
    check(small(), what, {"efficient_conv_bn_eval": EXPECTED[what]})


@pytest.mark.full
@pytest.mark.parametrize("what", EXPECTED)
@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "mobilenetv2_100", "regnety_008", "efficientnet_b0"]
)
def test_real_models_keep_no_more_than_stock(name: str, what: str) -> None:
    check(load_model(f"timm:{name}").eval(), what, {"efficient_conv_bn_eval": EXPECTED[what]})
