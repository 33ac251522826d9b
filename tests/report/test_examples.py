"""Examples of reason codes are true: declined as they stand, rewritten after the edit, wrong when forced."""

from __future__ import annotations

import itertools
import sys
import types
from typing import Any

import pytest
import torch

import fxpasses
from fxpasses.report.codes import CODES
from fxpasses.report.examples import EXAMPLES, PRELUDE, Example
from fxpasses.rewrite.registry import REGISTRY

_COUNT = itertools.count()
"""Dynamo remembers modules by name."""

NUMBERED = [code for code, example in EXAMPLES.items() if example.number is not None]


WITHOUT = {
    *("no-statistics", "non-constant", "other-arguments", "another-result", "symbolic-channels"),
    *("no-metadata", "stream", "extra-check", "handler", "symbolic-strides", "shared-results"),
    *("unsafe-kernel", "not-certain", "shared-storage", "no-plan", "no-record", "unpackable"),
    *("other-kernels", "other-reader", "inputs-changed", "no-kernels", "live-bias", "not-faster"),
    *("dropped", "not-compiled", "taken-over", "sizes", "unrestorable-strides"),
}
"""Codes that have no example: most are told of by a compilation alone, and not by a dry run."""


def test_every_other_code_has_an_example():
    assert set(CODES) - set(EXAMPLES) == WITHOUT


@pytest.fixture(autouse=True)
def own_rules():
    """Takes out again what an example registers."""
    names = set(REGISTRY.names())
    yield
    for name in set(REGISTRY.names()) - names:
        if name == "example":
            fxpasses.unregister(name)


def built(source: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """What a source defines, as a module that Dynamo can import."""
    torch.compiler.reset()
    module = types.ModuleType(f"an_example_{next(_COUNT)}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(PRELUDE + source, vars(module))
    if hasattr(module, "rule") and "example" not in REGISTRY.names():
        fxpasses.register(module.rule)
    return module


def explained(
    example: Example, source: str, options: Any, monkeypatch: pytest.MonkeyPatch
) -> fxpasses.Report:
    module = built(source, monkeypatch)
    with torch.set_grad_enabled(example.grad):
        module.model(module.x)  # it runs
        return fxpasses.explain(module.model, module.x, options=options)


@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_is_declined_with_its_code_as_it_stands(code, monkeypatch):
    example = EXAMPLES[code]
    report = explained(example, example.source, example.options, monkeypatch)
    assert code in {remark.code for remark in report.declined if remark.rule == example.rule}, report.remarks
    assert code in CODES


@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_is_rewritten_after_the_edit(code, monkeypatch):
    example = EXAMPLES[code]
    options = example.options if example.options_after is None else example.options_after
    assert (example.edited != example.source) or options != example.options
    report = explained(example, example.edited, options, monkeypatch)
    assert report.applied.get(example.rule) or report.kept_tensors, report.remarks
    assert code not in {remark.code for remark in report.remarks if remark.rule == example.rule}


@pytest.mark.parametrize("code", NUMBERED)
def test_an_example_with_a_number_is_wrong_by_it_when_the_refusal_is_overridden(code, monkeypatch):
    example = EXAMPLES[code]
    module, number = built(example.source, monkeypatch), example.number
    with torch.set_grad_enabled(example.grad):
        assert float(eval(number.expression, vars(module))) == pytest.approx(float(number.eager), nan_ok=True)
        rules = [rule for group in REGISTRY.pipeline(fxpasses.Options()) for rule in group.rules]
        (rule,) = [rule for rule in rules if rule.name == example.rule]
        monkeypatch.setattr(type(rule), "legality", lambda self, match: None)
        monkeypatch.setattr(type(rule), "insertion_point", lambda self, match: match.result)
        options = {**example.options, "inner": "eager", "passes": example.rule}
        forced = torch.compile(module.model, backend="fxpasses", options=options)
        module.model = forced
        assert float(eval(number.expression, vars(module))) == pytest.approx(
            float(number.rewritten), nan_ok=True
        )
    assert fxpasses.last_report().applied == {example.rule: 1}
