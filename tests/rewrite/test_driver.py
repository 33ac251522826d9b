"""The driver: applies, counts, keeps metadata and names, stops at a limit, and visits nested graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import CAPTURES, RULE, image, pair, printed, require_wellformed
from rules import SineToCosine, registered
from torch import nn
from torch.fx import GraphModule, Node

import fxpasses
from fxpasses.graph.context import GraphContext
from fxpasses.graph.decline import Decline
from fxpasses.rewrite.builder import Builder
from fxpasses.rewrite.registry import RulePass
from fxpasses.rewrite.rule import Match, Rule
from fxpasses.testing import expect


def three_sines(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) + torch.sin(x * 2) * torch.sin(x * 3)


def graph() -> GraphModule:
    return torch.fx.symbolic_trace(three_sines)


def run(options: dict[str, Any] | None = None, program: GraphModule | None = None) -> fxpasses.Optimized:
    return fxpasses.optimize(program or graph(), (image(3, grad=False),), options)


def test_every_site_is_rewritten_and_counted() -> None:
    with registered(SineToCosine()):
        result = run()
    assert result.report.applied == {"sine_to_cosine": 3}
    x = image(3, grad=False)
    assert torch.equal(result.graph_module(x), x.cos() + (x * 2).cos() * (x * 3).cos())
    require_wellformed(result.graph_module)
    assert result.report.level == "torch"
    assert result.report.nodes_before == result.report.nodes_after == len(graph().graph.nodes)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4])
def test_a_limit_applies_the_first_sites_only(limit: int) -> None:
    with registered(SineToCosine()):
        result = run({"limit": limit})
    count = min(limit, 3)
    assert result.report.applied.get("sine_to_cosine", 0) == count
    assert [remark.code for remark in result.report.remarks] == ["applied"] * count + ["limit"] * (3 - count)
    targets = [
        node.target for node in result.graph_module.graph.nodes if node.target in (torch.sin, torch.cos)
    ]
    assert targets == [torch.cos] * count + [torch.sin] * (3 - count)


def test_a_limit_counts_over_all_rules_and_nested_graphs() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False) + torch.sin(x)

    with registered(SineToCosine()):
        for limit in (1, 2):
            torch.compiler.reset()
            options = {"limit": limit, "inner": "eager"}
            with expect(sine_to_cosine=limit):
                torch.compile(call, backend="fxpasses", options=options)(image(3))


def test_graphs_inside_graphs_are_visited_and_named() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        y = torch.cond(x.sum() > 0, lambda x: torch.sin(x), lambda x: torch.sin(x) * 2, (x,))
        return torch.utils.checkpoint.checkpoint(torch.sin, y, use_reentrant=False) + torch.sin(x)

    x = image(3, grad=False).abs()
    with registered(SineToCosine()):
        found = torch.compile(call, backend="fxpasses", options={"inner": "eager"})(x)
    report = fxpasses.last_report()
    assert report.applied == {"sine_to_cosine": 4}
    assert len({remark.graph for remark in report.remarks}) == 4
    assert "" in {remark.graph for remark in report.remarks}
    torch.testing.assert_close(found, x.cos().cos() + x.cos())


def test_the_replacement_takes_over_the_name() -> None:
    names = [node.name for node in graph().graph.nodes if node.target is torch.sin]
    with registered(SineToCosine()):
        result = run()
    assert [node.name for node in result.graph_module.graph.nodes if node.target is torch.cos] == names


def test_remarks_point_at_the_users_line() -> None:
    options = {"inner": "eager"}
    with registered(SineToCosine()):
        torch.compile(three_sines, backend="fxpasses", options=options)(image(3))
    line = three_sines.__code__.co_firstlineno + 1
    for remark in fxpasses.last_report().remarks:
        assert remark.location.endswith(f"{__file__}:{line}")
        assert str(line) in str(remark)


def test_new_nodes_inherit_the_users_line() -> None:
    program = CAPTURES["export"](pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (image(),))
    result = fxpasses.optimize(program)
    calls = [node for node in result.graph_module.graph.nodes if node.op == "call_function"]
    assert len(calls) > 5
    assert all(node.meta.get("stack_trace") and node.meta.get("nn_module_stack") for node in calls)


def test_an_unused_rule_leaves_the_graph_as_it_was() -> None:
    program = torch.fx.symbolic_trace(lambda x: torch.tan(x))
    with registered(SineToCosine()):
        result = fxpasses.optimize(program, (image(3),))
    assert result.report.remarks == ()
    assert printed(result.graph_module) == printed(program)


class DoubleNegation(Rule[Match]):
    """-(-x) is x: the replacement is a node that is there already, and sites overlap."""

    name = "double_negation"

    @property
    def is_anchor(self) -> Any:
        return lambda node: node.target is torch.neg

    def match(self, node: Node, context: GraphContext) -> Match | Decline | None:
        (given,) = node.all_input_nodes
        if given.target is not torch.neg:
            return None
        return Match(context, (given, node))

    def insertion_point(self, match: Match) -> Node:
        return match.result

    def rewrite(self, match: Match, build: Builder) -> Node:
        (given,) = match.nodes[0].all_input_nodes
        return given


@pytest.mark.parametrize("times", range(1, 8))
def test_a_rule_may_return_a_node_that_is_there_already(times: int) -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        for _ in range(times):
            x = torch.neg(x)
        return x + 1

    program = torch.fx.symbolic_trace(call)
    with registered(DoubleNegation()):
        result = fxpasses.optimize(program, (image(3),))
    assert result.report.applied.get("double_negation", 0) == times // 2
    left = [node for node in result.graph_module.graph.nodes if node.target is torch.neg]
    assert len(left) == times % 2
    (placeholder,) = result.graph_module.graph.find_nodes(op="placeholder")
    assert placeholder.name == "x", "a node of the user's was renamed"
    require_wellformed(result.graph_module)
    x = image(3, grad=False)
    assert torch.equal(result.graph_module(x), call(x))


def test_a_site_that_an_earlier_rewrite_took_away_is_not_looked_at() -> None:
    """Of one pass with two rules, the first removes a node at which the second would stand."""

    class Outer(SineToCosine):
        """sin(sin(x)) becomes cos(x)."""

        def match(self, node: Node, context: GraphContext) -> Match | Decline | None:
            (given,) = node.all_input_nodes
            return Match(context, (given, node)) if given.target is torch.sin else None

        def rewrite(self, match: Match, build: Builder) -> Node:
            return build.call(torch.cos, tuple(match.nodes[0].all_input_nodes))

    program = torch.fx.symbolic_trace(lambda x: torch.sin(torch.sin(x)))
    two = RulePass("two", (Outer("outer"), SineToCosine("inner")))
    with registered(two):
        result = fxpasses.optimize(program, (image(3),))
    require_wellformed(result.graph_module)
    assert not [remark for remark in result.report.remarks if remark.status == "failed"]


def test_passes_and_rules_are_timed_by_name() -> None:
    with registered(RulePass("group", (SineToCosine("one"), SineToCosine("two")))):
        report = run().report
    assert "group" in report.seconds
    assert all(seconds >= 0 for seconds in report.seconds.values())
    assert report.applied == {"one": 3}, "the second rule finds nothing where the first has been"


def test_counters_rise_after_the_inner_backend_has_accepted_the_graph() -> None:
    def refuse(gm: GraphModule, inputs: Any) -> Any:
        raise RuntimeError("the inner backend refuses")

    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    compiled = torch.compile(model, backend="fxpasses", options={"inner": refuse, "profit": "always"})
    with expect(efficient_conv_bn_eval=0), pytest.raises(Exception, match="the inner backend refuses"):
        compiled(image())
    from torch._dynamo.utils import counters

    assert counters["fxpasses"][RULE] == 0
    torch.compiler.reset()
    with expect(efficient_conv_bn_eval=1):
        torch.compile(model, backend="fxpasses", options={"inner": "eager"})(image())
    assert counters["fxpasses"][RULE] == 1


@pytest.mark.parametrize("capture", CAPTURES)
def test_every_node_of_a_rewritten_graph_has_metadata_that_is_right(capture: str) -> None:
    model, x = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image()
    result = fxpasses.optimize(CAPTURES[capture](model, (x,)), (x,))
    assert result.report.applied == {RULE: 1}

    class Compare(torch.fx.Interpreter):
        compared = 0

        def run_node(self, n: Node) -> Any:
            found = super().run_node(n)
            if isinstance(found, torch.Tensor) and n.op != "output":
                said = n.meta["val"]
                assert (said.shape, said.dtype) == (found.shape, found.dtype), n
                assert said.stride() == found.stride(), n
                self.compared += 1
            return found

    inputs: list[Any] = [x]
    if result.exported_program is not None:
        program = result.exported_program
        held = {**program.state_dict, **program.constants}
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        placeholders = result.graph_module.graph.find_nodes(op="placeholder")
        inputs = [held[names[node.name]] if node.name in names else x for node in placeholders]
    compare = Compare(result.graph_module)
    compare.run(*inputs)
    assert compare.compared > 8


def test_a_replacement_may_not_read_what_it_replaces() -> None:
    """Every reader of the result is to read the replacement, itself included: that would be a cycle."""

    class Wrap(SineToCosine):
        def insertion_point(self, match: Match) -> Node:
            return match.result.next

        def rewrite(self, match: Match, build: Builder) -> Node:
            return build.call(torch.clone, (match.result,))

    program = torch.fx.symbolic_trace(lambda x: torch.sin(x) + 1)
    with registered(Wrap("wrap")):
        result = fxpasses.optimize(program, (image(3),))
    assert [remark.code for remark in result.report.remarks] == ["rewrite-error"]
    assert printed(result.graph_module) == printed(program)


def test_an_exported_programs_output_may_become_a_node_that_is_there_already() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.neg(torch.neg(torch.sin(x)))

    class OfAten(DoubleNegation):
        @property
        def is_anchor(self) -> Any:
            return lambda node: node.target is torch.ops.aten.neg.default

        def match(self, node: Node, context: GraphContext) -> Match | Decline | None:
            (given,) = node.all_input_nodes
            return Match(context, (given, node)) if self.is_anchor(given) else None

    x = image(3)
    with registered(OfAten()):
        result = fxpasses.optimize(torch.export.export(Model(), (x,)))
    assert result.report.applied == {"double_negation": 1}
    assert result.exported_program is not None
    result.exported_program.validate()
    torch.testing.assert_close(result.exported_program.module()(x), torch.sin(x))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled):
    import gc

    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with registered(SineToCosine("collected")):
            fxpasses.optimize(torch.fx.symbolic_trace(lambda x: torch.sin(x)), (torch.randn(3),))
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
