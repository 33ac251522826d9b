"""Callers and updates at once: what is counted, and which answers are wrong."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.serving import main, serve
from tests.benchmarks.refusals import refusal

TINY = "tests.benchmarks.tiny_models:tiny"


def test_answers_of_no_version_are_counted_as_wrong():
    versions = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]
    answers = iter([*versions, torch.tensor([1.0, 6.0])] * 10_000)

    def call():
        time.sleep(1e-3)
        return next(answers)

    served = serve(call, versions, 1, 0.3, None, 1.0)
    assert served.updates == 0
    assert served.wrong == len(served.latencies) // 3
    assert served.wrong > 0
    assert min(served.latencies) >= 1e-3


def test_updates_are_numbered_and_happen_while_others_call():
    numbers = []
    version = torch.ones(1)
    served = serve(lambda: version, [version], 2, 0.5, numbers.append, 0.1)
    assert numbers == list(range(1, served.updates + 1))
    assert 2 <= served.updates <= 5
    assert served.wrong == 0


@pytest.mark.parametrize(
    ("arguments", "reason"), [(["--callers", "0"], "more than 0"), (["--variants", "x"], "x")]
)
def test_bad_arguments_are_refused(arguments, reason, capsys):
    assert reason in refusal(main, arguments, capsys)


@pytest.mark.full
@pytest.mark.timed
def test_cached_weights_mix_no_versions(capsys):
    variant = "fxpasses:weights=cached"
    before = torch.get_num_threads()
    try:
        assert main(["--model", TINY, "--variants", variant, "--seconds", "1", "--every", "0.1"]) == 0
    finally:
        torch.set_num_threads(before)
    rows = [
        line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("fxpasses")
    ]
    assert [row[-1] for row in rows] == ["0", "0"]
    assert int(rows[1][1]) >= 2
