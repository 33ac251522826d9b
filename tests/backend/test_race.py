"""The race: calls in turns, the slower is dropped with all that it holds, and the verdict is kept."""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import fxpasses
from fxpasses.backend import race as races
from fxpasses.backend.race import MOST_CALLS, Race, verdict_of
from fxpasses.devices.own import own_store
from fxpasses.devices.profile import Verdict
from fxpasses.errors import UnknownOptionError
from fxpasses.options import Options


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FXPASSES_PROFILE_DIR", str(tmp_path))
    return tmp_path


class Clock:
    """A clock that programs move on: times are exact, and no test depends on the machine's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(races.time, "perf_counter", lambda: self.now)

    def program(self, name: str, seconds: list[float] | float, calls: list[str]):
        each = iter(seconds) if isinstance(seconds, list) else None

        def run(x: torch.Tensor) -> torch.Tensor:
            calls.append(name)
            self.now += next(each) if each is not None else seconds
            return x + 1

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def raced(clock: Clock, **seconds: list[float] | float) -> tuple[list[str], list[Verdict]]:
    calls: list[str] = []
    verdicts: list[Verdict] = []
    race = Race({name: clock.program(name, of, calls) for name, of in seconds.items()}, verdicts.append)
    x = torch.zeros(2)
    for _ in range(MOST_CALLS + 10):
        assert torch.equal(race(x), x + 1)
    return calls, verdicts


@pytest.mark.parametrize(("ours", "stock"), [(1.0, 1.5), (1.5, 1.0)])
def test_the_faster_stays_after_as_few_calls_as_a_verdict_takes(clock, ours, stock):
    calls, (verdict,) = raced(clock, ours=ours, stock=stock)
    winner = "ours" if ours < stock else "stock"
    assert verdict.winner == winner
    assert verdict.ratio == pytest.approx(ours / stock)
    assert verdict.is_certain
    assert calls[:18] == ["ours", "stock"] * 9  # one of each is not timed, then eight pairs
    assert set(calls[18:]) == {winner}


def test_two_that_are_as_fast_race_to_the_end_and_the_smaller_median_stays(clock):
    noise = [1.0, 1.2, 0.9, 1.1] * 20
    calls, (verdict,) = raced(clock, ours=[each * 1.001 for each in noise], stock=noise[1:] + noise[:1])
    assert not verdict.is_certain
    assert len(set(calls[MOST_CALLS:])) == 1
    assert set(calls[:MOST_CALLS]) == {"ours", "stock"}


def test_three_race_and_the_fastest_stays(clock):
    calls, (verdict,) = raced(clock, ours=1.5, onednn=1.0, stock=2.0)
    assert verdict.winner == "onednn"
    assert set(calls[MOST_CALLS:]) == {"onednn"}


def test_calls_of_other_sizes_are_not_compared_with_each_other(clock):
    """Ours gets the large images and stock the small ones: that says nothing."""
    verdicts: list[Verdict] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        clock.now += x.numel()
        return x

    race = Race({"ours": run, "stock": run}, verdicts.append)
    for call in range(MOST_CALLS):
        assert not verdicts
        race(torch.zeros(100 if call % 2 == 0 else 1))
    (verdict,) = verdicts
    assert verdict.winner == "ours"
    assert verdict.pairs == 0


def test_the_loser_is_let_go(clock):
    calls: list[str] = []
    programs = {name: clock.program(name, of, calls) for name, of in (("ours", 1.0), ("stock", 3.0))}
    loser = weakref.ref(programs["stock"])
    race = Race(programs, lambda verdict: None)
    del programs
    for _ in range(20):
        race(torch.zeros(1))
    gc.collect()
    assert loser() is None


@pytest.mark.parametrize("count", [6, 7, 10, 20])
def test_the_interval_holds_the_median_as_often_as_it_says(count):
    generator = torch.Generator().manual_seed(count)
    ratios = torch.randn(4000, count, generator=generator).exp()  # the median is 1
    held = [low <= 1 <= high for low, high in (bounds(row.tolist()) for row in ratios)]
    assert 0.94 < statistics.mean(held) < 0.999


def bounds(ratios: list[float]) -> tuple[float, float]:
    verdict = verdict_of("ours", "stock", ratios)
    return verdict.low, verdict.high


def test_few_pairs_bound_nothing():
    verdict = verdict_of("ours", "stock", [0.5] * 5)
    assert (verdict.low, verdict.high) == (0.0, float("inf"))
    assert not verdict.is_certain


# Through torch.compile.


class Net(nn.Module):
    """A convolution and a batch norm in eval mode, which our rule folds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


OPTIONS = {"race": True, "profit": "always"}


def test_fifty_raced_steps_are_those_of_eager_in_float64():
    torch.manual_seed(3)
    model, x = Net().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    reference = Net().double().eval()
    reference.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="fxpasses", options=OPTIONS)
    steps = [(network, torch.optim.Adam(network.parameters(), 1e-2)) for network in (model, reference)]
    for _ in range(50):
        for run, (_, optimiser) in zip((compiled, reference), steps, strict=True):
            optimiser.zero_grad()
            run(x).square().sum().backward()
            optimiser.step()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(*(each.state_dict()["state"].values() for _, each in steps), strict=True):
        torch.testing.assert_close(mine["exp_avg"], theirs["exp_avg"], rtol=1e-9, atol=1e-9)
    (remark,) = [each for each in fxpasses.last_report().remarks if each.rule == "race"]
    assert "is dropped" in remark.message


def test_a_step_is_timed_with_its_backward(monkeypatch):
    seen: list[float] = []
    add = Race._add

    def slow_backward(grad: torch.Tensor) -> torch.Tensor:
        time.sleep(0)
        return grad

    def spied(self: Race, sample: races._Sample, seconds: float) -> None:
        seen.append(seconds / sample.forward)
        add(self, sample, seconds)

    monkeypatch.setattr(Race, "_add", spied)
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="fxpasses", options=OPTIONS)
    for _ in range(4):
        out = compiled(x)
        before = len(seen)
        out.register_hook(slow_backward)
        assert len(seen) == before  # nothing is known of a step before its backward
        out.sum().backward()
    assert len(seen) == 2  # the first call of each is not timed
    assert all(ratio > 1 for ratio in seen)


def test_a_verdict_is_kept_and_the_next_compilation_makes_the_winner_alone():
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="fxpasses", options=OPTIONS)
        for _ in range(MOST_CALLS + 1):
            torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        (verdict,) = own_store().profile().verdicts.values()
        for winner, applied in (("ours", 1), ("stock", 0)):
            (key,) = own_store().profile().verdicts
            other = "stock" if winner == "ours" else "ours"
            own_store().merge(with_verdict(key, Verdict(winner, other, 0.9, 0.8, 0.95, 8)))
            torch._dynamo.reset()
            fxpasses.reset()
            torch.testing.assert_close(
                torch.compile(model, backend="fxpasses", options=OPTIONS)(x), expected, rtol=1e-4, atol=1e-5
            )
            (report,) = fxpasses.reports()
            assert report.applied.get("efficient_conv_bn_eval", 0) == applied
            (remark,) = [each for each in report.remarks if each.rule == "race"]
            assert (remark.code, remark.message.split()[0]) == ("dropped", other)
            assert "found by an earlier race" in remark.message
    assert {verdict.winner, verdict.loser} == {"ours", "stock"}


def with_verdict(key: str, verdict: Verdict):
    from dataclasses import replace

    return replace(own_store().empty, verdicts={key: verdict})


def test_nothing_races_where_ours_is_stocks(monkeypatch):
    monkeypatch.setattr("fxpasses.backend.racing.Race", lambda *_: pytest.fail("there is nothing to race"))
    model, x = nn.Linear(3, 4), torch.randn(2, 3)
    with torch.no_grad():
        compiled = torch.compile(model, backend="fxpasses", options={"race": True})
        torch.testing.assert_close(compiled(x), model(x))


def test_without_the_option_nothing_races(monkeypatch):
    monkeypatch.setattr("fxpasses.backend.racing.Race", lambda *_: pytest.fail("nobody asked for it"))
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        compiled = torch.compile(model, backend="fxpasses", options={"profit": "always"})
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_that_tune_race(mode):
    from fxpasses.backend.racing import races as are_raced

    assert are_raced(Options(), mode)
    assert not are_raced(Options(), "reduce-overhead")
    assert not are_raced(Options(), None)


def test_a_value_that_is_none_is_refused():
    with pytest.raises(UnknownOptionError, match="'race' takes True or False; got 'yes'"):
        Options(race="yes")


@pytest.mark.needs_kernels
def test_kept_weights_race_without_kernels_of_ours_too(monkeypatch):
    raced: list[list[str]] = []
    start = Race.__init__

    def spied(self: Race, programs, decided) -> None:
        raced.append(list(programs))
        start(self, programs, decided)

    monkeypatch.setattr(Race, "__init__", spied)
    model, x = Net().eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="fxpasses", options={**OPTIONS, "weights": "cached"})
        for _ in range(MOST_CALLS + 3):
            torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        model.conv.weight.mul_(2)  # whichever has won sees it
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert raced == [["ours", "onednn", "stock"]]


def test_weights_that_change_while_programs_race_are_seen_by_all():
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        compiled = torch.compile(model, backend="fxpasses", options={**OPTIONS, "weights": "cached"})
        for call in range(MOST_CALLS + 3):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
            model.norm.running_mean.add_(0.1 * call)


def test_a_buffer_that_is_written_is_written_once_a_call():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.calls: torch.Tensor
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            return self.net(x)

    model, x = Counts().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        compiled = torch.compile(model, backend="fxpasses", options=OPTIONS)
        for _ in range(MOST_CALLS + 3):
            compiled(x)
    assert model.calls == MOST_CALLS + 3


def test_a_contender_that_does_not_compile_does_not_race_and_is_named(monkeypatch):
    from fxpasses.backend import door

    compile_ = door._compile

    def failing(compilation):
        if compilation.options.passes == ():
            raise RuntimeError("stock fails")
        return compile_(compilation)

    monkeypatch.setattr(door, "_compile", failing)
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        compiled = torch.compile(model, backend="fxpasses", options=OPTIONS)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    (remark,) = [each for each in fxpasses.last_report().remarks if each.rule == "race"]
    assert (remark.status, remark.code) == ("failed", "not-compiled")
    assert "stock does not race" in remark.message
    assert "RuntimeError: stock fails" in remark.message


def test_a_call_that_another_thread_overtook_goes_to_the_winner(clock):
    calls: list[str] = []
    programs = {name: clock.program(name, of, calls) for name, of in (("ours", 1.0), ("stock", 2.0))}
    race, x = Race(programs, lambda verdict: None), torch.zeros(1)
    for _ in range(18):
        race(x)
    assert race._winner is not None
    assert torch.equal(race._raced((x,)), x + 1)  # it had found no winner, and then waited for the lock
    assert calls[-1] == "ours"
