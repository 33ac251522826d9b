"""Declarative rules: found in every spelling, at every level, and refused where eager would differ."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F
from helpers import CAPTURES, callable_of, outputs_and_gradients, require_equal, require_wellformed
from torch import nn

import fxpasses
from fxpasses.errors import PatternError
from fxpasses.rewrite import declarative
from fxpasses.rewrite.declarative_rule import DeclarativeRule
from fxpasses.testing import registered

LEVELS = ("compile", *CAPTURES)
SOME_LEVELS = ("compile", "pre_dispatch", "symbolic_trace")
"""For what does not depend on the level: the quick ones."""


def rule(pattern, replacement, *example, name="tested", **more):
    return DeclarativeRule(name, pattern, replacement, example, **more)


class Call(nn.Module):
    """A function of an input and of parameters with the given shapes, between two other operators."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function = function
        self.held = nn.ParameterList([nn.Parameter(torch.randn(shape).double()) for shape in shapes])

    def forward(self, x):
        result = self.function(x.sin(), *self.held)
        return [value.cos() for value in result] if isinstance(result, tuple) else result.cos()


def outcomes(report):
    return [(remark.status, remark.code) for remark in report.remarks if remark.rule == "tested"]


def run(level, made, model, x):
    """Applies one rule at one level, with every check on, and compares with eager; the report."""
    options = {"passes": made.name, "verify": "numerics"}
    with registered(made):
        if level == "compile":
            torch.compiler.reset()
            fxpasses.reset()
            call = torch.compile(model, backend="fxpasses", options={**options, "inner": "eager"})
            found = outputs_and_gradients(call, list(model.parameters()), [x], grads=True)
            report = fxpasses.last_report()
        else:
            result = fxpasses.optimize(CAPTURES[level](model, (x,)), (x,), options)
            require_wellformed(result.graph_module)
            call = callable_of(result)
            parameters = list(call.parameters()) if result.exported_program else list(model.parameters())
            found = outputs_and_gradients(call, parameters, [x], grads=True)
            report = result.report
    require_equal(found, outputs_and_gradients(model, list(model.parameters()), [x], grads=True))
    return report


def applied_everywhere(made, function, *shapes, levels=LEVELS):
    x = torch.randn(3, 8).double().requires_grad_()
    for level in levels:
        report = run(level, made, Call(function, *shapes), x)
        assert report.applied.get("tested") == 1, f"{level}: {report.remarks}"


def declined_everywhere(code, made, function, *shapes, levels=SOME_LEVELS):
    x = torch.randn(3, 8).double().requires_grad_()
    for level in levels:
        report = run(level, made, Call(function, *shapes), x)
        assert not report.applied, f"{level}: {report.remarks}"
        if code is not None:
            assert code in {remark.code for remark in report.remarks}, f"{level}: {report.remarks}"


def test_the_tutorial_is_true():
    failed, tried = doctest.testmod(declarative)
    assert tried > 10
    assert failed == 0


# Spellings --------------------------------------------------------------------------------------------------


def rms(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def fused_rms(x, weight, eps):
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


RMS = rule(rms, fused_rms, torch.randn(2, 8), torch.randn(8), 1e-6)
NEGATION = rule(lambda x: x.neg().neg(), lambda x: x, torch.randn(2, 3))
SCALED = rule(lambda x, y: torch.add(x, y, alpha=2), lambda x, y: x + 2 * y, *torch.randn(2, 2, 3).unbind())
AFFINE = rule(
    lambda x, weight, bias: torch.matmul(x, weight) + bias,
    lambda x, weight, bias: torch.addmm(bias, x, weight),
    *(torch.randn(2, 3), torch.randn(3, 4), torch.randn(4)),
    check=lambda match: match.tensor("x").ndim == 2,
)
JOINED = rule(
    lambda x, y: torch.relu(torch.cat([x, y], 1)),
    lambda x, y: torch.cat([x.relu(), y.relu()], 1),
    *torch.randn(2, 2, 3).unbind(),
)
SILU = rule(lambda x: F.silu(x) * 2, lambda x: x * torch.sigmoid(x) * 2, torch.randn(2, 3))


@pytest.mark.parametrize(
    ("made", "spelling", "shapes"),
    [
        (NEGATION, lambda x: torch.neg(input=x.neg()), ()),
        (NEGATION, lambda x: torch.neg(-x), ()),
        (RMS, lambda x, w: w * (torch.rsqrt(1e-5 + torch.mean(x**2, 1, True)) * x), [(8,)]),
        (RMS, lambda x, w: torch.mul(x.mul((x.pow(2).mean([-1], keepdim=True) + 0.5).rsqrt()), w), [(8,)]),
        (AFFINE, lambda x, w, b: b + x @ w, [(8, 8), (8,)]),
        (AFFINE, lambda x, w, b: torch.add(input=torch.mm(x, mat2=w), other=b), [(8, 8), (8,)]),
        (SCALED, lambda x, y: x.add(y, alpha=2), [(3, 8)]),
        (JOINED, lambda x, y: torch.cat((x, y), dim=1).relu(), [(3, 8)]),
        (JOINED, lambda x, y: F.relu(torch.cat(dim=1, tensors=[x, y])), [(3, 8)]),
        (SILU, lambda x: 2 * F.silu(input=x), ()),
        (SILU, lambda x: torch.mul(F.silu(x), 2), ()),
    ],
)
def test_every_spelling_is_found_at_every_level(made, spelling, shapes):
    # Above the aten level, a product of matrices and a matmul are two operators.
    levels = ("aten",) if "mm" in spelling.__code__.co_names else LEVELS
    applied_everywhere(made, spelling, *shapes, levels=levels)


def test_a_leaf_module_is_its_operator():
    made = rule(
        lambda x, w: F.silu(F.linear(x, w)),
        lambda x, w: F.silu(x @ w.t()),
        torch.randn(2, 8),
        torch.randn(8, 8),
    )
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.SiLU(), nn.Tanh()).double()
    x = torch.randn(3, 8).double().requires_grad_()
    assert run("symbolic_trace", made, model, x).applied == {"tested": 1}
    model[0].register_forward_hook(lambda *_: None)
    assert not run("symbolic_trace", made, model, x).applied


def test_an_optional_parameter_may_be_absent():
    made = rule(
        lambda x, w, b=None: torch.relu(F.linear(x, w, b)),
        lambda x, w, b=None: F.linear(x, w, b).clamp(min=0),
        *(torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)),
    )
    applied_everywhere(made, lambda x, w, b: F.relu(F.linear(x, w, b)), (8, 8), (8,))
    applied_everywhere(made, lambda x, w: F.linear(x, w).relu(), (8, 8))


def test_several_results_are_replaced_together():
    made = rule(
        lambda x, y: (x + y, x - y),
        lambda x, y: torch.stack([x + y, x - y]).unbind(0),
        *torch.randn(2, 2, 3).unbind(),
    )
    applied_everywhere(made, lambda x, y: (y + x) * (x - y).exp(), (3, 8))
    declined_everywhere(None, made, lambda x, y: (y + x) * (x - y.exp()), (3, 8))


class Shifted(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.eps, self.weight = function, 1e-5, nn.Parameter(torch.randn(8).double())

    def forward(self, x):
        return self.function(x, self.weight, self.eps)


def run_dynamic(made, function):
    model, x = Shifted(function), torch.randn(3, 8).double()
    with registered(made):
        options = {"inner": "eager", "passes": "tested", "verify": "numerics"}
        found = torch.compile(model, backend="fxpasses", dynamic=True, options=options)(x)
    torch.testing.assert_close(found, model(x), rtol=1e-12, atol=0)
    return fxpasses.last_report()


def test_a_number_that_dynamic_shapes_turn_into_an_input_is_a_number():
    def exponential(x, weight, eps):
        return (x + eps).exp() * weight

    def reordered(x, weight, eps):
        return weight * torch.exp(eps + x)

    made = rule(exponential, reordered, torch.randn(2, 8), torch.randn(8), 1e-6)
    assert run_dynamic(made, exponential).applied == {"tested": 1}


def test_a_replacement_that_specialises_a_number_is_caught_by_structure():
    # torch.nn.functional.rms_norm takes a constant, so it would fix the value and recompile for others.
    assert outcomes(run_dynamic(RMS, rms)) == [("failed", "verify-structure")]


# Near misses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "made", "other", "shapes"),
    [
        ("other-constant", SCALED, lambda x, y: x.add(y), [(3, 8)]),
        ("other-constant", SCALED, lambda x, y: torch.add(x, y, alpha=3), [(3, 8)]),
        ("other-constant", RMS, lambda x, w: x * torch.rsqrt(x.pow(3).mean(-1, True).abs() + 1) * w, [(8,)]),
        ("other-constant", RMS, lambda x, w: x * torch.rsqrt(x.pow(2).mean(0, True) + 1.0) * w, [(8,)]),
        ("other-constant", JOINED, lambda x, y: torch.cat([x, y]).relu(), [(3, 8)]),
        ("other-constant", JOINED, lambda x, y: torch.cat([x, y, x], 1).relu(), [(3, 8)]),
        ("other-operand", RMS, lambda x, w: x.cos() * torch.rsqrt(x.pow(2).mean(-1, True) + 1.0) * w, [(8,)]),
        ("operand-kind", RMS, lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, True) + w) * w, [(8,)]),
        ("other-operator", NEGATION, lambda x: -x.exp(), ()),
        ("check", AFFINE, lambda x, w, b: x.unsqueeze(0) @ w + b, [(8, 8), (8,)]),
    ],
)
def test_what_is_almost_the_pattern_is_declined_with_the_reason(code, made, other, shapes):
    found = None if code == "other-constant" and "abs" in other.__code__.co_names else code
    declined_everywhere(found, made, other, *shapes)


def test_operands_of_several_dtypes_are_declined_unless_an_example_has_them():
    """A sum promotes a float32 bias, and addmm refuses it."""

    def other(x, w, b):
        return x @ w + b.to(torch.float32)

    declined_everywhere("mixed-dtypes", AFFINE, other, (8, 8), (8,))
    program = torch.fx.symbolic_trace(lambda x, w, b: x @ w + b)
    inputs = (torch.randn(3, 8), torch.randn(8, 8), torch.randn(8).double())
    trusting = rule(lambda x, w, b: x @ w + b, lambda x, w, b: torch.addmm(b, x.to(b), w.to(b)), *inputs)
    with registered(trusting):
        report = fxpasses.optimize(program, inputs, {"passes": trusting.name}).report
    assert report.applied == {trusting.name: 1}


def test_a_result_that_is_read_elsewhere_is_declined():
    declined_everywhere("multiple-users", NEGATION, lambda x: (y := x.neg()).neg().exp() + y)


def test_a_write_on_the_way_is_declined():
    made = rule(lambda x, y: (x + y) * 2, lambda x, y: x * 2 + y * 2, *torch.randn(2, 2, 3).unbind())

    def written(x, y):
        x = x.clone()
        both = x + y
        x.mul_(3)
        return both * 2 + x

    def written_before(x, y):
        x = x.clone()
        x.mul_(3)
        return (x + y) * 2

    declined_everywhere("mutation", made, written, (3, 8))
    applied_everywhere(made, written_before, (3, 8), levels=SOME_LEVELS)


def test_another_grad_mode_inside_is_declined():
    def partly(x, w):
        with torch.no_grad():
            squares = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(squares + 1.0) * w

    declined_everywhere("grad-mode", RMS, partly, (8,), levels=("compile",))


def test_a_new_alias_is_declined_where_the_user_or_a_write_can_tell():
    x = torch.randn(3, 8)
    for function, code in (
        (lambda x: x.neg().neg(), "aliasing"),
        (lambda x: x.exp().neg().neg().add_(1), "aliasing"),
        (lambda x: ((y := x.exp()), (y.neg().neg()).add_(1)), "aliasing"),
        (lambda x: x.exp().neg().neg().cos(), "applied"),
    ):
        with registered(NEGATION):
            report = fxpasses.explain(function, x, options={"passes": "tested"})
        assert code in {remark.code for remark in report.remarks}, (code, report.remarks)


def test_a_check_and_a_profit_may_decline_with_reasons_of_their_own():
    def check(match):
        if match.tensor("x").shape[0] == 3:
            return match.decline("three-rows", "not three rows", "x")
        return None

    def made(**more):
        return rule(lambda x: x.neg().neg(), lambda x: x, torch.randn(2, 3), **more)

    declined_everywhere("three-rows", made(check=check), lambda x: x.neg().neg())
    declined_everywhere("three-rows", made(profit=check), lambda x: x.neg().neg())
    declined_everywhere("profit", made(profit=lambda match: False), lambda x: x.neg().neg())
    applied_everywhere(made(check=lambda match: True, profit=lambda match: None), lambda x: x.neg().neg())
    with registered(made(profit=check)):
        options = {"passes": "tested", "profit": "always"}
        report = fxpasses.explain(lambda x: x.exp().neg().neg().cos(), torch.randn(3, 8), options=options)
    assert report.applied == {"tested": 1}


def test_a_wrong_axis_in_a_replacement_is_caught_by_numerics():
    made = rule(lambda x: torch.softmax(x, 1), lambda x: torch.softmax(x, 0), torch.randn(2, 3))
    x = torch.randn(3, 8).double().requires_grad_()
    report = run("compile", made, Call(lambda x: torch.softmax(x, 1)), x)
    assert outcomes(report) == [("failed", "verify-numerics")]


def test_the_nearest_miss_says_how_much_was_found():
    with registered(RMS):
        report = fxpasses.explain(
            lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1.0) * w,
            *(torch.randn(3, 8), torch.randn(8)),
            options={"passes": "tested"},
        )
    nearest = report.declined[0]
    assert (nearest.matched, nearest.pattern_size) == (4, 6)
    assert "matched 4 of 6 nodes; declined [other-operator]" in str(nearest)
    assert "aten::sum" in nearest.message


# Definitions that cannot work -------------------------------------------------------------------------------

ONE = torch.randn(2, 3)


@pytest.mark.parametrize(
    ("pattern", "replacement", "example", "message"),
    [
        (lambda x: x + 1, lambda y: y, (ONE,), "both must take the same"),
        (torch.relu, torch.relu, (ONE,), "named parameters"),
        (lambda x: x + 1, lambda x: x, (), "an example gives 0"),
        (lambda x: x + 1, lambda x: x, ([ONE, ONE],), "an example gives 2"),
        (lambda x, n: x.sum(n), lambda x, n: x.sum(n), (ONE, 1), "holds a int"),
        (lambda x, y: x + 1, lambda x, y: x, (ONE, ONE), "does not use y"),
        (lambda x: x, lambda x: x, (ONE,), "does not compute"),
        (lambda x: x.add_(1), lambda x: x, (ONE,), "in place"),
        (lambda x: x + ONE, lambda x: x, (ONE,), "from outside"),
        (lambda x: x @ x, lambda x: x, (ONE,), "cannot be traced"),
    ],
)
def test_a_rule_that_cannot_work_is_refused_where_it_is_written(pattern, replacement, example, message):
    with pytest.raises(PatternError, match=message):
        DeclarativeRule("tested", pattern, replacement, example)


def test_a_class_without_a_replacement_is_refused():
    with pytest.raises(PatternError, match="needs functions"):

        @fxpasses.rewrite(name="tested", examples=(ONE,))
        class Half:
            @staticmethod
            def pattern(x):
                return x + 1
