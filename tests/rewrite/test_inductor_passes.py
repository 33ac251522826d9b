"""Passes of inductor's pattern matcher in our registry: counted, remarked upon, and right."""

from __future__ import annotations

import pytest
import torch
from helpers import require_wellformed
from torch._inductor.pattern_matcher import (
    Arg,
    CallFunction,
    PatternMatcherPass,
    register_graph_pattern,
    register_replacement,
)

import fxpasses
from fxpasses.errors import UnknownRuleError
from fxpasses.testing import registered
from fxpasses.testing.captures import capture

aten = torch.ops.aten


class Model(torch.nn.Module):
    def forward(self, x):
        return torch.relu(torch.relu(x)) + torch.neg(torch.neg(x.sin()))


def passes():
    matcher = PatternMatcherPass()
    twice = CallFunction(aten.relu.default, CallFunction(aten.relu.default, Arg()))

    @register_graph_pattern(twice, pass_dict=matcher)
    def once(match, x):
        match.output_node().replace_all_uses_with(match.nodes[0])
        match.graph.erase_node(match.output_node())

    return matcher


def run(matcher, model=None):
    program = capture("aten", model or Model(), (x := torch.randn(3, 4),))
    with registered(fxpasses.from_inductor("theirs", matcher)):
        result = fxpasses.optimize(program, options={"passes": "theirs"})
    torch.testing.assert_close(result.exported_program.module()(x), (model or Model())(x))
    require_wellformed(result.graph_module)
    return result


def test_a_replacement_is_counted_and_remarked_upon():
    matcher = passes()
    before = {key: list(entries) for key, entries in matcher.patterns.items()}
    result = run(matcher)
    assert result.report.applied == {"theirs": 1}
    assert result.report.remarks[0].location.endswith(f":{Model.forward.__code__.co_firstlineno + 1}")
    targets = [node.target for node in result.graph_module.graph.nodes]
    assert targets.count(aten.relu.default) == 1
    assert matcher.patterns == before


def test_a_refusal_of_extra_check_is_a_remark():
    matcher = PatternMatcherPass()
    twice = CallFunction(aten.neg.default, CallFunction(aten.neg.default, Arg()))

    @register_graph_pattern(twice, extra_check=lambda match: False, pass_dict=matcher)
    def never(match, x):
        raise AssertionError("the check says no")

    report = run(matcher).report
    assert [(remark.status, remark.code) for remark in report.remarks] == [("declined", "extra-check")]


def test_a_handler_that_does_nothing_is_not_counted():
    matcher = PatternMatcherPass()
    twice = CallFunction(aten.neg.default, CallFunction(aten.neg.default, Arg()))

    @register_graph_pattern(twice, pass_dict=matcher)
    def nothing(match, x):
        return None

    report = run(matcher).report
    assert [(remark.status, remark.code) for remark in report.remarks] == [("declined", "handler")]
    assert not report.applied


def test_a_traced_replacement_carries_metadata():
    from torch._inductor.pattern_matcher import fwd_only

    matcher = PatternMatcherPass()
    register_replacement(
        lambda x: torch.neg(torch.neg(x)), lambda x: x * 1.0, [torch.randn(3, 4)], fwd_only, matcher
    )
    result = run(matcher)
    assert result.report.applied == {"theirs": 1}


def test_a_pass_that_is_not_selected_does_not_run():
    program = capture("aten", Model(), (torch.randn(3, 4),))
    with registered(fxpasses.from_inductor("theirs", passes())):
        assert not fxpasses.optimize(program).report.remarks
        chosen = {"passes": "theirs", "disable": "theirs"}
        assert not fxpasses.optimize(program, options=chosen).report.remarks


def test_something_else_is_refused():
    with pytest.raises(UnknownRuleError, match="PatternMatcherPass"):
        fxpasses.from_inductor("theirs", object())
