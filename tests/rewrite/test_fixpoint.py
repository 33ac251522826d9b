"""Passes that run until nothing changes: order in a sweep, where they end, what is said if they do not."""

from __future__ import annotations

import pytest
import torch
from rules import SineToCosine

import fxpasses
from fxpasses.errors import FixpointError, UnknownRuleError
from fxpasses.rewrite.declarative_rule import DeclarativeRule

X = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)


def sine(x):
    return torch.sin(x)


class Becomes(fxpasses.Rule[fxpasses.Match]):
    """One function of a tensor becomes another, or several after one another."""

    def __init__(self, name, old, *new, seen=None, max_sweeps=1):
        self.name, self.old, self.new, self.max_sweeps = name, old, new, max_sweeps
        self.seen = [] if seen is None else seen

    @property
    def is_anchor(self):
        return lambda node: node.target is self.old

    def match(self, node, context):
        self.seen.append((self.name, node.name))
        return fxpasses.Match(context, (node,))

    def insertion_point(self, match):
        return match.result

    def rewrite(self, match, build):
        (found,) = match.result.all_input_nodes
        for function in self.new:
            found = build.call(function, (found,))
        return found


def sine_cosine_tangent(seen=None):
    return (
        Becomes("to_cosine", torch.sin, torch.cos, seen=seen),
        Becomes("to_tangent", torch.cos, torch.tan, seen=seen),
    )


def optimized(function, *rules, max_sweeps=1, **options):
    given = {"rules": fxpasses.RulePass("group", rules, max_sweeps=max_sweeps), **options}
    return fxpasses.optimize(torch.fx.symbolic_trace(function), (X,), given)


def test_one_sweep_leaves_alone_what_it_writes():
    result = optimized(sine, *sine_cosine_tangent())
    assert result.report.applied == {"to_cosine": 1}
    assert torch.equal(result.graph_module(X), X.cos())


@pytest.mark.parametrize("order", [1, -1])
def test_sweeps_go_on_until_nothing_changes(order):
    result = optimized(sine, *sine_cosine_tangent()[::order], max_sweeps=3)
    assert result.report.applied == {"to_cosine": 1, "to_tangent": 1}
    assert torch.equal(result.graph_module(X), X.tan())


def test_a_sweep_goes_in_program_order_and_at_each_node_in_the_order_of_the_rules():
    def function(x):
        return torch.sin(x) + torch.cos(torch.sin(x + 1))

    seen = []
    first, second = sine_cosine_tangent(seen)
    declines = Becomes("declines", torch.sin, torch.sin, seen=seen)
    declines.legality = lambda match: fxpasses.Decline("never", "it never does", match.result)
    optimized(function, declines, first, second, max_sweeps=3)
    assert seen == [
        ("declines", "sin"),
        ("to_cosine", "sin"),
        ("declines", "sin_1"),
        ("to_cosine", "sin_1"),
        ("to_tangent", "cos"),
        ("to_tangent", "sin"),
        ("to_tangent", "sin_1"),
    ], "names stay: the cosines that were sines are looked at in the second sweep"


def test_after_a_rule_was_applied_no_other_is_tried_at_that_node_in_the_sweep():
    seen = []
    rules = [Becomes(name, torch.sin, torch.cos, seen=seen) for name in "ab"]
    assert optimized(sine, *rules, max_sweeps=2).report.applied == {"a": 1}
    assert seen == [("a", "sin")]


def test_one_rule_may_run_to_a_fixpoint_through_every_door():
    def absolute_once():
        """The absolute value of an absolute value is that value; a second sweep finds nothing left."""
        pattern = DeclarativeRule(
            "twice_is_once", lambda x: x.abs().abs(), lambda x: x.abs(), (torch.randn(3),), max_sweeps=5
        )
        return {"rules": pattern, "inner": "eager"}

    def function(x):
        return (x - 0.5).abs().abs().abs().abs()

    def nodes(module):
        return sum(node.op == "call_method" or node.target is torch.abs for node in module.graph.nodes)

    result = fxpasses.optimize(
        torch.fx.symbolic_trace(function), (X,), {**absolute_once(), "verify": "numerics"}
    )
    assert nodes(result.graph_module) == 1
    assert torch.equal(result.graph_module(X), function(X))
    assert torch.equal(torch.compile(function, backend="fxpasses", options=absolute_once())(X), function(X))
    assert fxpasses.last_report().applied == result.report.applied == {"twice_is_once": 3}


def test_the_last_of_the_sweeps_must_change_nothing():
    rules = sine_cosine_tangent()
    assert optimized(sine, *rules, max_sweeps=3).report.applied == {"to_cosine": 1, "to_tangent": 1}
    with pytest.raises(FixpointError, match="still changes the graph after 2 sweeps"):
        optimized(sine, *rules, max_sweeps=2)


# What does not end -----------------------------------------------------------------------------------------


def test_rules_that_undo_one_another_are_named_with_their_site():
    rules = Becomes("there", torch.sin, torch.cos), Becomes("back", torch.cos, torch.sin)
    program = torch.fx.symbolic_trace(lambda x: torch.sin(x) + torch.exp(x))
    before = str(program.graph)
    group = fxpasses.RulePass("group", rules, max_sweeps=7)
    with pytest.raises(FixpointError, match=r"pass 'group' .* 7 sweeps .*: back -> there -> back at sin\."):
        fxpasses.optimize(program, (X,), {"rules": group})
    assert str(program.graph) == before


def test_the_source_line_of_the_site_is_named():
    rules = Becomes("there", torch.sin, torch.cos), Becomes("back", torch.cos, torch.sin)
    group = fxpasses.RulePass("group", rules, max_sweeps=4)
    with pytest.raises(FixpointError, match=r"there -> back -> there at sin \(.*test_fixpoint\.py:\d+\)"):
        fxpasses.explain(lambda x: torch.sin(x) + 1, X, options={"rules": group})


def test_a_rule_that_matches_what_it_writes_is_named():
    grows = Becomes("grows", torch.sin, torch.cos, torch.sin, max_sweeps=4)
    with pytest.raises(FixpointError, match="grows -> grows at sin"):
        fxpasses.optimize(torch.fx.symbolic_trace(sine), (X,), {"rules": grows})


def test_three_rules_in_a_circle_are_named():
    functions = (torch.sin, torch.cos, torch.tan)
    rules = [Becomes(f"rule_{at}", functions[at], functions[(at + 1) % 3]) for at in range(3)]
    with pytest.raises(FixpointError, match="rule_1 -> rule_2 -> rule_0 -> rule_1 at sin"):
        optimized(sine, *rules, max_sweeps=7)


def test_what_only_takes_longer_is_no_cycle():
    functions = (torch.sin, torch.cos, torch.tan, torch.exp)
    rules = [Becomes(f"rule_{at}", functions[at], functions[at + 1]) for at in range(3)]
    with pytest.raises(FixpointError, match=r"\(max_sweeps\): rule_1 at sin\."):
        optimized(sine, *rules, max_sweeps=2)


def test_many_sites_are_not_all_listed():
    rules = Becomes("there", torch.sin, torch.cos), Becomes("back", torch.cos, torch.sin)

    def function(x):
        for _ in range(9):
            x = torch.sin(x)
        return x

    with pytest.raises(FixpointError, match="; and at 3 more"):
        optimized(function, *rules, max_sweeps=4)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_limit_ends_it(limit):
    rules = Becomes("there", torch.sin, torch.cos), Becomes("back", torch.cos, torch.sin)
    report = optimized(sine, *rules, max_sweeps=9, limit=limit).report
    assert sum(report.applied.values()) == limit
    assert report.declined[0].code == "limit"


@pytest.mark.parametrize("wrong", [0, -1, 2.5, None])
def test_a_wrong_number_of_sweeps_is_refused(wrong):
    with pytest.raises(UnknownRuleError, match="max_sweeps takes a number from 1 up"):
        fxpasses.RulePass("group", (SineToCosine(),), max_sweeps=wrong)
    with pytest.raises(UnknownRuleError, match="max_sweeps"):
        fxpasses.explain(
            torch.sin, X, options={"rules": Becomes("one", torch.sin, torch.cos, max_sweeps=wrong)}
        )


# What the report says --------------------------------------------------------------------------------------


def test_a_site_that_stays_declined_is_told_of_once():
    declines = Becomes("declines", torch.exp, torch.sin)
    declines.legality = lambda match: fxpasses.Decline("never", "it never does", match.result)
    report = optimized(
        lambda x: torch.sin(x) + torch.exp(x), *sine_cosine_tangent(), declines, max_sweeps=5
    ).report
    assert [(each.rule, each.code) for each in report.remarks] == [
        ("to_cosine", "applied"),
        ("to_tangent", "applied"),
        ("declines", "never"),
    ]


def test_a_site_that_fails_again_and_again_is_told_of_once_and_never_forgotten():
    class Fails(Becomes):
        def rewrite(self, match, build):
            raise ZeroDivisionError("again")

    fails = Fails("fails", torch.sin, torch.cos)
    report = optimized(sine, fails, *sine_cosine_tangent(), max_sweeps=5).report
    assert [(each.rule, each.status) for each in report.remarks] == [
        ("fails", "failed"),
        ("to_cosine", "applied"),
        ("to_tangent", "applied"),
    ]
    report = optimized(
        lambda x: torch.exp(torch.sin(x)),
        Fails("fails", torch.exp, torch.cos),
        *sine_cosine_tangent(),
        max_sweeps=5,
    ).report
    assert [each.rule for each in report.remarks if each.status == "failed"] == ["fails"]


def test_the_number_of_sweeps_is_part_of_the_key():
    keys = {fxpasses.RulePass("group", (SineToCosine(),), max_sweeps=sweeps).uuid() for sweeps in (1, 2)}
    assert len(keys) == 2
