"""Gates: what they compute, what makes them fail, and that their text is data."""

from __future__ import annotations

import math

import pytest
from reports import report, timed, two_models

from benchmarks.gates import GateError, parse_gate
from benchmarks.results import VariantResult


@pytest.mark.parametrize(
    ("gate", "figure", "passed"),
    [
        ("geomean(fxpasses/inductor) >= 1", 1.0, True),
        ("min(fxpasses/inductor) >= 0.97", 0.5, False),
        ("min(fxpasses/inductor) >= 0.5", 0.5, True),
        ("max(fxpasses/inductor) > 2", 2.0, False),
        ("max(fxpasses/inductor) <= 2", 2.0, True),
        ("max(saved_bytes(fxpasses/eager)) <= 0.47", 0.5, False),
        ("geomean(saved_bytes(fxpasses/eager)) < 0.36", math.sqrt(0.5 * 0.25), True),
        ("saved_bytes(fxpasses/eager) <= 0.5", 0.5, True),
        ("fxpasses/inductor >= 0.97", 0.5, False),
        ("fxpasses/inductor >= 0.97 for resnet18", 2.0, True),
        ("min( fxpasses / inductor )>=9e-1 for resnet18,resnet50", 0.5, False),
    ],
)
def test_a_gate_computes_its_figure_and_compares_it(gate, figure, passed):
    result = parse_gate(gate).evaluate(two_models())
    assert result.figure == pytest.approx(figure, rel=5e-3)
    assert result.passed is passed


def test_a_gate_says_which_model_is_the_worst():
    low = parse_gate("geomean(fxpasses/inductor) >= 1.7").evaluate(two_models())
    high = parse_gate("max(saved_bytes(fxpasses/eager)) <= 0.47").evaluate(two_models())
    assert "resnet50" in low.reason
    assert "resnet18" in high.reason


def test_names_of_variants_may_hold_colons_semicolons_commas_and_parentheses():
    names = ("fxpasses:weights=cached;layout=auto", "slowed(1.1):inductor", "fxpasses:passes=a,b")
    run = report(m=[timed("inductor", 1.0), *(timed(name, 0.5) for name in names)])
    for name in names:
        result = parse_gate(f"geomean({name}/inductor) >= 1.9").evaluate(run)
        assert result.passed, result.reason


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        ("min(openvino/inductor) >= 1", "'openvino' was not run on resnet18"),
        ("min(fxpasses/inductor) >= 1 for vgg16", "'vgg16' was not run"),
    ],
)
def test_a_gate_on_what_was_not_run_fails_and_says_so(gate, reason):
    result = parse_gate(gate).evaluate(two_models())
    assert not result.passed
    assert result.figure is None
    assert reason in result.reason


@pytest.mark.parametrize("status", ["wrong", "failed"])
@pytest.mark.parametrize("gate", ["min(fxpasses/inductor) >= 0", "max(saved_bytes(fxpasses/inductor)) <= 9"])
def test_a_gate_on_a_wrong_or_failed_variant_fails_with_that_reason(gate, status):
    broken = VariantResult("fxpasses", status, "output 0: error 1e+0", saved_bytes=1)
    run = report(m=[timed("inductor", 1.0, saved_bytes=10), broken])
    result = parse_gate(gate).evaluate(run)
    assert not result.passed
    assert f"is {status}: output 0" in result.reason


def test_a_gate_on_bytes_fails_where_nothing_is_saved():
    run = report(m=[timed("inductor", 1.0), timed("fxpasses", 1.0)])
    result = parse_gate("saved_bytes(fxpasses/inductor) <= 1").evaluate(run)
    assert not result.passed
    assert "no backward" in result.reason


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fxpasses/inductor",
        "fxpasses >= 1",
        "geomean(fxpasses) >= 1",
        "median(fxpasses/inductor) >= 1",
        "geomean(a/b/c) >= 1",
        "geomean(a/b) == 1",
        "geomean(a/b) >= one",
        "geomean(a/b) >= 1e999",
        "geomean(saved_bytes(a/b) >= 1",
        "__import__('os').system('true') >= 1",
    ],
)
def test_what_is_no_gate_is_refused_with_an_example(text):
    with pytest.raises(GateError, match="gate"):
        parse_gate(text)
