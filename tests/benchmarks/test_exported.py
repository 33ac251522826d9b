"""Packages of AOTInductor, run by a C++ program."""

from __future__ import annotations

import pytest

from benchmarks import exported
from benchmarks.exported import main
from tests.benchmarks.refusals import refusal

TINY = "tests.benchmarks.tiny_models:tiny"


@pytest.mark.parametrize(
    ("arguments", "reason"), [(["--launches", "0"], "at least 1"), (["--model", "timm:nothing"], "nothing")]
)
def test_bad_arguments_are_refused(arguments, reason, capsys):
    assert reason in refusal(main, arguments, capsys)


@pytest.mark.full
@pytest.mark.parametrize("wrong", [False, True])
def test_both_packages_run_in_turns_and_their_results_are_compared(wrong, monkeypatch, capsys):
    original = exported.run
    if wrong:

        def off(runner, package, *given):
            seconds, total = original(runner, package, *given)
            return seconds, total * (2 if package.stem == "baked" else 1)

        monkeypatch.setattr(exported, "run", off)
    assert main(["--model", TINY, "--launches", "2", "--calls", "3"]) == wrong
    printed = capsys.readouterr().out
    assert "2 launches of 3 calls" in printed
    assert ("results differ" in printed) == wrong
