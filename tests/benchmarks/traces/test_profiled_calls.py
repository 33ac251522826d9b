"""A call under the profiler: what is called, with which arguments, in which context, on which device."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from made_traces import GPU_TRACE, analysed
from torch import nn

from benchmarks import utilization
from benchmarks.shared.environment import UnavailableDeviceError
from benchmarks.traces.analysis import Utilization, load_trace
from benchmarks.traces.profiled_calls import Protocol, devices_of
from benchmarks.utilization import benchmark_utilization
from fxpasses.torch_internals.fake_tensors import FakeTensorMode


class Pair(NamedTuple):
    first: torch.Tensor
    second: int


@dataclass
class Batch:
    images: torch.Tensor
    labels: list[int]


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    "given",
    [
        X,
        [X],
        [X, X],
        {"images": [X, {"deeper": (X, None)}], "size": 3},
        (X, X),
        (),
        Pair(X, 3),
        Batch(X, [1, 2]),
        None,
        7,
    ],
    ids=[
        "tensor",
        "list of one",
        "list",
        "dict",
        "tuple",
        "empty tuple",
        "named tuple",
        "dataclass",
        "None",
        "number",
    ],
)
def test_an_argument_of_any_structure_arrives_as_it_is(given: object) -> None:
    seen: list[object] = []

    def one_argument(argument: object) -> object:
        seen.append(argument)
        return X + 1

    benchmark_utilization(one_argument, given)
    assert seen
    assert all(each is given for each in seen)


def test_a_tuple_of_as_many_values_as_there_are_arguments_is_spread_out() -> None:
    seen: list[tuple[object, ...]] = []

    def two_arguments(first: torch.Tensor, second: list[int], scale: float = 1.0) -> torch.Tensor:
        seen.append((first, second, scale))
        return first * scale

    values = (X, [1, 2])
    benchmark_utilization(two_arguments, values, kwargs_for_f={"scale": 3.0})
    assert {(id(a), id(b), c) for a, b, c in seen} == {(id(values[0]), id(values[1]), 3.0)}
    with pytest.raises(TypeError, match="second"):
        benchmark_utilization(two_arguments, X)


def test_modules_and_functions_of_torch_take_tuples_and_lists() -> None:
    bilinear = nn.Bilinear(3, 3, 2)
    assert benchmark_utilization(bilinear, (X, X))[0] > 0
    assert benchmark_utilization(nn.Linear(3, 2), (X,))[1] > 0
    assert benchmark_utilization(torch.cat, [X, X])[0] > 0
    assert benchmark_utilization(torch.cat, ([X, X],), kwargs_for_f={"dim": 1})[0] > 0


@pytest.mark.parametrize(("wall_time", "calls"), [(False, 2 + 2 * 3), (True, 2 + 3 + 2 * 3)])
def test_warm_up_wall_time_and_window_draw_the_same_numbers(wall_time: bool, calls: int) -> None:
    drawn: list[float] = []

    def random(x: torch.Tensor) -> torch.Tensor:
        drawn.append(float(torch.rand(())))
        return x + 1

    before = torch.get_rng_state()
    benchmark_utilization(random, X, repeats=3, warmup=2, seed=5, wall_time=wall_time)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    expected = [float(torch.rand(())) for _ in range(3)]
    assert len(drawn) == calls
    assert drawn == expected[:2] + expected * ((calls - 2) // 3)


def test_by_default_five_calls_warm_up_and_three_are_measured() -> None:
    calls: list[None] = []
    benchmark_utilization(lambda x: (calls.append(None), x + 1), X)
    assert len(calls) == 5 + 2 * 3


def test_everything_runs_in_the_context_which_is_entered_once(tmp_path: Path) -> None:
    entered: list[str] = []
    states: set[tuple[bool, bool]] = set()

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        entered.append("in")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            yield
        entered.append("out")

    def compiled(f: Callable[..., object]) -> Callable[..., object]:
        states.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return f

    def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        states.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        result = torch.mm(x, y)
        assert result.dtype == torch.bfloat16
        return result

    path = tmp_path / "trace.json"
    weight = torch.ones(3, 3, requires_grad=True)
    benchmark_utilization(
        product, (X, weight), path, compiled, optimize_ctx=context(), wall_time=True, repeats=1
    )
    assert entered == ["in", "out"]
    assert states == {(False, True)}
    assert "aten::mm" in {each.name for each in load_trace(path).events}
    assert torch.is_grad_enabled()


def test_the_profiler_takes_arguments_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    given = {"with_stack": True, "record_shapes": True, "activities": []}
    benchmark_utilization(torch.mm, (X, X.t()), path, kwargs_for_profiler=given)
    events = json.loads(path.read_text("utf-8"))["traceEvents"]
    assert "python_function" in {each.get("cat") for each in events}
    (sizes,) = {str(each["args"]["Input Dims"]) for each in events if each["name"] == "aten::mm"}
    assert sizes == "[[2, 3], [3, 2]]"


def test_wall_time_is_reported_where_it_is_asked_for() -> None:
    found = benchmark_utilization(torch.mm, (torch.ones(64, 64),) * 2, wall_time=True)
    details = found.details
    assert found == (details.utilization, details.mm_conv_utilization)
    assert 0 < found[1] <= found[0] <= 1
    assert details.wall_seconds is not None
    assert details.wall_seconds > 0
    (device,) = details.devices
    assert details.wall_utilization == pytest.approx(device.busy_seconds / details.wall_seconds)
    assert benchmark_utilization(torch.neg, X).details.wall_utilization is None


def test_pytorchs_arguments_are_taken_by_their_names(tmp_path: Path) -> None:
    calls: list[None] = []

    def function(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        calls.append(None)
        return inputs[0] @ inputs[1]

    folder = str(tmp_path / "new" / "folder")
    found = benchmark_utilization(
        function, (X, X.t()), folder, optimize_ctx=torch.no_grad(), trace_file_name="mine", num_runs=1
    )
    utilized, by_products = found
    assert 0 < by_products <= utilized <= 1
    assert len(calls) == 5 + 2
    assert load_trace(tmp_path / "new" / "folder" / "mine.json").events


def test_the_device_is_found_by_tensors_however_deep_they_are() -> None:
    with FakeTensorMode():
        there = torch.empty(2, device="cuda")
        here = torch.empty(2)
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(2, device="cuda:1"))
    cuda, other, cpu = torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cpu")
    assert devices_of(torch.neg, {"a": [here, (there,)]}) == (cuda,)
    assert devices_of(torch.neg, here, {"weight": there}) == (cuda,)
    assert devices_of(module, here) == devices_of(module.forward, here) == (other,)
    assert devices_of(torch.neg, [there, module.weight]) == (cuda, other)
    assert devices_of(torch.neg, here) == (cpu,)


@pytest.mark.parametrize("there", [None, torch.device("cuda", 0)])
def test_without_tensors_it_is_the_accelerator_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, there: torch.device | None
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: there)
    assert devices_of(torch.ones, (3,)) == (there or torch.device("cpu"),)


def test_a_device_that_is_named_is_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    protocols: list[Protocol] = []

    def kept(call: object, protocol: Protocol, path: object) -> Utilization:
        protocols.append(protocol)
        return analysed(GPU_TRACE)

    monkeypatch.setattr(utilization, "traced", kept)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    benchmark_utilization(torch.neg, X, device="cuda:1")
    benchmark_utilization(torch.neg, X, device=torch.device("cpu"))
    assert [each.devices for each in protocols] == [(torch.device("cuda:1"),), (torch.device("cpu"),)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UnavailableDeviceError, match="'cuda' does not exist here"):
        benchmark_utilization(torch.neg, X, device="cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"num_runs": 0}, "repeats must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"kwargs_for_profiler": {"schedule": None}}, "schedule of the profiler cannot be given"),
        ({"kwargs_for_profiler": {"on_trace_ready": print}}, "Take repeats, warmup and trace_path instead"),
        ({"kwargs_for_profiler": {"with_stacks": True}}, "unexpected keyword argument 'with_stacks'"),
    ],
)
def test_what_cannot_be_is_an_error_before_anything_is_called(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(utilization.UtilizationArgumentError, match=message):
        benchmark_utilization(lambda x: pytest.fail("it was called"), X, **arguments)
