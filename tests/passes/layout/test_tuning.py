"""Measuring while compiling: what could change the plan, the most doubtful first, and nothing twice."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxpasses
from fxpasses.devices.own import own_store
from fxpasses.devices.profile import (
    CONVOLUTION_FORWARD,
    LAYOUT_COPY,
    OPERATORS_OF_CONVOLUTIONS,
    WEIGHT_COPY,
    DeviceProfile,
    Roofline,
)
from fxpasses.devices.store import DeviceProfileWarning
from fxpasses.errors import UnknownOptionError
from fxpasses.graph.layouts import C, L
from fxpasses.options import Options
from fxpasses.passes.layout.assign import assign
from fxpasses.passes.layout.passes import plan_and_carry_out
from fxpasses.passes.layout.problem import FIXED_C, FIXED_L
from fxpasses.passes.layout.sensitivity import nearest_flip, uncertainty
from fxpasses.passes.layout.solve import solve
from fxpasses.passes.layout.sources import CostSource, cost_source
from fxpasses.passes.layout.tuning import Tuner
from tests.passes.layout.test_graphs import context_of
from tests.passes.layout.test_joint import joint_graph
from tests.passes.layout.test_layout_models import traced

CPU = torch.device("cpu")
PEAKS = Roofline("float32", matmul_flops=1e11, convolution_flops=1e11, bandwidth=1e10, call_seconds=1e-6)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FXPASSES_PROFILE_DIR", str(tmp_path))
    monkeypatch.setenv("FXPASSES_SHIPPED_PROFILES", "0")
    monkeypatch.setattr("fxpasses.devices.arena.far", lambda device: 2**20)
    return tmp_path


def network(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, groups=width),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 1),
    )


COPIES = (LAYOUT_COPY, WEIGHT_COPY)


def context(training: bool = True, dtype: torch.dtype = torch.float32):
    graph_module, inputs = joint_graph(
        network().train(training).to(dtype), torch.randn(2, 3, 16, 16).to(dtype)
    )
    return context_of(graph_module, inputs, "fused")


def tuner(seconds: float = 60, **fields) -> Tuner:
    return Tuner(own_store(), CPU, seconds, **fields)


def measured(profile: DeviceProfile) -> set[tuple[str, str]]:
    return {(row.operator, row.key) for row in profile.measurements if row.operator not in COPIES}


def test_a_plan_is_made_of_what_was_measured_for_it():
    assert own_store().profile().measurements == ()
    assignment = assign(context(), profile=own_store().profile(), tuner=tuner())
    tuning = assignment.plan.tuning
    assert tuning is not None
    assert tuning.in_doubt == 0
    assert tuning.measured == len(own_store().profile().measurements) > 0
    assert own_store().profile().roofline("float32") is not None
    assert assignment.plan.source.startswith("profile of ")


def test_copies_of_weights_are_measured_up_to_the_largest():
    assign(context(), profile=None, tuner=tuner())
    rows = own_store().profile().measurements
    # All weights have at most 4 KiB, the least that is measured 16.
    assert {row.key for row in rows if row.operator == WEIGHT_COPY} == {"bytes=16384"}


def test_a_thorough_one_measures_every_convolution_in_every_direction():
    plan = assign(context(), profile=None, tuner=tuner(thorough=True)).plan
    assert plan.measured == len(plan.convolutions) == 6  # three forward, and the gradients of three
    directions = [operator for operator, _ in measured(own_store().profile())]
    # The first one's input is given, and its gradient is asked for as well.
    assert [directions.count(name) for name in OPERATORS_OF_CONVOLUTIONS] == [3, 3, 3]
    assert any("max_pool" in operator for operator in directions)


def test_what_is_known_is_not_measured_again():
    first = assign(context(), profile=None, tuner=tuner()).plan
    assert first.tuning.measured > 0
    again = assign(context(), profile=own_store().profile(), tuner=tuner()).plan
    assert again.tuning.measured == 0
    assert again.labels == first.labels


def test_what_cannot_change_the_plan_is_not_measured():
    assign(context(), profile=None, tuner=tuner(thorough=True))
    everything = own_store().profile()
    # In a device that is the same but for one convolution, that one alone is in doubt.
    (some, *_) = sorted(measured(everything))
    rows = tuple(row for row in everything.measurements if (row.operator, row.key) != some)
    own_store().path.unlink()
    own_store().merge(replace(everything, measurements=rows))
    plan = assign(context(), profile=own_store().profile(), tuner=tuner()).plan
    added = measured(own_store().profile()) - {(row.operator, row.key) for row in rows}
    assert added <= {some}
    assert plan.tuning.in_doubt == 0


def test_no_time_means_no_measurement_but_a_plan():
    plan = assign(context(), profile=None, tuner=tuner(seconds=1e-9)).plan
    assert measured(own_store().profile()) == set()
    assert plan.tuning.in_doubt > 0
    assert plan.measured == 0


def test_progress_is_told():
    told: list[tuple[int, int]] = []
    assign(context(), profile=None, tuner=tuner(progress=lambda done, total: told.append((done, total))))
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert all(done <= total for done, total in told)


def test_a_plan_that_does_not_win_for_certain_is_not_carried_out():
    """Nothing was measured, so that what a plan gains is less than what its prediction may be off."""
    profile = replace(own_store().empty, rooflines=(PEAKS,))
    source = CostSource(profile, tuner(seconds=1e-9))
    # By the roofline a float64 convolution works in contiguous; stock inductor takes channels-last.
    graph = context(dtype=torch.float64)
    plan = plan_and_carry_out(graph, "auto", source, for_inductor=True, dry_run=True).layout
    assert plan is not None
    assert plan.decision == "as-stock"
    assert plan.stock is not None
    assert plan.stock.channels_last
    assert {each.label for each in plan.convolutions} == {L}
    assert 0 < plan.foregone <= plan.uncertainty


def test_a_plan_that_wins_by_more_than_it_may_be_off_is_carried_out():
    graph = context()
    assign(graph, profile=None, tuner=tuner(thorough=True))
    known = own_store().profile()
    # Channels-last takes a hundredth of the time, copies nothing worth mentioning.
    cheap = tuple(
        replace(row, seconds=row.seconds / 100) if row.layout == L else row for row in known.measurements
    )
    outcome = plan_and_carry_out(graph, "auto", CostSource(replace(known, measurements=cheap)))
    assert outcome.layout is not None
    assert outcome.layout.decision == "applied"
    assert outcome.layout.gain > outcome.layout.uncertainty
    assert {each.label for each in outcome.layout.convolutions} == {L}


def test_the_nearest_flip_is_what_trying_every_convolution_finds():
    assign(context(), profile=None, tuner=tuner(thorough=True))
    assignment = assign(context(), profile=own_store().profile())
    problem, labels, net = assignment.problem, assignment.labels, assignment.network
    found = nearest_flip(net, problem, labels, {})
    assert found is not None

    def another_plan_wins(node: str, slower: float) -> bool:
        """Whether some labelling is better than the plan when one convolution is so much slower."""
        (place,) = [each for each in net.convolutions if each.name == node]
        variable = net.find(net.variables[place])
        costs = list(problem.contiguous), list(problem.channels_last)
        own = net.own(net.variables[place])[labels[variable] == L]
        costs[labels[variable] == L][variable] += slower * own
        changed = replace(problem, contiguous=costs[0], channels_last=costs[1])
        return changed.energy(solve(changed)) < changed.energy(labels) * (1 - 1e-12)

    assert another_plan_wins(found.node, found.slower * 1.001)
    free = [each for each in net.convolutions if net.find(net.variables[each]) not in (FIXED_C, FIXED_L)]
    assert free
    assert not any(another_plan_wins(each.name, found.slower * 0.999) for each in free)


def test_uncertainty_is_that_of_what_the_two_labellings_do_differently():
    graph = context()
    assignment = assign(graph, profile=replace(own_store().empty, rooflines=(PEAKS,)))
    net = assignment.network
    same = list(assignment.labels)
    assert uncertainty(net, same, same, {}) == 0
    other = [L if label == C else C for label in same]
    expected = sum(
        (seconds * (factor - 1)) ** 2
        for node in net.priced
        for seconds, factor in zip(
            net.own(net.variables[node]), net.factors(net.variables[node]), strict=True
        )
    )
    assert uncertainty(net, same, other, {}) == pytest.approx(expected**0.5)
    assert expected > 0


# The source of costs.


def reads(graph_context):
    from fxpasses.passes.layout.convolutions import read_convolution

    return [read for read in map(read_convolution, graph_context.graph.nodes) if read is not None]


def test_a_device_that_nobody_measured_is_measured_unless_the_user_forbids_it(monkeypatch):
    found = reads(context())
    assert cost_source(CPU, Options(tune_seconds=1), found).tuner is not None
    never = cost_source(CPU, Options(tune_seconds=0), found)
    assert (never.profile, never.tuner) == (None, None)


def test_a_shipped_profile_that_knows_the_graph_is_taken_and_nothing_is_measured(monkeypatch):
    assign(context(), profile=None, tuner=tuner(thorough=True))
    shipped = replace(own_store().profile(), settings={})
    own_store().path.unlink()
    monkeypatch.setattr("fxpasses.devices.store.find", lambda device: shipped)
    source = cost_source(CPU, Options(tune_seconds=1), reads(context()))
    assert source.profile is shipped
    assert source.tuner is None


def test_the_devices_own_store_comes_before_a_shipped_profile(monkeypatch):
    assign(context(), profile=None, tuner=tuner(thorough=True))
    known = own_store().profile()
    monkeypatch.setattr("fxpasses.devices.store.find", lambda device: replace(known, settings={}))
    assert cost_source(CPU, Options(tune_seconds=1), reads(context())).profile == known


def test_a_profile_that_the_user_names_is_not_added_to(tmp_path):
    path = tmp_path / "mine.json"
    replace(own_store().empty, rooflines=(PEAKS,)).save(path)
    source = cost_source(CPU, Options(layout_profile=path, tune_seconds=1), reads(context()))
    assert source.profile is not None
    assert source.tuner is None


def test_what_other_graphs_have_had_measured_does_not_make_compiled_code_stale():
    before = cost_source(CPU, Options(tune_seconds=1), reads(context())).key
    assign(context(), profile=None, tuner=tuner())
    assert cost_source(CPU, Options(tune_seconds=1), reads(context())).key == before
    own_store().merge(replace(own_store().empty, revision="tuned"))
    assert cost_source(CPU, Options(tune_seconds=1), reads(context())).key != before


# Through torch.compile.


def compiled(model: nn.Module, x: torch.Tensor, **options: object) -> torch.Tensor:
    torch._dynamo.reset()
    fxpasses.reset()
    return torch.compile(model, backend="fxpasses", options=options)(x)


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.full)])
def test_compiling_measures_and_a_second_compilation_measures_nothing(training):
    model, x = network(16).train(training), torch.randn(2, 3, 24, 24)
    with torch.set_grad_enabled(training):
        expected = model(x)
        results = []
        for _ in range(2):
            with torch._inductor.utils.fresh_cache():
                results.append(compiled(model, x, tune_seconds=5))
            plan = fxpasses.last_report().layout
            assert plan is not None
            assert plan.tuning is not None
            results.append(plan.tuning.measured)
    for result in results[::2]:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        assert result.stride() == expected.stride()
    assert results[1] > 0
    assert results[3] == 0


@pytest.mark.usefixtures("no_code")
def test_compiling_measures_nothing_where_the_user_forbids_it():
    with torch.no_grad(), torch._inductor.utils.fresh_cache():
        compiled(network().eval(), torch.randn(2, 3, 16, 16), tune_seconds=0)
    assert own_store().profile().measurements == ()
    assert fxpasses.last_report().layout is None


def test_a_dry_run_measures_nothing():
    with torch.no_grad():
        report = fxpasses.explain(network().eval(), torch.randn(2, 3, 16, 16), options={"tune_seconds": 5})
    assert own_store().profile().measurements == ()
    assert report.layout is not None
    assert report.layout.decision == "no-profile"
    assert "python -m" not in str(report)  # nothing that an installed package does not have


def test_a_plan_found_in_inductors_cache_says_what_was_measured_for_it():
    x = torch.randn(2, 3, 16, 16)
    model = network().eval()
    with torch.no_grad(), torch._inductor.utils.fresh_cache():
        compiled(model, x, tune_seconds=5)
        first = fxpasses.last_report().layout
        compiled(model, x, tune_seconds=5)
        assert fxpasses.last_report().layout == first


@pytest.mark.parametrize("given", [-1, "five", float("nan"), float("inf"), True, None])
def test_seconds_that_are_none_are_refused(given):
    with pytest.raises(UnknownOptionError, match="'tune_seconds' takes seconds from 0 up"):
        Options(tune_seconds=given)


def test_the_environment_gives_the_default(monkeypatch):
    monkeypatch.delenv("FXPASSES_TUNE_SECONDS", raising=False)
    assert Options().tune_seconds == 5.0
    monkeypatch.setenv("FXPASSES_TUNE_SECONDS", "0.5")
    assert Options().tune_seconds == 0.5
    for wrong in ("many", "-1", "nan"):
        monkeypatch.setenv("FXPASSES_TUNE_SECONDS", wrong)
        with pytest.raises(UnknownOptionError, match=r"\$FXPASSES_TUNE_SECONDS takes seconds from 0 up"):
            Options()


def test_measuring_changes_no_warning_filters_and_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assign(context(), profile=None, tuner=tuner())
    assert any(operator == CONVOLUTION_FORWARD for operator, _ in measured(own_store().profile()))


def test_what_would_take_longer_than_the_time_that_is_left_is_not_begun(monkeypatch):
    """By these peaks a convolution takes minutes, so that a budget of a second has no room for one."""
    slow = Roofline("float32", matmul_flops=1e3, convolution_flops=1e3, bandwidth=1e9, call_seconds=1e-6)
    own_store().add([], [slow])
    plan = assign(context(), profile=own_store().profile(), tuner=tuner(seconds=1)).plan
    assert not any(operator in OPERATORS_OF_CONVOLUTIONS for operator, _ in measured(own_store().profile()))
    assert plan.tuning.in_doubt > 0


def test_a_device_without_memory_left_breaks_off_measuring_and_not_the_compilation(monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("fxpasses.devices.arena.Arena.sets", full)
    with pytest.warns(DeviceProfileWarning, match="measuring was broken off: no memory left"):
        plan = assign(context(), profile=own_store().profile(), tuner=tuner()).plan
    assert plan.tuning is not None
    assert plan.tuning.measured == 0


@pytest.mark.usefixtures("no_code")
def test_symbolic_sizes_are_measured_as_they_were_when_they_were_traced():
    model, x = network(16).eval(), torch.randn(4, 3, 24, 24)
    with torch.no_grad(), torch._inductor.utils.fresh_cache():
        torch._dynamo.reset()
        fxpasses.reset()
        dynamic = torch.compile(model, backend="fxpasses", dynamic=True, options={"tune_seconds": 5})
        torch.testing.assert_close(dynamic(x), model(x), rtol=1e-4, atol=1e-4)
        known = measured(own_store().profile())
        larger = torch.randn(5, 3, 32, 32)
        torch.testing.assert_close(dynamic(larger), model(larger), rtol=1e-4, atol=1e-4)
    assert any("input=4x3x24x24" in key for _, key in known)
    assert measured(own_store().profile()) == known
    (report,) = fxpasses.reports()
    assert report.layout is not None


def test_a_graph_that_is_run_as_it_is_has_its_convolutions_measured_too():
    model, x = network(16).eval(), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        graph = make_fx(model, pre_dispatch=True)(x)
        result = fxpasses.optimize(graph, (x,), {"tune_seconds": 5})
        torch.testing.assert_close(result.graph_module(x), model(x), rtol=1e-4, atol=1e-4)
    assert {operator for operator, _ in measured(own_store().profile())} >= {CONVOLUTION_FORWARD}
    assert result.report.layout is not None
    assert result.report.layout.tuning is not None


def test_a_store_that_cannot_be_written_is_a_warning_and_the_compilation_goes_on(folder, monkeypatch):
    (folder / "file").write_text("no folder", "utf-8")
    monkeypatch.setenv("FXPASSES_PROFILE_DIR", str(folder / "file"))
    model, x = network(16).eval(), torch.randn(2, 3, 24, 24)
    with (
        torch.no_grad(),
        pytest.warns(DeviceProfileWarning, match="this process alone knows it"),
    ):
        torch.testing.assert_close(traced(tune_seconds=5)(model)(x), model(x), rtol=1e-4, atol=1e-4)
    assert fxpasses.last_report().layout.tuning.measured > 0


def test_the_report_and_the_page_say_what_was_measured_and_by_how_much_the_plan_wins(tmp_path):
    with torch.no_grad():
        traced(tune_seconds=5)(network(16).eval())(torch.randn(2, 3, 24, 24))
    report = fxpasses.last_report()
    report.save_html(tmp_path / "page.html")
    for text in (" ".join(str(report).split()), (tmp_path / "page.html").read_text("utf-8")):
        assert f"{report.layout.tuning.measured} measurements in " in text
        assert "of 3 convolutions " in text
        assert ("another plan would win if " in text) == (report.layout.nearest_flip is not None)
    again = type(report).from_json(report.to_json())
    assert again.layout == report.layout
