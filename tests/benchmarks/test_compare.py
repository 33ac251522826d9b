"""Two result files: what is a regression, what is noise, and what cannot be compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.models.results import ResultsError, VariantResult, load_report, save_report
from benchmarks.shared.statistics import Ratio
from tests.benchmarks.reports import report, timed, two_models


def run(tmp_path: Path, before, after, *arguments: str) -> int:
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for found, path in zip((before, after), paths, strict=True):
        save_report(found, path)
    return compare.main([str(paths[0]), str(paths[1]), *arguments])


def test_a_report_survives_being_written_and_read(tmp_path):
    path = tmp_path / "report.json"
    save_report(two_models(), path)
    assert load_report(path) == two_models()


def test_the_same_file_twice_has_no_regression(tmp_path, capsys):
    assert run(tmp_path, two_models(), two_models()) == 0
    assert "0 regressions" in capsys.readouterr().out


def test_a_slower_variant_is_a_regression_and_a_faster_one_is_not(tmp_path):
    fast, slow = report(m=[timed("inductor", 1.0)]), report(m=[timed("inductor", 1.2)])
    assert run(tmp_path, fast, slow) == 1
    assert run(tmp_path, slow, fast) == 0


def test_a_slowdown_below_the_threshold_is_no_regression(tmp_path):
    before, after = report(m=[timed("inductor", 1.0)]), report(m=[timed("inductor", 1.05)])
    assert run(tmp_path, before, after, "--threshold", "0.1") == 0
    assert run(tmp_path, before, after, "--threshold", "0.03") == 1


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.80, 0.90, "regression"),
        (0.80, 0.98, "inconclusive"),
        (0.98, 1.02, "unchanged"),
        (0.90, 1.20, "inconclusive"),
        (1.05, 1.20, "improvement"),
        (None, None, "inconclusive"),
    ],
)
def test_only_an_interval_that_lies_beyond_the_threshold_as_a_whole_is_a_change(low, high, verdict):
    assert compare.judge(Ratio(1.0, low, high, 20), 0.03) == verdict


def test_too_few_rounds_are_inconclusive_even_for_a_factor_of_two(tmp_path):
    before = report(m=[timed("inductor", 1.0, rounds=3)])
    after = report(m=[timed("inductor", 2.0, rounds=3)])
    assert [change.verdict for change in compare.compare_reports(before, after, 0.03)] == ["inconclusive"]


def test_a_slower_machine_cancels_relative_to_a_variant_of_both():
    before = report(m=[timed("eager", 1.0), timed("inductor", 0.5)])
    after = report(m=[timed("eager", 2.0), timed("inductor", 1.0)])
    plain = {change.variant: change.verdict for change in compare.compare_reports(before, after, 0.03)}
    relative = compare.compare_reports(before, after, 0.03, relative_to="eager")
    assert plain == {"eager": "regression", "inductor": "regression"}
    assert [(change.variant, change.verdict) for change in relative] == [("inductor", "unchanged")]


def test_more_bytes_saved_for_backward_are_a_regression():
    before = report(m=[timed("inductor", 1.0, saved_bytes=100)])
    after = report(m=[timed("inductor", 1.0, saved_bytes=150)])
    verdicts = {change.quantity: change.verdict for change in compare.compare_reports(before, after, 0.03)}
    assert verdicts == {"time": "unchanged", "saved bytes": "regression"}


def test_a_variant_that_became_wrong_is_a_regression():
    before = report(m=[timed("inductor", 1.0), timed("fxpasses", 1.0)])
    after = report(m=[timed("inductor", 1.0), VariantResult("fxpasses", "wrong", "output 0: error 1")])
    changes = {change.variant: change for change in compare.compare_reports(before, after, 0.03)}
    assert changes["inductor"].verdict == "unchanged"
    assert changes["fxpasses"].verdict == "regression"
    assert "output 0" in changes["fxpasses"].note


def test_what_only_one_file_has_is_listed_and_no_regression():
    before = report(m=[timed("inductor", 1.0), timed("eager", 1.0)], only_before=[timed("inductor", 1.0)])
    after = report(m=[timed("inductor", 1.0)])
    changes = [
        (change.model, change.variant, change.verdict)
        for change in compare.compare_reports(before, after, 0.03)
    ]
    assert changes == [
        ("m", "inductor", "unchanged"),
        ("m", "eager", "not compared"),
        ("only_before", "", "not compared"),
    ]


def test_runs_of_different_cases_are_refused(tmp_path, capsys):
    other = replace(two_models(), settings={**two_models().settings, "batch": 16})
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, two_models(), other)
    assert exit_.value.code == 2
    assert "batch is 8 against 16" in capsys.readouterr().err


def test_files_with_nothing_in_common_are_refused():
    with pytest.raises(ResultsError, match="in common"):
        compare.compare_reports(report(a=[timed("eager", 1.0)]), report(b=[timed("eager", 1.0)]), 0.03)


def test_another_machine_is_mentioned(tmp_path, capsys):
    other = replace(two_models(), environment={**two_models().environment, "physical_cores": 64})
    run(tmp_path, two_models(), other)
    assert "different machines: physical_cores: 2 against 64" in capsys.readouterr().out


def corrupt(text: str, **changes: object) -> str:
    return json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda text: text[: len(text) // 2], "is not JSON"),
        (lambda text: "[]", "no field 'schema'"),
        (lambda text: corrupt(text, schema=99), "schema 99"),
        (lambda text: corrupt(text, kind="tensor_layout"), "tensor_layout"),
        (lambda text: corrupt(text, results=[{"model": "m"}]), "missing or of the wrong type"),
        (lambda text: corrupt(text, results=7), "missing or of the wrong type"),
        (lambda text: text.replace('"status": "ok"', '"status": "fine"'), "'fine' is unknown"),
        (lambda text: text.replace('"seconds": [', '"seconds": [-1.0,'), "not all positive"),
    ],
)
def test_a_corrupt_file_or_another_schema_is_one_clear_error(tmp_path, make, message):
    path = tmp_path / "report.json"
    save_report(two_models(), path)
    path.write_text(make(path.read_text()))
    with pytest.raises(ResultsError, match=message):
        load_report(path)


def test_a_missing_file_ends_the_command_with_status_two(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        compare.main([str(tmp_path / "none.json"), str(tmp_path / "none.json")])
    assert exit_.value.code == 2
    assert "cannot be read" in capsys.readouterr().err
