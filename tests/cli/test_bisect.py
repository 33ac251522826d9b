"""`fxpasses bisect`: the one rewrite that breaks a check, in at most log2(n) + 2 runs."""

from __future__ import annotations

import math
import sys

import pytest

from fxpasses.cli.bisection import bisect, smallest_failing
from fxpasses.cli.main import main
from fxpasses.errors import BisectError, UnknownOptionError

CHECK = """
import sys, torch, fxpasses
from tests.rewrite.planted import SoftmaxRule, along_wrong_axis, by_hand

seen = 0

def write(rule, node, build):
    global seen
    seen += 1
    return (along_wrong_axis if seen == {wrong} else by_hand)(rule, node, build)

fxpasses.register(SoftmaxRule(write))

def model(x):
    for _ in range({sites}):
        x = torch.softmax(x + 1, 1)
    return x

x = torch.linspace(0, 1, 16).reshape(4, 4)
options = {{"passes": "softmax_rule", "inner": "eager"}}
found = torch.compile(model, backend="fxpasses", options=options)(x)
sys.exit(0 if torch.allclose(found, model(x)) else 1)
"""


def command(sites, wrong, tmp_path):
    script = tmp_path / "check.py"
    script.write_text(CHECK.format(sites=sites, wrong=wrong))
    return [sys.executable, str(script)]


@pytest.fixture(autouse=True)
def _importable(monkeypatch, request):
    import fxpasses

    root = str(request.config.rootpath)
    assert fxpasses.__file__.startswith(root)
    monkeypatch.setenv("PYTHONPATH", root)


def test_the_culprit_is_found_with_its_remark_and_its_file(tmp_path):
    found = bisect(command(1, 1, tmp_path), tmp_path / "repros")
    assert (found.number, found.total) == (1, 1)
    assert found.runs <= 2
    assert found.remark.rule == "softmax_rule"
    assert found.remark.location.endswith("check.py:16")
    assert found.repro is not None
    assert "torch.sum" in found.repro.read_text()


@pytest.mark.full
def test_a_command_that_succeeds_has_no_culprit(tmp_path, capsys):
    assert main(["bisect", "--", *command(2, 99, tmp_path)]) == 2
    assert "nothing to find" in capsys.readouterr().err


def test_a_command_that_fails_anyway_has_no_culprit():
    with pytest.raises(BisectError, match="no rewrite was applied"):
        bisect([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_command_that_does_not_exist_is_said():
    with pytest.raises(BisectError, match="cannot be run"):
        bisect(["./no-such-command"])


@pytest.mark.parametrize("total", [1, 2, 3, 7, 8, 9, 53, 1000])
def test_the_search_finds_every_culprit_in_time(total):
    for culprit in {0, 1, 2, total // 2, total - 1, total} - {-1}:
        if culprit > total:
            continue
        asked = []

        def fails(limit, culprit=culprit, asked=asked):
            asked.append(limit)
            return limit >= culprit

        assert smallest_failing(fails, total) == culprit
        # One more run, the unlimited one, comes before the search.
        assert len(asked) + 1 <= math.log2(total) + 2


def test_a_limit_that_is_no_number_is_refused(monkeypatch):
    import torch

    import fxpasses
    from tests.rewrite.planted import SoftmaxRule, by_hand, registered

    monkeypatch.setenv("FXPASSES_LIMIT", "many")
    with registered(SoftmaxRule(by_hand)), pytest.raises(UnknownOptionError, match="FXPASSES_LIMIT takes"):
        fxpasses.explain(lambda x: torch.softmax(x, 1), torch.randn(2, 2), options={"passes": "softmax_rule"})
