"""How long the first answer takes: of processes of their own, cold and then warm."""

from __future__ import annotations

import pytest

from benchmarks import startup
from benchmarks.models.messages import Prepared
from benchmarks.models.workers import WorkerError
from benchmarks.startup import main
from tests.benchmarks.refusals import refusal

TINY = "tests.benchmarks.tiny_models:tiny"


def told(monkeypatch, capsys, answers, *arguments):
    """What is printed where a process answers as `answers` says, by variant and state."""
    seen = []

    def answer(case, variant, folder):
        state = "warm" if (variant.name, folder) in seen else "cold"
        seen.append((variant.name, folder))
        found = answers[variant.name, state]
        if isinstance(found, Exception):
            raise found
        return found, found.compile_seconds + 2

    monkeypatch.setattr(startup, "answer", answer)
    assert main(["--models", "some", "--repeats", "2", *arguments]) == 0
    return capsys.readouterr().out


def test_medians_and_ratios_to_the_first_variant(monkeypatch, capsys):
    answers = {
        ("inductor", "cold"): Prepared(10.0, generated=1),
        ("inductor", "warm"): Prepared(2.0),
        ("fxpasses", "cold"): Prepared(15.0, generated=1),
        ("fxpasses", "warm"): Prepared(3.0, generated=1),
    }
    printed = told(monkeypatch, capsys, answers, "--variants", "inductor,fxpasses")
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if "." in line}
    assert rows["inductor"] == ["10.0", "1.00", "12.0", "2.0", "1.00", "4.0", "0"]
    assert rows["fxpasses"] == ["15.0", "1.50", "17.0", "3.0", "1.50", "5.0", "2"]


def test_a_variant_that_fails_says_why_and_the_others_are_measured(monkeypatch, capsys):
    answers = {
        ("inductor", "cold"): Prepared(10.0),
        ("inductor", "warm"): Prepared(2.0),
        ("fxpasses", "cold"): WorkerError("it does not compile"),
    }
    printed = told(monkeypatch, capsys, answers, "--variants", "inductor,fxpasses")
    assert "it does not compile" in printed
    assert "10.0" in printed


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--repeats", "0"], "measures nothing"),
        (["--variants", "tensorrt"], "tensorrt"),
        (["--batch", "0"], "at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, reason, capsys):
    assert reason in refusal(main, arguments, capsys)


@pytest.mark.full
@pytest.mark.timed
def test_a_warm_process_with_cached_weights_generates_no_code(capsys):
    variants = "inductor,fxpasses:weights=cached"
    assert main(["--models", TINY, "--variants", variants, "--repeats", "1", "--size", "32"]) == 0
    rows = [
        line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("fxpasses")
    ]
    assert [row[-1] for row in rows] == ["0"]
