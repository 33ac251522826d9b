"""The registry: names, order, selection, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import RULE, image, pair
from rules import SineToCosine, registered
from torch import nn

import fxpasses
from fxpasses.errors import UnknownRuleError
from fxpasses.options import Options
from fxpasses.rewrite.registry import Registry, RulePass


def registry(*rules: SineToCosine | RulePass) -> Registry:
    result = Registry()
    for rule in rules:
        result.register(rule)
    return result


def order(given: Registry, **options: object) -> list[str]:
    return [pass_.name for pass_ in given.pipeline(Options.of(options))]


@pytest.mark.parametrize("permutation", list(itertools.permutations("abcd")), ids="".join)
def test_what_must_come_after_comes_after_whatever_the_order_of_registration(
    permutation: tuple[str, ...],
) -> None:
    after = {"a": ("b", "d"), "b": ("c",), "c": (), "d": ("c",)}
    found = order(registry(*(SineToCosine(name, after[name]) for name in permutation)))
    for name, earlier in after.items():
        assert all(found.index(other) < found.index(name) for other in earlier)


def test_without_requirements_the_order_is_that_of_registration() -> None:
    assert order(registry(*(SineToCosine(name) for name in "zax"))) == ["z", "a", "x"]


def test_a_requirement_that_does_not_run_is_no_requirement() -> None:
    assert order(registry(SineToCosine("a", after=("missing",)))) == ["a"]


def test_a_cycle_is_refused_and_nothing_is_registered() -> None:
    given = registry(SineToCosine("a", after=("b",)))
    with pytest.raises(UnknownRuleError, match=r"cannot be ordered.*(a -> b|b -> a)"):
        given.register(SineToCosine("b", after=("a",)))
    assert given.names() == ["a"]
    given.register(SineToCosine("b"))
    assert order(given) == ["b", "a"]


def test_a_rule_that_must_come_after_itself_is_refused() -> None:
    with pytest.raises(UnknownRuleError, match="cannot be ordered"):
        registry(SineToCosine("a", after=("a",)))


def test_a_name_is_taken_once() -> None:
    given = registry(RulePass("group", (SineToCosine("inner"),)))
    for name in ("group", "inner"):
        with pytest.raises(UnknownRuleError, match=f"{name}: registered already"):
            given.register(SineToCosine(name))
    assert given.names() == ["group", "inner"]
    given.unregister("group")
    given.register(SineToCosine("inner"))
    assert given.names() == ["inner"]


def test_an_unknown_name_is_refused_with_the_closest() -> None:
    given = registry(SineToCosine("sine"), SineToCosine("cosine"))
    for options in ({"passes": ("sinn",)}, {"disable": ("sinn",)}):
        with pytest.raises(UnknownRuleError, match=r"'sinn'.*Did you mean 'sine'"):
            order(given, **options)
    with pytest.raises(UnknownRuleError, match="'sinn'"):
        given.unregister("sinn")


def test_passes_select_and_disable_removes() -> None:
    given = registry(SineToCosine("a"), SineToCosine("b"), SineToCosine("c", default=False))
    assert order(given) == ["a", "b"]
    assert order(given, passes=("c", "a")) == ["a", "c"]
    assert order(given, disable=("a",)) == ["b"]
    assert order(given, passes=("a", "b"), disable=("b",)) == ["a"]
    assert order(given, passes=()) == []


def test_a_rule_of_a_group_is_selected_and_disabled_by_its_own_name() -> None:
    given = registry(RulePass("group", (SineToCosine("a"), SineToCosine("b"))))

    def rules(**options: object) -> list[str]:
        return [rule.name for pass_ in given.pipeline(Options.of(options)) for rule in pass_.rules]

    assert rules() == rules(passes=("group",)) == ["a", "b"]
    assert rules(passes=("b",)) == ["b"]
    assert rules(disable=("a",)) == ["b"]
    assert rules(disable=("group",)) == rules(disable=("a", "b")) == []


def test_options_reach_the_registry_through_every_door() -> None:
    model, x = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image()
    program = torch.fx.symbolic_trace(model)
    with pytest.raises(UnknownRuleError, match="Did you mean 'efficient_conv_bn_eval'"):
        fxpasses.optimize(program, (x,), {"passes": "efficient_conv_bn"})
    with pytest.raises(UnknownRuleError, match="Did you mean 'efficient_conv_bn_eval'"):
        fxpasses.explain(model, x, options={"disable": ["efficient_conv_bn"]})
    with pytest.raises(Exception, match="Did you mean 'efficient_conv_bn_eval'"):
        torch.compile(model, backend="fxpasses", options={"passes": "efficient_conv_bn"})(x)
    assert fxpasses.reports() == ()
    assert fxpasses.optimize(program, (x,), {"disable": RULE}).report.remarks == ()
    assert fxpasses.optimize(program, (x,), {"passes": RULE}).report.applied == {RULE: 1}


def test_a_registered_rule_runs_everywhere_and_an_unregistered_one_nowhere() -> None:
    program = torch.fx.symbolic_trace(lambda x: torch.sin(x))
    x = image(3)
    with registered(SineToCosine("mine")):
        assert fxpasses.optimize(program, (x,)).report.applied == {"mine": 1}
        with fxpasses.testing.expect(mine=1):
            torch.compile(torch.sin, backend="fxpasses", options={"inner": "eager"})(x)
    assert fxpasses.optimize(program, (x,)).report.remarks == ()
    with pytest.raises(UnknownRuleError, match="mine"), fxpasses.testing.expect(mine=0):
        pass
