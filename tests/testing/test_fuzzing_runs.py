"""`fuzz` with a budget of time, and with a corpus that is kept between runs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import strategies
from torch import nn

from fxpasses.rewrite.declarative_rule import DeclarativeRule
from fxpasses.testing import Specimen, fuzz


class Power(nn.Module):
    def forward(self, x):
        return x * x


SQUARE = DeclarativeRule("square", lambda x: x * x, lambda x: x.pow(2), (torch.randn(3),))
WRONG = DeclarativeRule("square", lambda x: x * x, lambda x: x.abs() * x.clamp(min=-1), (torch.randn(3),))
"""Right for numbers that are not negative."""


class Drawn:
    """Specimens of one number each, which are remembered."""

    def __init__(self, least=-1000):
        self.numbers = []
        self.strategy = strategies.integers(least, 1000).map(self._specimen)

    def _specimen(self, number):
        self.numbers.append(number)
        return Specimen(str(number), Power(), (torch.tensor([float(number)], dtype=torch.float64),), count=1)


@pytest.fixture
def clock(monkeypatch):
    """A clock that a check moves on by a second; how many checks there were at each level."""
    levels = Counter()

    def checked(rule, specimen, level):
        levels[level] += 1

    monkeypatch.setattr("fxpasses.testing.fuzzing.check_specimen", checked)
    monkeypatch.setattr("fxpasses.testing.fuzzing.time.monotonic", lambda: float(levels.total()))
    return levels


def test_the_time_is_for_all_levels_in_turns(clock):
    assert fuzz(SQUARE, Drawn().strategy, seconds=60, levels=["torch", "export"]) == 60
    assert clock.total() == 60
    assert min(clock.values()) >= 20


def test_without_time_nothing_is_checked_and_with_plenty_as_much_as_asked_for(clock):
    assert fuzz(SQUARE, Drawn().strategy, seconds=0) == 0
    found = fuzz(SQUARE, Drawn().strategy, seconds=10_000, examples=10, levels=["torch", "export"])
    assert found == 20
    assert clock == {"torch": 10, "export": 10}


def test_a_turn_draws_other_models_than_the_one_before(clock):
    drawn = Drawn()
    assert fuzz(SQUARE, drawn.strategy, seconds=100, levels=["torch"]) == 100
    assert len(set(drawn.numbers)) > 50


@pytest.mark.full
def test_what_fails_within_the_time_is_made_simpler_beyond_it(monkeypatch):
    def run(seconds):
        drawn = Drawn()
        monkeypatch.setattr("fxpasses.testing.fuzzing.time.monotonic", lambda: float(len(drawn.numbers)))
        with pytest.raises(AssertionError, match="-1 at symbolic_trace"):
            fuzz(WRONG, drawn.strategy, seconds=seconds, levels=["symbolic_trace"])
        return drawn.numbers

    numbers = run(10_000)
    until_it_fails = next(at for at, number in enumerate(numbers, start=1) if number < 0)
    assert run(until_it_fails + 0.5) == numbers
    assert len(numbers) > until_it_fails + 1


@pytest.mark.full
def test_the_same_seed_gives_the_same_models_and_other_ones_with_a_corpus(tmp_path):
    def drawn(**given):
        found = Drawn(least=0)
        assert fuzz(WRONG, found.strategy, examples=8, levels=["symbolic_trace"], **given) == 8
        return found.numbers

    assert drawn() == drawn()
    first, second = drawn(corpus=tmp_path), drawn(corpus=tmp_path)
    assert first == drawn()
    assert len(set(second) - set(first)) >= 4
    assert drawn(corpus=tmp_path / "another") == first


def test_a_model_that_failed_comes_first_in_the_next_run_until_it_passes(tmp_path):
    def run(rule):
        drawn = Drawn()
        try:
            fuzz(rule, drawn.strategy, examples=20, levels=["symbolic_trace"], corpus=tmp_path)
        except AssertionError as error:
            return drawn.numbers, str(error)
        return drawn.numbers, ""

    def kept():
        return [path for path in (tmp_path / "square" / "symbolic_trace").rglob("*") if path.is_file()]

    numbers, error = run(WRONG)
    assert numbers[0] != -1, "the first model of a run is not the one that fails"
    assert "-1 at symbolic_trace" in error
    assert kept()
    again, error = run(WRONG)
    assert again[0] == -1
    assert "-1 at symbolic_trace" in error
    repaired, error = run(SQUARE)
    assert (repaired[0], error) == (-1, "")
    assert run(SQUARE)[0][0] != -1


def test_a_corpus_is_of_one_rule_and_one_level(tmp_path):
    with pytest.raises(AssertionError):
        fuzz(WRONG, Drawn().strategy, levels=["symbolic_trace"], corpus=tmp_path)
    for name, level in (("another", "symbolic_trace"), ("square", "pre_dispatch")):
        rule = DeclarativeRule(name, SQUARE.pattern, SQUARE.replacement, (torch.randn(3),))
        drawn = Drawn()
        fuzz(rule, drawn.strategy, examples=3, levels=[level], corpus=tmp_path)
        assert drawn.numbers[0] != -1
