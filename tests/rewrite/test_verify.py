"""Trust per application: each check catches the fault it is for, and lets a right rewrite pass."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from helpers import CAPTURES, image, pair, randomised
from torch import nn

import fxpasses
from fxpasses.errors import ReproError
from fxpasses.rewrite import numerics
from fxpasses.testing import TensorSpec, assert_same_function
from fxpasses.torch_internals.fake_tensors import FakeTensorMode
from tests.rewrite.planted import SoftmaxRule, along_wrong_axis, by_hand, registered


def softmax(x):
    return torch.softmax(x, 1)


def run(rule, options, *inputs, function=softmax):
    with registered(rule):
        return fxpasses.explain(function, *inputs, options={"passes": rule.name, **options})


def codes(report):
    return [(remark.status, remark.code) for remark in report.remarks]


@pytest.mark.parametrize("verify", ["off", "structure", "numerics"])
def test_a_right_rewrite_passes_every_check(verify):
    report = run(SoftmaxRule(by_hand), {"verify": verify}, torch.randn(3, 4))
    assert codes(report) == [("applied", "applied")]


def test_a_wrong_axis_is_caught_by_numerics_and_rolled_back():
    x = torch.randn(4, 4)
    rule = SoftmaxRule(along_wrong_axis)
    with registered(rule):
        traced = torch.fx.symbolic_trace(softmax)
        result = fxpasses.optimize(traced, (x,), {"passes": rule.name, "verify": "numerics"})
    assert codes(result.report) == [("failed", "verify-numerics")]
    assert not result.report.applied
    torch.testing.assert_close(result.graph_module(x), softmax(x))
    assert [node.target for node in result.graph_module.graph.nodes if node.op == "call_function"] == [
        torch.softmax
    ]


def test_without_numerics_the_wrong_axis_goes_through():
    report = run(SoftmaxRule(along_wrong_axis), {"verify": "structure"}, torch.randn(4, 4))
    assert codes(report) == [("applied", "applied")]


def test_a_lost_gradient_is_caught_by_numerics():
    def detached(rule, node, build):
        return build.call("detach", (by_hand(rule, node, build),))

    x = torch.randn(3, 4, requires_grad=True)
    assert codes(run(SoftmaxRule(detached), {"verify": "numerics"}, x)) == [("failed", "verify-numerics")]
    plain = torch.randn(3, 4)
    assert codes(run(SoftmaxRule(detached), {"verify": "numerics"}, plain)) == [("applied", "applied")]


def test_rounding_to_half_on_the_way_is_caught_by_numerics():
    def rounded(rule, node, build):
        return build.call("float", (build.call("half", (by_hand(rule, node, build),)),))

    report = run(SoftmaxRule(rounded), {"verify": "numerics"}, torch.randn(3, 4))
    assert codes(report) == [("failed", "verify-numerics")]


def transposing(rule, node, build):
    turned = build.call("transpose", (by_hand(rule, node, build), 0, 1))
    return build.call("transpose", (build.call("contiguous", (turned,)), 0, 1))


def test_other_strides_of_a_visible_output_are_caught_by_structure():
    x = torch.randn(3, 4)
    assert codes(run(SoftmaxRule(transposing), {}, x)) == [("applied", "applied")]
    report = run(SoftmaxRule(transposing), {"verify": "structure"}, x)
    assert codes(report) == [("failed", "verify-structure")]
    assert "strides" in report.remarks[0].message


def test_other_strides_of_an_inner_value_are_nobody_s_business():
    report = run(
        SoftmaxRule(transposing),
        {"verify": "structure"},
        torch.randn(3, 4),
        function=lambda x: torch.softmax(x, 1).sum(),
    )
    assert codes(report) == [("applied", "applied")]


def test_strides_of_a_view_that_leaves_the_graph_are_the_user_s():
    report = run(
        SoftmaxRule(transposing),
        {"verify": "structure"},
        torch.randn(3, 4),
        function=lambda x: torch.softmax(x, 1).t(),
    )
    assert codes(report) == [("failed", "verify-structure")]


def test_metadata_that_is_not_the_operator_s_is_caught_by_structure():
    def lying(rule, node, build):
        result = by_hand(rule, node, build)
        middle = result.args[1]
        with FakeTensorMode():
            middle.meta["val"] = torch.empty(7, 7)
        return result

    report = run(SoftmaxRule(lying), {"verify": "structure"}, torch.randn(3, 4))
    assert codes(report) == [("failed", "verify-structure")]


def guarding(rule, node, build):
    if node.meta["val"].shape[0] == 5:
        raise AssertionError("the inputs of this test have 3 rows")
    return by_hand(rule, node, build)


@pytest.mark.parametrize(
    ("write", "expected"), [(guarding, ("failed", "verify-structure")), (by_hand, ("applied", "applied"))]
)
def test_a_new_guard_on_a_size_is_caught_by_structure(write, expected):
    rule = SoftmaxRule(write)
    reports = []

    def backend(gm, inputs):
        result = fxpasses.optimize(gm, inputs, {"passes": rule.name, "verify": "structure"})
        reports.append(result.report)
        return result.graph_module

    with registered(rule):
        torch.compile(softmax, backend=backend, dynamic=True)(torch.randn(3, 4))
    assert codes(reports[0]) == [expected]


def test_a_replacement_that_comes_too_late_is_refused_always():
    class Late(SoftmaxRule):
        def insertion_point(self, match):
            return next(iter(match.context.graph.find_nodes(op="output")))

    function = lambda x: torch.softmax(x, 1) + 1  # noqa: E731
    assert codes(run(Late(by_hand), {}, torch.randn(3, 4), function=function)) == [
        ("failed", "rewrite-error")
    ]


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_conv_bn_passes_numerics_at_every_level(capture, dtype):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 3, groups=2),
        nn.BatchNorm2d(8),
    )
    model = randomised(model, dtype)
    inputs = (image(dtype=dtype),)
    program = CAPTURES[capture](model, inputs)
    report = fxpasses.optimize(program, inputs, {"verify": "numerics", "profit": "always"}).report
    assert report.applied == {"efficient_conv_bn_eval": 2}, report.remarks


def test_symbolic_sizes_run_on_their_hints():
    model = pair(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (image(),), dynamic_shapes=({0: batch},))
    report = fxpasses.optimize(program, options={"verify": "numerics", "profit": "always"}).report
    assert report.applied == {"efficient_conv_bn_eval": 1}, report.remarks


# Saved applications ----------------------------------------------------------------------------------------


class ProductRule(SoftmaxRule):
    """Matches `torch.mm`."""

    @property
    def is_anchor(self):
        return lambda node: node.target is torch.mm


def under_autocast(x, y):
    with torch.autocast("cpu", torch.bfloat16):
        return torch.mm(x, y)


def in_bfloat16(rule, node, build):
    # What autocast makes of torch.mm, and nothing without it: float32 would come out as bfloat16.
    x, y = (build.call("to", (operand, torch.bfloat16)) for operand in node.args)
    return build.call(torch.matmul, (x, y))


def reports_of_rewrites():
    """Reports of one application each, by what was rewritten."""
    keep = {"keep_repro": True}
    x = torch.randn(4, 4)
    yield "right", run(SoftmaxRule(by_hand), keep, x)
    yield "wrong", run(SoftmaxRule(along_wrong_axis), keep, x)
    model = torch.fx.symbolic_trace(pair(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    yield "modules", fxpasses.optimize(model, (image(),), {**keep, "profit": "always"}).report
    for name, grad in (("grad", True), ("no_grad", False)):
        with torch.set_grad_enabled(grad):
            yield name, run(ProductRule(in_bfloat16), keep, x, x + 1, function=under_autocast)


def test_the_saved_file_of_a_miscompile_fails_and_those_of_right_rewrites_pass(tmp_path):
    """In one process of pytest; autocast and grad mode are those of the place of the rewrite."""
    texts = {}
    for name, report in reports_of_rewrites():
        (path,) = report.save_repro(tmp_path / name)
        path = path.rename(tmp_path / f"test_{name}.py")
        texts[name] = path.read_text()
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    outcomes = re.findall(r"^(PASSED|FAILED|ERROR) test_(\w+)\.py", done.stdout, re.MULTILINE)
    assert {name: outcome for outcome, name in outcomes} == {
        name: "FAILED" if name == "wrong" else "PASSED" for name in texts
    }, done.stdout
    assert "torch.nn.BatchNorm2d" in texts["modules"]
    assert "stride=" in texts["modules"]
    assert ("torch.no_grad()" in texts["grad"], "torch.no_grad()" in texts["no_grad"]) == (False, True)


def test_nothing_is_kept_unless_asked_for(tmp_path):
    report = run(SoftmaxRule(by_hand), {}, torch.randn(3, 4))
    assert report.applications == ()
    with pytest.raises(ReproError, match="keep_repro"):
        report.save_repro(tmp_path)


def test_a_report_without_rewrites_saves_nothing(tmp_path):
    report = run(SoftmaxRule(by_hand), {}, torch.randn(3, 4), function=torch.relu)
    assert report.save_repro(tmp_path) == []


# The comparison itself -------------------------------------------------------------------------------------

SPEC = TensorSpec((3, 4), (4, 1), torch.float32, requires_grad=True)


def test_equal_functions_are_the_same_and_others_are_not():
    assert_same_function(lambda x: x * 2, lambda x: x + x, [SPEC])
    with pytest.raises(AssertionError, match="off"):
        assert_same_function(lambda x: x * 2, lambda x: x * 2.001, [SPEC])


def test_values_above_zero_are_drawn_where_others_give_nan():
    assert_same_function(torch.log, lambda x: torch.log(x * x) / 2, [SPEC])
    with pytest.raises(AssertionError, match="off"):
        assert_same_function(torch.log, lambda x: torch.log(x * x), [SPEC])


def test_what_cannot_be_run_is_no_success():
    with pytest.raises(AssertionError, match="could not be run"):
        assert_same_function(lambda x: x.view(5), lambda x: x.view(5), [SPEC])


def test_made_up_tensors_have_the_strides_that_were_asked_for():
    specs = [TensorSpec((3, 4), (0, 1), torch.float32), TensorSpec((2, 3), (1, 2), torch.int64)]
    assert [value.stride() for value in numerics._values(specs, 0)] == [(0, 1), (1, 2)]
    empty = numerics._values([TensorSpec((0, 4), (4, 1), torch.float32)], 0)
    assert empty[0].shape == (0, 4)
