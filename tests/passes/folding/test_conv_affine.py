"""Per-channel arithmetic after a convolution is folded, and what only looks like it is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import SAMPLED, Spelled, at_some_levels, check_rule, image, randomised
from torch import nn

import fxpasses

RULE = "conv_affine"


def check(capture: str, model: nn.Module, inputs: tuple[Any, ...], outcome: int | str, **how: Any) -> Any:
    """`check_rule` for this rule, unless another one is named."""
    return check_rule(capture, model, inputs, outcome, **{"rule": RULE, **how})


class Layers(Spelled):
    """Layers of four channels, parameters to scale and shift by."""

    def __init__(self, spell: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__(spell)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.plain = nn.Conv2d(3, 4, 3, bias=False)
        self.up = nn.ConvTranspose2d(3, 4, 3, stride=2)
        self.grouped = nn.ConvTranspose2d(4, 4, 3, groups=2)
        self.linear, self.bn, self.bn2 = nn.Linear(3, 4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.bn1d = nn.BatchNorm1d(4)
        self.m, self.t = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.column = nn.Parameter(torch.randn(4, 1, 1))
        self.one = nn.Parameter(torch.randn(1))
        self.register_buffer("scale", torch.rand(1, 4, 1, 1) + 0.5)
        self.register_buffer("variance", torch.rand(4) + 0.5)


class LayersOfTwoInputs(Layers):
    """With a second input."""

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> Any:  # type: ignore[override]
        return self.spell(self, x, other)  # type: ignore[call-arg]


def spelled(spell: Callable[..., Any], dtype: torch.dtype = torch.float64) -> nn.Module:
    takes = spell.__code__.co_argcount
    return randomised((Layers if takes == 2 else LayersOfTwoInputs)(spell), dtype)


def c(vector: torch.Tensor) -> torch.Tensor:
    return vector.view(1, -1, 1, 1)


FOLDED: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "mul then add": lambda m, x: m.conv(x) * c(m.m) + c(m.t),
    "operand first": lambda m, x: c(m.t) + c(m.m) * m.conv(x),
    "column": lambda m, x: m.conv(x) * m.column + m.column,
    "buffer": lambda m, x: m.conv(x) * m.scale,
    "reshape": lambda m, x: m.conv(x).mul(m.m.reshape(1, -1, 1, 1)),
    "index": lambda m, x: m.conv(x) * m.m[None, :, None, None],
    "sub": lambda m, x: torch.sub(m.conv(x), m.column),
    "sub with alpha": lambda m, x: torch.sub(m.conv(x), c(m.t), alpha=3),
    "add with alpha": lambda m, x: torch.add(c(m.t), m.conv(x), alpha=-2),
    "reversed sub": lambda m, x: (c(m.t) - m.conv(x)) * c(m.m),
    "rsub": lambda m, x: torch.rsub(m.conv(x), c(m.t), alpha=2),
    "rsub from a number": lambda m, x: torch.rsub(m.conv(x), 1.5, alpha=2),
    "numbers": lambda m, x: 1 - (2.5 * m.conv(x) + 3) / 4,
    "number without a bias": lambda m, x: m.plain(x) + 1.5,
    "one number as a tensor": lambda m, x: m.plain(x) * m.one + m.one,
    "scalar tensor": lambda m, x: m.plain(x) + m.one.sum(),
    "div by a standard deviation": lambda m, x: (m.conv(x) - c(m.t)) / torch.sqrt(c(m.variance) + 1e-5),
    "div by an absolute value": lambda m, x: m.plain(x) / (m.column.abs() + 0.1),
    "div by a clamp": lambda m, x: m.plain(x).div(m.column.clamp(min=0.1)),
    "no bias": lambda m, x: m.plain(x) * m.column - m.column,
    "transposed": lambda m, x: m.up(x) * m.column + m.column,
    "transposed by groups": lambda m, x: m.grouped(m.conv(x)) * m.column + m.column,
    "transposed by groups, one number": lambda m, x: m.grouped(m.conv(x)) * m.one + m.one,
    "unbatched": lambda m, x: m.conv(x[0]) * m.column,
    "linear": lambda m, x: (
        F.linear(x.mean(1)[..., :3].contiguous(), m.linear.weight, m.linear.bias) * m.m + m.t
    ),
    "product": lambda m, x: (x.mean((1, 2))[:, :3] @ m.linear.weight.t()) * m.m,
    "after a batch norm": lambda m, x: m.bn(m.conv(x)) * c(m.m) + c(m.t),
    "before a batch norm": lambda m, x: m.bn(m.conv(x) * c(m.m) + c(m.t)),
}


DECOMPOSED = {"unbatched", "linear"}
"""Below dispatch these have a view between the product and the chain. (A linear layer on a strided input of
three dimensions becomes a `bmm` there, which has no weight of its own to fold into.)"""


@pytest.mark.parametrize(("capture", "spelling"), at_some_levels(FOLDED))
def test_chains_are_folded_whole(capture: str, spelling: str) -> None:
    rule = "affine_across_views" if capture == "aten" and spelling in DECOMPOSED else RULE
    check(capture, spelled(FOLDED[spelling]), (image(),), 1, rule=rule)


def test_core_aten_s_number_minus_a_multiple_keeps_its_factor() -> None:
    check("aten", spelled(FOLDED["rsub from a number"]), (image(),), 1, rule=RULE)


def test_a_number_plus_a_multiple_keeps_its_factor_though_no_schema_has_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()).double()
    program = torch.export.export(model, (image(),)).run_decompositions()
    graph = program.graph_module.graph
    (tanh,) = graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
    tanh.target, tanh.args, tanh.kwargs = torch.ops.aten.add.Tensor, (1.0, *tanh.args), {"alpha": 2}
    program.graph_module.recompile()
    x = image()
    result = fxpasses.optimize(program, (x,), {"passes": RULE, "profit": "always"})
    assert result.report.applied == {RULE: 1}
    found = result.exported_program.module()(x)
    torch.testing.assert_close(found, 1.0 + 2 * model[0](x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("capture", SAMPLED)
def test_a_batch_norm_after_a_batch_norm_is_the_conv_bn_rules_own(capture: str) -> None:
    model = spelled(lambda m, x: m.bn2(m.bn(m.conv(x))))
    check(capture, model, (image(),), 2, rule="efficient_conv_bn_eval")


LEFT: dict[str, tuple[Callable[[Any, torch.Tensor], Any], str]] = {
    "a row, as wide as there are channels": (lambda m, x: m.plain(x)[..., :4] * m.m, "none"),
    "a row on a convolution": (lambda m, x: m.plain(x) * m.m, "operand-shape"),
    "one number per image": (lambda m, x: m.plain(x) * x.mean((1, 2, 3), keepdim=True), "operand-shape"),
    "a spatial map": (lambda m, x: m.plain(x) + m.plain.weight[0, 0, :1, :1].expand(4, 4), "operand-shape"),
    "two readers": (lambda m, x: (y := m.plain(x)) * m.column + y.sum(), "multiple-users"),
    "two readers in the middle": (lambda m, x: (y := m.plain(x)) * m.column * y.mean(), "multiple-users"),
    "a divisor that may be zero": (lambda m, x: m.plain(x) / m.column, "zero-divisor"),
    "a number that is zero": (lambda m, x: m.plain(x) * 0.0 + m.plain(x) / 0.0, "zero-divisor"),
    "a sum of two convolutions": (lambda m, x: m.plain(x) + m.plain(x + 1), "none"),
    "divided into": (lambda m, x: m.column / m.plain(x), "none"),
    "rounded": (lambda m, x: torch.div(m.plain(x), 2.0, rounding_mode="floor"), "none"),
    "an integer operand": (
        lambda m, x: m.plain(x) * torch.arange(4, device=x.device).view(4, 1, 1),
        "dtype",
    ),
    "times itself": (lambda m, x: (y := m.plain(x)) * y, "none"),
}


@pytest.mark.parametrize("capture", ["compile", "export", "symbolic_trace"])
@pytest.mark.parametrize("case", LEFT)
def test_what_only_looks_like_a_chain_is_left_alone(capture: str, case: str) -> None:
    spell, code = LEFT[case]
    x = image(2, 3, 6, 6)  # results of 4 x 4: as wide as there are channels
    if code == "none":
        report = check(capture, spelled(spell), (x,), 0, grads=True)
        assert not [each for each in report.remarks if each.rule == RULE], report.remarks
    elif case == "a number that is zero":
        options = {"inner": "eager", "profit": "always"}
        compiled = torch.compile(spelled(lambda m, x: m.plain(x) / 0.0), backend="fxpasses", options=options)
        compiled(x)
        assert {each.code for each in fxpasses.last_report().declined} == {code}
    else:
        check(capture, spelled(spell), (x,), code)


def test_a_channel_that_is_divided_by_zero_stays_infinite() -> None:
    model = spelled(lambda m, x: m.plain(x) / m.column)
    with torch.no_grad():
        model.column[1] = 0
    compiled = torch.compile(model, backend="fxpasses", options={"inner": "eager", "profit": "always"})
    x = image()
    assert torch.equal(compiled(x), model(x))
    assert compiled(x)[:, 1].isinf().all()


def test_the_longest_legal_part_of_a_chain_is_folded() -> None:
    model = spelled(lambda m, x: m.plain(x) * m.column / c(m.m))
    report = check("compile", model, (image(),), 1)
    assert "zero-divisor" in {each.code for each in report.declined}


@pytest.mark.parametrize("capture", ["compile", "pre_dispatch", "export"])
def test_an_operand_that_is_written_to_in_between(capture: str) -> None:
    def wire(m: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        y = m.plain(x) * m.column
        z = y + t
        t.add_(1)
        return z * m.column + t

    inputs = (image(grad=False), torch.randn(4, 1, 1, dtype=torch.float64))
    # In two parts: what reads t before the write is folded into the convolution, which then stands there.
    # In export's graph any two inputs may share memory, so nothing is known of the second part.
    check(capture, spelled(wire), inputs, 1 if capture == "export" else 2)

    def early(m: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x, w)
        w.add_(1)
        return y * w.mean((1, 2, 3)).view(-1, 1, 1)

    check(
        capture, spelled(early), (image(grad=False), image(4, 3, 3, 3, grad=False)), "mutation", grads=False
    )


def test_a_change_of_grad_mode_keeps_the_two_apart() -> None:
    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = m.plain(x)
        return y * m.column

    check("compile", spelled(wire), (image(),), "grad-mode")


def test_autocast_gives_the_dtype_that_eager_gives() -> None:
    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.plain(x) * m.column + m.column

    model = spelled(wire, torch.float32)
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="fxpasses", options={"inner": "eager", "profit": "always"})
    with fxpasses.testing.expect(conv_affine=1):
        found = compiled(x)
    expected = model(x)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_a_wider_operand_than_the_convolution_is_left_alone() -> None:
    model = spelled(lambda m, x: m.plain(x) * m.column.double(), torch.float32)
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="fxpasses", options={"inner": "eager", "profit": "always"})
    assert torch.equal(compiled(x), model(x))
    assert {each.code for each in fxpasses.last_report().declined} == {"dtype"}


def test_dynamic_shapes_add_no_guard_and_decline_what_is_ambiguous() -> None:
    model = spelled(lambda m, x, g: m.plain(x) * m.column * g)
    compiled = torch.compile(
        model, backend="fxpasses", dynamic=True, options={"inner": "eager", "profit": "always"}
    )
    x = image(2, 3, 6, 6, grad=False)
    for size in (7, 9, 10):
        x, gate = image(2, 3, size, size, grad=False), image(4, 1, size - 2, grad=False)
        torch.testing.assert_close(compiled(x, gate), model(x, gate), rtol=1e-9, atol=1e-9)
    reports = fxpasses.reports()
    assert [each.applied for each in reports] == [{RULE: 1}]
    assert {each.code for each in reports[0].declined} == {"operand-shape"}


def test_vmap_is_left_alone() -> None:
    model = spelled(lambda m, x: torch.vmap(lambda y: m.plain(y) * m.column)(x[None]))
    x = image(2, 3, 6, 6, grad=False)
    compiled = torch.compile(model, backend="fxpasses", options={"inner": "eager", "profit": "always"})
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)
    assert not fxpasses.last_report().applied


def test_it_is_switched_off_by_name() -> None:
    model = spelled(FOLDED["mul then add"])
    check("compile", model, (image(),), 0, disable=("conv_affine",))


# affine_across_views

ACROSS: dict[str, tuple[Callable[[Any, torch.Tensor], Any], int]] = {
    "linear - transpose - batch norm": (
        lambda m, x: m.bn1d(m.linear(x.mean(1)[..., :3].contiguous()).transpose(1, 2)),
        1,
    ),
    "linear - permute - scale - permute": (
        lambda m, x: (
            (m.linear(x.mean(1)[..., :3].contiguous()).permute(0, 2, 1) * m.column[..., 0]).permute(0, 2, 1)
            + m.t
        ),
        2,
    ),
    "conv - flatten - batch norm": (lambda m, x: m.bn1d(m.conv(x).flatten(2)), 1),
    "conv - flatten of single pixels - batch norm": (
        lambda m, x: m.bn1d(torch.flatten(m.plain(x[..., :3, :3]), 1)),
        1,
    ),
    "conv - view - batch norm": (lambda m, x: m.bn1d(m.conv(x).view(2, 4, -1)), 1),
    "conv - contiguous - batch norm": (lambda m, x: m.bn(m.conv(x).contiguous()), 1),
    "conv - dropout in eval mode - batch norm": (lambda m, x: m.bn(F.dropout(m.conv(x), 0.5, False)), 1),
    "conv - nearest upsampling - batch norm": (
        lambda m, x: m.bn(F.interpolate(m.conv(x), scale_factor=2, mode="nearest")),
        1,
    ),
    "conv - unsqueeze - scale": (lambda m, x: m.conv(x).unsqueeze(2).squeeze(2).unsqueeze(0) * m.column, 1),
    "conv - flatten of channels": (lambda m, x: m.conv(x).flatten(1) * m.one.expand(4 * 8 * 8), 0),
    "conv - bilinear upsampling": (
        lambda m, x: m.bn(F.interpolate(m.conv(x), scale_factor=2, mode="bilinear")),
        0,
    ),
    "conv - dropout in training mode": (lambda m, x: m.bn(F.dropout(m.conv(x), 0.0, True)), 0),
    "conv - relu - batch norm": (lambda m, x: m.bn(torch.relu(m.conv(x)).contiguous()), 0),
    "conv - transpose - scale of rows": (lambda m, x: m.plain(x[..., :6, :6]).transpose(1, 3) * m.column, 0),
    "conv - padding - batch norm": (lambda m, x: m.bn(F.pad(m.conv(x), (1, 1))), 0),
}


@pytest.mark.parametrize(("capture", "case"), at_some_levels(ACROSS))
def test_an_affine_step_is_moved_across_what_carries_channels_along(capture: str, case: str) -> None:
    spell, count = ACROSS[case]
    if (
        count
        and ("dropout" in case or "contiguous" in case)
        and capture in ("pre_dispatch", "export", "aten")
    ):
        # Export drops what does nothing, and then it is a pair.
        report = check(capture, spelled(spell), (image(),), 0, rule=RULE)
        assert sum(report.applied.values()) == 1, report
        return
    rule = "affine_across_views"
    if capture == "aten" and "training mode" in case:
        count = 1  # decomposed, dropout with a probability of zero is a copy
    model = spelled(spell)
    if count == 0:
        report = check(capture, model, (image(),), 0, rule=rule, grads=True)
    else:
        check(capture, model, (image(),), count, rule=rule)


def test_dynamic_batches_are_carried_along() -> None:
    model = spelled(lambda m, x: m.bn1d(m.conv(x).flatten(2)))
    compiled = torch.compile(
        model, backend="fxpasses", dynamic=True, options={"inner": "eager", "profit": "always"}
    )
    for size in (5, 6, 8):
        x = image(size + 4, 3, size, size + 1, grad=False)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)
    assert [each.applied for each in fxpasses.reports()] == [{"affine_across_views": 1}]
