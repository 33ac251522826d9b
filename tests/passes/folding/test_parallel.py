"""Parallel convolutions of one input are one convolution; what only looks like it is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Spelled, at_some_levels, check_rule, image, randomised
from torch import nn

import fxpasses
from fxpasses.cli.model_specs import declare_torchvision_operators, load_model
from fxpasses.testing import assert_close_to_eager

MERGE = "parallel_conv_merge"


class Layers(Spelled):
    """Layers of four channels."""

    def __init__(self, spell: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__(spell)
        self.three, self.one = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, bias=False)
        self.five = nn.Conv2d(4, 4, (5, 3), padding=(2, 1), bias=False)
        self.dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.depthwise, self.point = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1, groups=4)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.strided, self.strided1 = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1, 2)
        self.inner = nn.Conv2d(4, 4, 3)
        self.line, self.line1 = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 1)
        self.up, self.up1 = nn.ConvTranspose2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 1)
        self.bn, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.bare = nn.BatchNorm2d(4, affine=False)


def spelled(spell: Callable[[Any, torch.Tensor], Any], dtype: torch.dtype = torch.float64) -> nn.Module:
    return randomised(Layers(spell), dtype)


X = (2, 4, 6, 6)


def in_place(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    y += z
    return y


MERGED: dict[str, tuple[Callable[[Any, torch.Tensor], Any], int]] = {
    "three and one": (lambda m, x: m.three(x) + m.one(x), 1),
    "one and three": (lambda m, x: m.one(x) + m.three(x), 1),
    "three and five": (lambda m, x: m.three(x) + m.five(x), 1),
    "two of a kind": (lambda m, x: m.three(x) + F.conv2d(x, m.three.weight * 2, padding=1), 1),
    "padding same": (lambda m, x: F.conv2d(x, m.three.weight, padding="same") + m.one(x), 1),
    "dilated and one": (lambda m, x: m.dilated(x) + m.one(x), 1),
    "dilated twice": (lambda m, x: m.dilated(x) + F.conv2d(x, m.one.weight, padding=0), 1),
    "inner and one": (lambda m, x: m.inner(x) + m.one(x[..., 1:-1, 1:-1]), 0),
    "strided": (lambda m, x: m.strided(x) + m.strided1(x), 1),
    "depthwise": (lambda m, x: m.depthwise(x) + m.point(x), 1),
    "one dimension": (lambda m, x: m.line(x[:, :, 0]) + m.line1(x[:, :, 0]), 0),
    "one dimension of one tensor": (lambda m, x: (m.line(y := x[:, :, 0])) + m.line1(y), 1),
    "batch norm of the input": (lambda m, x: m.three(x) + m.bn(x), 1),
    "batch norm without parameters": (lambda m, x: m.bare(x) + m.five(x), 1),
    "batch norm, depthwise": (lambda m, x: m.depthwise(x) + m.bn(x), 1),
    "batch norm, grouped": (lambda m, x: m.bn(x) + m.grouped(x), 1),
    "the input": (lambda m, x: x + m.three(x), 1),
    "the input, unbatched": (lambda m, x: x[0] + m.three(x[0]), 0),
    "RepVGG": (lambda m, x: in_place(m.bn(m.one(x)) + m.bn2(m.three(x)), m.bare(x)), 2),
    "four": (lambda m, x: m.one(x) + m.three(x) + m.five(x) + x, 3),
    "and a stranger": (lambda m, x: torch.relu(x) + (m.one(x) + m.three(x)), 1),
}


@pytest.mark.parametrize(("capture", "case"), at_some_levels(MERGED))
def test_branches_of_one_input_are_one_convolution(capture: str, case: str) -> None:
    spell, count = MERGED[case]
    check_rule(capture, spelled(spell), (image(*X),), count, rule=MERGE)


LEFT: dict[str, tuple[Callable[[Any, torch.Tensor], Any], str | None]] = {
    "other inputs": (lambda m, x: m.three(x) + m.one(x + 1), None),
    "another reader": (lambda m, x: (y := m.one(x)) + m.three(x) + y.sum(), "multiple-users"),
    "read twice": (lambda m, x: (y := m.one(x)) + y, None),
    "scaled": (lambda m, x: torch.add(m.one(x), m.three(x), alpha=2), None),
    "other strides": (lambda m, x: m.strided(x)[:, :4] + m.one(x)[..., ::2, ::2], None),
    "strided unalike": (
        lambda m, x: m.strided(x) + F.conv2d(x, m.strided1.weight[:, :, :, :].repeat(1, 1, 4, 4)),
        "geometry",
    ),
    "other places": (
        lambda m, x: m.inner(x) + F.conv2d(x, m.one.weight, padding=0, stride=1)[..., 2:, 2:],
        None,
    ),
    "a smaller kernel that reads further out": (
        lambda m, x: m.three(x) + F.conv2d(x, m.one.weight.repeat(1, 1, 1, 1), padding=1)[..., :6, :6],
        None,
    ),
    "other groups": (lambda m, x: m.three(x) + m.grouped(x), "geometry"),
    "broadcast": (
        lambda m, x: m.three(x) + F.conv2d(x, m.one.weight.repeat(1, 1, 6, 6)),
        "geometry",
    ),
    "more channels than before": (lambda m, x: F.conv2d(x[:, :1], m.one.weight[:, :1]) + x[:, :1], None),
    "transposed": (lambda m, x: m.up(x) + m.up1(x), None),
    "batch norm that trains": (
        lambda m, x: m.three(x) + F.batch_norm(x, None, None, m.bn.weight, m.bn.bias, True),
        None,
    ),
    "dilated unalike": (lambda m, x: m.dilated(x) + m.three(x), "geometry"),
}


@pytest.mark.parametrize("capture", ["compile", "export", "symbolic_trace"])
@pytest.mark.parametrize("case", LEFT)
def test_what_only_looks_like_branches_is_left_alone(capture: str, case: str) -> None:
    spell, code = LEFT[case]
    report = check_rule(capture, spelled(spell), (image(*X),), 0 if code is None else code, rule=MERGE)
    if code is None:
        assert not [each for each in report.remarks if each.rule == MERGE], report.remarks


def test_a_sum_in_place_into_the_input_is_left_alone() -> None:
    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y += m.three(y)
        return y

    check_rule("compile", spelled(wire), (image(*X),), "mutation", rule=MERGE, grads=False)


def test_a_weight_that_is_written_to_in_between_is_left_alone() -> None:
    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        w = m.three.weight * 1
        y = F.conv2d(x, w, padding=1)
        w.mul_(2)
        return y + m.one(x)

    check_rule("compile", spelled(wire), (image(*X),), "mutation", rule=MERGE, grads=False)


def test_another_grad_mode_is_left_alone() -> None:
    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = m.one(x)
        return y + m.three(x)

    check_rule("compile", spelled(wire), (image(*X),), "grad-mode", rule=MERGE)


def test_autocast_branches_are_merged_with_eagers_dtype() -> None:
    model = spelled(lambda m, x: m.three(x) + m.one(x), torch.float32)
    compiled = torch.compile(model, backend="fxpasses", options={"inner": "eager", "profit": "always"})
    x = torch.randn(*X)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(x), model(x)
    assert fxpasses.last_report().applied == {MERGE: 1}
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_dynamic_sizes_are_merged_without_a_guard() -> None:
    model = spelled(lambda m, x: m.three(x) + m.bn(x) + m.one(x))
    compiled = torch.compile(
        model, backend="fxpasses", dynamic=True, options={"inner": "eager", "profit": "always"}
    )
    for size in (6, 7, 9):
        x = image(size + 3, 4, size, size + 2, grad=False)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)
    assert [each.applied for each in fxpasses.reports()] == [{MERGE: 2}]


# Profit


def reasons(model: nn.Module, x: torch.Tensor, **options: Any) -> list[str]:
    fxpasses.reset()
    torch.compiler.reset()
    chosen = {"inner": lambda gm, inputs: gm.forward, **options}
    torch.compile(model, backend="fxpasses", options=chosen)(x)
    return [each.code for each in fxpasses.last_report().remarks if each.rule == MERGE]


def test_merging_pays_where_results_are_larger_than_weights() -> None:
    def branches() -> nn.Module:
        return spelled(lambda m, x: m.three(x) + m.one(x))

    assert reasons(branches(), image(8, 4, 12, 12, grad=False)) == ["applied"]
    assert reasons(branches(), image(1, 4, 2, 2, grad=False)) == ["small-result"]
    only_small = branches()
    only_small.three.requires_grad_(False)  # type: ignore[union-attr]
    assert reasons(only_small, image(8, 4, 12, 12, grad=False)) == ["adds-weight-gradient"]


# RepVGG


def check_repvgg(model: nn.Module, size: int, blocks: int, identities: int) -> None:
    """Three branches a block, two without an identity: one convolution each, with eager's gradients."""
    eager = randomised(model)
    ours = copy.deepcopy(eager)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    seen: list[int] = []

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(sum(node.target in (torch.conv2d, F.conv2d) for node in gm.graph.nodes))
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, inputs)

    compiled = torch.compile(ours, backend="fxpasses", options={"inner": inner, "profit": "always"})
    with fxpasses.testing.expect(efficient_conv_bn_eval=2 * blocks, parallel_conv_merge=blocks + identities):
        found = compiled(x)
    assert seen == [blocks]
    expected = eager(x)
    direction = torch.randn_like(expected)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    assert_close_to_eager("output", found.detach(), expected.detach(), expected.detach())
    gradients = [[each.grad for each in model.parameters()] for model in (ours, eager, eager)]
    assert_close_to_eager("gradient", *gradients)


def test_the_branches_of_a_small_repvgg_become_one_convolution_a_block() -> None:
    declare_torchvision_operators()
    from timm.models.byobnet import RepVggBlock

    model = nn.Sequential(RepVggBlock(3, 6, stride=2), RepVggBlock(6, 6), RepVggBlock(6, 6))
    check_repvgg(model, 12, blocks=3, identities=2)


@pytest.mark.full
def test_the_branches_of_repvgg_a0_become_one_convolution_a_block() -> None:
    """It has 22 blocks, of which 17 keep shape and have an identity."""
    check_repvgg(load_model("timm:repvgg_a0"), 64, blocks=22, identities=17)
