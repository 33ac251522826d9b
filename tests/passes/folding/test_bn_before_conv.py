"""A batch norm before a layer is folded into it where the layer sees no border."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Spelled, at_some_levels, check_rule, image, randomised
from torch import nn

import fxpasses
from fxpasses.testing import Specimen, check_specimen

RULE = "bn_before_conv"


class Layers(Spelled):
    """Batch norms of four channels, layers that read four channels."""

    def __init__(self, spell: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__(spell)
        self.bn, self.bn1d = nn.BatchNorm2d(4), nn.BatchNorm1d(4)
        self.bare = nn.BatchNorm2d(4, affine=False)
        self.three, self.padded = nn.Conv2d(4, 6, 3, 2), nn.Conv2d(4, 6, 3, padding=1)
        self.one, self.same = nn.Conv2d(4, 5, 1, bias=False), nn.Conv2d(4, 5, 1, padding="same")
        self.grouped, self.depthwise = nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(4, 4, 3, groups=4)
        self.up, self.linear = nn.ConvTranspose2d(4, 4, 1), nn.Linear(4, 3)


def spelled(spell: Callable[[Any, torch.Tensor], Any], dtype: torch.dtype = torch.float64) -> nn.Module:
    return randomised(Layers(spell), dtype)


X = (2, 4, 6, 4)

CASES: dict[str, tuple[Callable[[Any, torch.Tensor], Any], int | str]] = {
    "convolution": (lambda m, x: m.three(m.bn(x)), 1),
    "without a bias": (lambda m, x: m.one(m.bn(x)), 1),
    "without gamma and beta": (lambda m, x: m.three(m.bare(x)), 1),
    "padding same of one element": (lambda m, x: m.same(m.bn(x)), 1),
    "groups": (lambda m, x: m.grouped(m.bn(x)), 1),
    "depthwise": (lambda m, x: m.depthwise(m.bn(x)), 1),
    "linear": (lambda m, x: m.linear(m.bn1d(x.mean((2, 3)))), 1),
    "product": (lambda m, x: m.bn1d(x.mean((2, 3))) @ m.linear.weight.t(), 1),
    "product and bias": (lambda m, x: m.bn1d(x.mean((2, 3))) @ m.linear.weight.t() + m.linear.bias, 1),
    "padded": (lambda m, x: m.padded(m.bn(x)), "border"),
    "transposed": (lambda m, x: m.up(m.bn(x)), "border"),
    "another axis": (lambda m, x: m.linear(m.bn(x)), "channel-axis"),
    "two readers": (lambda m, x: m.three(y := m.bn(x)) * y.mean(), "multiple-users"),
    "in training mode": (
        lambda m, x: m.three(F.batch_norm(x, None, None, m.bn.weight, m.bn.bias, True)),
        0,
    ),
    "an activation in between": (lambda m, x: m.three(torch.relu(m.bn(x))), 0),
}


@pytest.mark.parametrize(("capture", "case"), at_some_levels(CASES))
def test_a_batch_norm_before_a_layer(capture: str, case: str) -> None:
    spell, outcome = CASES[case]
    if capture == "aten" and case == "another axis":
        outcome = 0  # decomposed, the linear layer reads a view of the norm's result
    check_rule(capture, spelled(spell), (image(*X),), outcome, rule=RULE)


@pytest.mark.parametrize(("groups", "count", "code"), [(1, 1, None), (2, 0, "symbolic-channels")])
def test_a_kernel_of_symbolic_size_has_no_border_without_padding(
    groups: int, count: int, code: str | None
) -> None:
    class Free(nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor, *statistics: torch.Tensor) -> torch.Tensor:
            return F.conv2d(F.batch_norm(x, *statistics), weight, groups=groups)

    given = (image(*X), image(6, 4 // groups, 3, 2), torch.randn(4).double(), torch.rand(4).double() + 0.5)
    check_specimen(RULE, Specimen("free", Free(), given, count, code), "torch", dynamic=True)


def test_what_is_written_to_in_between() -> None:
    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        z = x * 1
        y = m.bn(z)
        z.add_(1)
        return m.three(y)

    check_rule("compile", spelled(wire), (image(*X),), "mutation", rule=RULE, grads=False)


def test_another_grad_mode() -> None:
    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = m.bn(x)
        return m.three(y)

    check_rule("compile", spelled(wire), (image(*X),), "grad-mode", rule=RULE)


def test_autocast_changes_the_dtype_in_between_and_is_left_alone_where_the_norm_does() -> None:
    model = spelled(lambda m, x: m.three(m.bn(x)), torch.float32)
    compiled = torch.compile(model, backend="fxpasses", options={"inner": "eager", "profit": "always"})
    x = torch.randn(*X)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(x), model(x)
    assert fxpasses.last_report().applied == {RULE: 1}
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


def code(model: nn.Module, x: torch.Tensor, **options: Any) -> str:
    fxpasses.reset()
    torch.compiler.reset()
    torch.compile(model, backend="fxpasses", options=options)(x)
    (remark,) = [each for each in fxpasses.last_report().remarks if each.rule == RULE]
    return remark.code


def test_it_pays_where_the_batch_norm_is_a_kernel_of_its_own() -> None:
    model = spelled(lambda m, x: m.three(m.bn(x)))
    large, small = image(4, 4, 64, 64, grad=False), image(*X, grad=False)
    fusing = lambda gm, inputs: gm.forward  # noqa: E731
    assert code(model, large, inner="eager") == "applied"
    assert code(model, small, inner="eager") == "nothing-saved"
    assert code(model, large, inner=fusing) == "nothing-saved"
    with torch.no_grad():
        assert code(model, large, inner=fusing) == "live-weights"
        assert code(model, large, inner=fusing, weights="cached") == "applied"
    model.three.requires_grad_(False)
    assert code(model, large, inner="eager") == "adds-weight-gradient"
