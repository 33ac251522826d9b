"""A rule that goes wrong, in any of its steps, leaves the graph as it was and says `failed`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import image, printed, require_wellformed
from rules import SineToCosine, registered
from torch.fx import GraphModule, Node

import fxpasses
from fxpasses.graph.context import GraphContext
from fxpasses.graph.decline import Decline
from fxpasses.rewrite.builder import Builder
from fxpasses.rewrite.rule import Match


class RaisesInMatch(SineToCosine):
    def match(self, node: Node, context: GraphContext) -> Match | Decline | None:
        raise ZeroDivisionError("match")


class RaisesInLegality(SineToCosine):
    def legality(self, match: Match) -> Decline | None:
        raise ZeroDivisionError("legality")


class RaisesInProfitability(SineToCosine):
    def profitability(self, match: Match) -> Decline | None:
        raise ZeroDivisionError("profitability")


class RaisesInInsertionPoint(SineToCosine):
    def insertion_point(self, match: Match) -> Node:
        raise ZeroDivisionError("insertion point")


class RaisesHalfway(SineToCosine):
    def rewrite(self, match: Match, build: Builder) -> Node:
        half = super().rewrite(match, build)
        build.mul(half, half)
        raise ZeroDivisionError("halfway")


class CallsWhatCannotRun(SineToCosine):
    def rewrite(self, match: Match, build: Builder) -> Node:
        given = super().rewrite(match, build)
        return build.call(torch.mm, (given, given))


class GivesAnotherShape(SineToCosine):
    def rewrite(self, match: Match, build: Builder) -> Node:
        return build.reshape(super().rewrite(match, build), [1, -1])


class GivesAnotherDtype(SineToCosine):
    def rewrite(self, match: Match, build: Builder) -> Node:
        return build.cast(super().rewrite(match, build), torch.float16)


class GivesATuple(SineToCosine):
    def rewrite(self, match: Match, build: Builder) -> Node:
        return build.call(torch.max, (super().rewrite(match, build), 0))


class GivesNothing(SineToCosine):
    def rewrite(self, match: Match, build: Builder) -> Any:
        super().rewrite(match, build)
        return None


class GivesBackTheOriginal(SineToCosine):
    def rewrite(self, match: Match, build: Builder) -> Node:
        super().rewrite(match, build)
        return match.result


class WritesTooEarly(SineToCosine):
    """Stands before the operand that it reads."""

    def insertion_point(self, match: Match) -> Node:
        return next(node for node in match.context.graph.nodes if node.op != "placeholder")


class WritesTooLate(SineToCosine):
    """Stands behind the users of what it replaces."""

    def insertion_point(self, match: Match) -> Node:
        return match.context.graph.output_node()


BROKEN = {
    RaisesInMatch: "check-error",
    RaisesInLegality: "check-error",
    RaisesInProfitability: "check-error",
    RaisesInInsertionPoint: "rewrite-error",
    RaisesHalfway: "rewrite-error",
    CallsWhatCannotRun: "rewrite-error",
    GivesAnotherShape: "rewrite-error",
    GivesAnotherDtype: "rewrite-error",
    GivesATuple: "rewrite-error",
    GivesNothing: "rewrite-error",
    GivesBackTheOriginal: "rewrite-error",
    WritesTooEarly: "rewrite-error",
    WritesTooLate: "rewrite-error",
}


def call(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x * 2) + 1


def optimised(rule: SineToCosine, program: GraphModule) -> fxpasses.Optimized:
    with registered(rule):
        return fxpasses.optimize(program, (image(3),))


@pytest.mark.parametrize("broken", BROKEN, ids=lambda rule: rule.__name__)
def test_a_rule_that_goes_wrong_leaves_the_graph_as_it_was(broken: type[SineToCosine]) -> None:
    program = torch.fx.symbolic_trace(call)
    result = optimised(broken("broken"), program)
    assert [(remark.rule, remark.status, remark.code) for remark in result.report.remarks] == [
        ("broken", "failed", BROKEN[broken])
    ]
    assert result.report.applied == {}
    assert printed(result.graph_module) == printed(program)
    require_wellformed(result.graph_module)
    x = image(3, grad=False)
    assert torch.equal(result.graph_module(x), call(x))


@pytest.mark.parametrize("broken", BROKEN, ids=lambda rule: rule.__name__)
def test_a_rule_that_goes_wrong_does_not_keep_others_from_working(broken: type[SineToCosine]) -> None:
    program = torch.fx.symbolic_trace(call)
    with registered(broken("broken"), SineToCosine("whole", after=("broken",))):
        result = fxpasses.optimize(program, (image(3),))
    assert result.report.applied == {"whole": 1}
    x = image(3, grad=False)
    assert torch.equal(result.graph_module(x), torch.cos(x * 2) + 1)
    require_wellformed(result.graph_module)


def test_the_rule_that_is_not_broken_is_applied() -> None:
    result = optimised(SineToCosine("whole"), torch.fx.symbolic_trace(call))
    assert [remark.status for remark in result.report.remarks] == ["applied"]


def test_a_compilation_survives_a_broken_rule() -> None:
    with registered(RaisesHalfway("broken")):
        found = torch.compile(call, backend="fxpasses", options={"inner": "eager"})(torch.ones(3))
    assert torch.equal(found, call(torch.ones(3)))
    assert [remark.status for remark in fxpasses.last_report().remarks] == ["failed"]
    assert "ZeroDivisionError: halfway" in fxpasses.last_report().remarks[0].message


def test_an_interrupt_is_not_taken_for_a_failure() -> None:
    class Interrupted(SineToCosine):
        def rewrite(self, match: Match, build: Builder) -> Node:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimised(Interrupted("interrupted"), torch.fx.symbolic_trace(call))
