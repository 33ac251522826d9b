"""Gates: what they compute, what makes them fail, and that their text is data."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from benchmarks.models.gates import GateError, parse_gate
from benchmarks.models.reporting import print_gates
from benchmarks.models.results import GateResult, VariantResult
from tests.benchmarks.reports import report, timed, two_models


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
        # resnet18: eager 3, inductor 2, fxpasses 1; resnet50: eager 3, inductor 1, fxpasses 2.
        ("max(eager/inductor|fxpasses) <= 0.4", 1 / 3, True),
        ("min(inductor / eager | fxpasses) >= 0.5 for resnet18", 0.5, True),
        ("fxpasses/eager|inductor >= 2 for resnet18", 2.0, True),
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


def test_the_interval_is_that_of_the_models_that_the_figure_is_of():
    run = two_models()
    mean = parse_gate("geomean(fxpasses/inductor) >= 1").evaluate(run)
    expected = run.geometric_mean("fxpasses", "inductor")
    assert (mean.low, mean.high) == (expected.low, expected.high)
    for aggregate, place in (("min", 1), ("max", 0)):
        for operator in ("<=", ">="):
            result = parse_gate(f"{aggregate}(fxpasses/inductor) {operator} 1").evaluate(run)
            of_one = run.models[place].ratio("fxpasses", "inductor")
            assert (result.low, result.high) == (of_one.low, of_one.high)
            assert of_one.low <= result.figure <= of_one.high


def test_bytes_and_few_rounds_have_no_interval():
    of_bytes = parse_gate("saved_bytes(fxpasses/eager) <= 1").evaluate(two_models())
    few = report(m=[timed("inductor", 1.0, rounds=3), timed("fxpasses", 1.0, rounds=3)])
    of_few = parse_gate("fxpasses/inductor >= 0.9").evaluate(few)
    for result in (of_bytes, of_few):
        assert result.figure is not None
        assert (result.low, result.high) == (None, None)


def test_a_gate_is_printed_with_its_figure_and_interval():
    output = io.StringIO()
    result = GateResult("a/b >= 1", 1.25, True, "worst: m with 1.250", 1.2, 1.3)
    missing = GateResult("a/c >= 1", None, False, "variant 'c' was not run on m")
    print_gates((result, missing), Console(file=output, width=160))
    assert output.getvalue().splitlines() == [
        "PASS a/b >= 1: 1.2500 [1.2000, 1.3000] (worst: m with 1.250)",
        "FAIL a/c >= 1: no figure (variant 'c' was not run on m)",
    ]


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
        "geomean(saved_bytes(a/b|c)) >= 1",
        "geomean(a/b|) >= 1",
        "geomean(a|b/c) >= 1",
        "__import__('os').system('true') >= 1",
    ],
)
def test_what_is_no_gate_is_refused_with_an_example(text):
    with pytest.raises(GateError, match="gate"):
        parse_gate(text)
