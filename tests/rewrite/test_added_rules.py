"""Rules of one compilation, `options={"rules": [...]}`: they run in it, in order, and nowhere else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers import RULE, image, pair
from rules import SineToCosine, registered
from torch import nn
from torch._dynamo.utils import counters

import fxpasses
from fxpasses.backend.compilation import Compilation
from fxpasses.backend.racing import _key
from fxpasses.errors import UnknownOptionError, UnknownRuleError
from fxpasses.options import Options
from fxpasses.pipeline import register_all
from fxpasses.report.report import Report
from fxpasses.rewrite import limits
from fxpasses.rewrite.declarative_rule import DeclarativeRule
from fxpasses.rewrite.limits import FILE, LIMIT, ProcessLimit
from fxpasses.rewrite.registry import REGISTRY, pipeline_key
from fxpasses.testing import (
    LEVELS,
    Specimen,
    assert_declines,
    assert_rewrites,
    check_specimen,
    expect,
    fuzz,
    matrix,
    rewrite_at,
)

X = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
EAGER = {"inner": "eager"}


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(x)


class Negated(nn.Module):
    def forward(self, x):
        return x.exp().neg().neg()


def negation(name="negation", **given):
    return DeclarativeRule(
        name, lambda x: torch.neg(torch.neg(x)), lambda x: x, (torch.randn(2, 3),), **given
    )


def ran(options):
    """The names of the passes that ran over a graph, in order."""
    return list(fxpasses.optimize(torch.fx.symbolic_trace(Sine()), (X,), options).report.seconds)


# Where they run --------------------------------------------------------------------------------------------


def test_every_door_takes_them():
    given = {"rules": [SineToCosine()]}
    optimized = fxpasses.optimize(torch.fx.symbolic_trace(Sine()), (X,), given)
    assert optimized.report.applied == {"sine_to_cosine": 1}
    assert torch.equal(optimized.graph_module(X), X.cos())
    assert fxpasses.explain(Sine(), X, options=given).applied == {"sine_to_cosine": 1}
    program = fxpasses.optimize(torch.export.export(Negated(), (X,)), options={"rules": negation()})
    assert program.report.applied == {"negation": 1}
    assert torch.equal(program.exported_program.module()(X), X.exp())
    assert torch.equal(torch.compile(Sine(), backend="fxpasses", options={**given, **EAGER})(X), X.cos())
    assert fxpasses.last_report().applied == {"sine_to_cosine": 1}


def test_one_may_be_given_without_a_list_and_a_pass_too():
    seen = []
    look = fxpasses.GraphPass("look", lambda context, _: seen.append(context) or fxpasses.Outcome())
    group = fxpasses.RulePass("group", (SineToCosine("inner"),))
    assert fxpasses.explain(Sine(), X, options={"rules": SineToCosine()}).applied == {"sine_to_cosine": 1}
    assert fxpasses.explain(Sine(), X, options={"rules": (look, group)}).applied == {"inner": 1}
    assert len(seen) == 1


def test_compilations_of_one_function_never_see_each_other_s_rules():
    def function(x):
        return torch.sin(x)

    def compiled(*rules):
        return torch.compile(function, backend="fxpasses", options={"rules": rules, **EAGER})

    plain, first, second = compiled(), compiled(SineToCosine("first")), compiled(negation("second"))
    for program, expected, applied in (
        (first, X.cos(), {"first": 1}),
        (plain, X.sin(), {}),
        (second, X.sin(), {}),
        (compiled(SineToCosine("first")), X.cos(), {"first": 1}),
    ):
        assert torch.equal(program(X), expected)
        assert fxpasses.last_report().applied == applied
    assert torch.equal(first(X), X.cos())
    assert {"first", "second"}.isdisjoint(REGISTRY.names())


def test_the_kit_takes_rules_that_are_not_registered():
    x = X.clone().requires_grad_()
    options = {"rules": [negation()], "inner": "aot_eager"}

    def thrice(x):
        once = -x.exp()
        return -once + once

    assert_rewrites(Negated(), (x,), {"negation": 1}, options=options)
    assert_declines(thrice, (x,), "negation", code="multiple-users", options=options)
    for level in LEVELS:
        assert rewrite_at(level, Negated(), (X,), {"rules": negation()}).report.applied == {"negation": 1}
    assert matrix(negation(), {"operator": (Negated(), (X,))}).complete
    assert check_specimen(negation(), Specimen("twice", Negated(), (X,), count=1), "export").applied
    assert fuzz(negation(), examples=3, levels=["torch", "export"]) >= 6
    assert "negation" not in REGISTRY.names()


def test_expect_knows_them_once_they_were_compiled_with():
    options = {"rules": [negation()], **EAGER}
    with expect(negation=0):
        torch.compile(Sine(), backend="fxpasses", options=options)(X)
    with pytest.raises(UnknownRuleError, match="Did you mean 'negation'"), expect(negatio=0):
        torch.compile(Sine(), backend="fxpasses", options=options, dynamic=True)(X)
    with pytest.raises(UnknownRuleError, match="negation"), expect(negation=0):
        pass


def test_the_report_names_the_rules_that_ran_and_keeps_that_in_json():
    report = fxpasses.explain(Sine(), X, options={"rules": [negation()], "disable": RULE})
    assert "negation" in report.rules
    assert RULE not in report.rules
    assert Report.from_json(report.to_json()) == report
    assert Report.merge([report, fxpasses.explain(Sine(), X)]).rules[-1] == RULE


# Order and selection ---------------------------------------------------------------------------------------


def test_they_run_in_the_order_given_after_registered_ones_and_before_layout():
    with registered(SineToCosine("mine")):
        given = {"rules": [SineToCosine("z"), SineToCosine("a")], "layout": "channels_last"}
        found = ran(given)
        assert found[-4:] == ["mine", "z", "a", "layout"]
        assert ran({**given, "rules": [SineToCosine("z", after=("a",)), SineToCosine("a")]})[-3:-1] == [
            "a",
            "z",
        ]


def test_what_is_registered_before_anything_ran_comes_after_what_comes_with_the_package():
    registry = type(REGISTRY)()
    registry.register(SineToCosine("mine"))
    registry.register(SineToCosine("ours"), "fxpasses")
    registry.register(SineToCosine("theirs"), "a-package 1.0")
    assert registry.names() == ["ours", "theirs", "mine"]
    assert [registry.source(name) for name in registry.names()] == ["fxpasses", "a-package 1.0", "registered"]


def test_one_that_must_come_after_layout_does():
    look = fxpasses.GraphPass("look", lambda *_: fxpasses.Outcome(), after=("layout",))
    assert ran({"rules": [look, SineToCosine()]})[-3:] == ["sine_to_cosine", "layout", "look"]


def test_passes_disable_limit_and_verify_go_for_them():
    given = {"rules": [SineToCosine("one"), negation()]}
    assert ran({**given, "passes": "negation"}) == ["negation"]
    assert ran({**given, "passes": RULE}) == [RULE]
    assert ran({**given, "passes": ()}) == []
    assert "one" not in ran({**given, "disable": "one"})

    def function(x):
        return torch.sin(x) + torch.sin(x + 1)

    report = fxpasses.explain(function, X, options={**given, "limit": 1})
    assert [remark.code for remark in report.remarks if remark.rule == "one"] == ["applied", "limit"]
    checked = fxpasses.explain(function, X, options={**given, "verify": "numerics"})
    assert {remark.code for remark in checked.remarks if remark.rule == "one"} == {"verify-numerics"}


def test_they_run_even_if_they_are_no_default():
    rule = SineToCosine("one", default=False)
    assert "one" in ran({"rules": rule})
    assert "one" not in ran({"rules": rule, "passes": RULE})
    group = fxpasses.RulePass("group", (SineToCosine("two"),), default=False)
    assert "group" in ran({"rules": group})


def test_the_limits_of_bisection_count_them(monkeypatch, tmp_path):
    monkeypatch.setattr("fxpasses.rewrite.driver.PROCESS", ProcessLimit())
    monkeypatch.setenv(FILE, str(tmp_path / "remarks"))
    monkeypatch.setenv(LIMIT, "1")
    assert limits.PROCESS.limit == 1
    report = fxpasses.explain(lambda x: torch.sin(x) + torch.sin(x + 1), X, options={"rules": SineToCosine()})
    assert [remark.code for remark in report.remarks] == ["applied", "limit"]
    (line,) = (tmp_path / "remarks").read_text().splitlines()
    assert json.loads(line)["rule"] == "sine_to_cosine"


# What is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([SineToCosine(RULE)], f"{RULE}: registered already; .* needs a name of its own"),
        ([fxpasses.RulePass("group", (SineToCosine(RULE),))], f"{RULE}: registered already"),
        ([SineToCosine("a"), SineToCosine("a")], "a: given twice"),
        ([SineToCosine("a", after=("b",)), SineToCosine("b", after=("a",))], "cannot be ordered"),
    ],
)
def test_names_that_clash_and_orders_that_cannot_be_are_refused(rules, message):
    before = REGISTRY.names()
    with pytest.raises(UnknownRuleError, match=message):
        fxpasses.explain(Sine(), X, options={"rules": rules})
    assert REGISTRY.names() == before
    assert fxpasses.explain(Sine(), X).applied == {}


def test_what_is_no_rule_is_refused():
    with pytest.raises(UnknownOptionError, match=r"not their classes: write SineToCosine\(\.\.\.\)"):
        Options(rules=[SineToCosine])
    with pytest.raises(UnknownOptionError, match=r"takes rules and passes .* got 'sine'"):
        Options(rules="sine")
    with pytest.raises(UnknownOptionError, match=r"takes rules and passes .* got None"):
        Options(rules=None)

    class Lookalike:
        name = "lookalike"

        def uuid(self):
            return ""

    with pytest.raises(UnknownOptionError, match="takes rules and passes"):
        fxpasses.explain(Sine(), X, options={"rules": Lookalike()})
    with pytest.raises(UnknownRuleError, match="'lost'"):
        fxpasses.explain(Sine(), X, options={"disable": "lost", "rules": SineToCosine()})


# Caches ----------------------------------------------------------------------------------------------------


class Tagged(SineToCosine):
    """Writes the same whatever its field says."""

    def __init__(self, field):
        super().__init__("tagged")
        self.field = field


def test_the_rules_are_part_of_a_pipeline_s_key():
    register_all()
    keys = [
        pipeline_key(Options(rules=rules)) for rules in ((), Tagged(1), Tagged(2), (Tagged(1), negation()))
    ]
    assert len(set(keys)) == len(keys)
    assert pipeline_key(Options(rules=Tagged(1))) == keys[1]


def test_a_verdict_of_a_race_is_for_the_rules_that_raced():
    model, x = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image()
    compilation = Compilation(torch.fx.symbolic_trace(model), (x,), Options(race=True))
    register_all()

    def key(**options):
        return _key(replace(compilation, options=Options(**options)))

    plain = key(race=True)
    assert plain == key(tune_seconds=1)
    with registered(Tagged(1)):
        among_others = key()
    assert len({plain, among_others, key(rules=Tagged(1)), key(rules=Tagged(2)), key(profit="always")}) == 5
    assert key(rules=Tagged(1)) == key(rules=Tagged(1))


def test_artifacts_of_inductor_are_of_the_rules_that_made_them(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def found_by(*rules):
        """Whether what was compiled came from a cache."""
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(lambda x: torch.sin(x) * 3, backend="fxpasses", options={"rules": rules})
        torch.testing.assert_close(compiled(X), (X.cos() if rules else X.sin()) * 3)
        aot = counters["aot_autograd"]
        assert aot["autograd_cache_hit"] + aot["autograd_cache_miss"] == 1
        return bool(aot["autograd_cache_hit"])

    assert not found_by(Tagged(1))
    assert found_by(Tagged(1))
    assert not found_by(Tagged(2))
    assert not found_by(Tagged(1), Tagged.__base__("other"))
    assert not found_by()
    assert found_by()
    assert torch.compiler.config.cache_key_tag == ""
