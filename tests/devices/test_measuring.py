"""Measuring gives rows of a profile under both layouts, and leaves the caller's state as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fxpasses.devices import arena as arenas
from fxpasses.devices.caches import free_memory
from fxpasses.devices.convolutions import DIRECTIONS, OPERATORS, Convolution
from fxpasses.devices.keys import operator_key
from fxpasses.devices.measuring import Measurer, Timing
from fxpasses.devices.operators import OperatorCase, Shaped
from fxpasses.devices.profile import LAYOUT_COPY, LAYOUTS, WEIGHT_COPY, DeviceProfile
from fxpasses.devices.timing import Effort
from fxpasses.torch_internals.fake_tensors import FakeTensor, new_fake_mode

aten = torch.ops.aten
CPU = torch.device("cpu")
QUICK = Effort(rounds=3, sample_seconds=0, case_seconds=1, least=3)
POINTWISE = Convolution.of((1, 16, 8, 8), (32, 16, 1, 1))


@pytest.fixture
def measurer(monkeypatch: pytest.MonkeyPatch) -> Measurer:
    monkeypatch.setattr(arenas, "far", lambda device: 2**18)
    return Measurer(CPU, torch.float32, QUICK)


def profile_of(timings: list[Timing]) -> DeviceProfile:
    rows = tuple(timing.measurement() for timing in timings)
    return DeviceProfile("here", "2", measurements=rows)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_convolution_has_a_row_under_both_layouts(measurer, direction):
    found = profile_of(measurer.convolution(POINTWISE, direction))
    for layout in LAYOUTS:
        estimate = found.seconds(OPERATORS[direction], POINTWISE.key, layout)
        assert estimate is not None
        assert estimate.seconds > 0
    assert {row.implementation for row in found.measurements} == {"aten.convolution", "mm"}
    assert {row.samples for row in found.measurements} == {3}


@pytest.mark.parametrize(
    ("overload", "args"),
    [
        ("aten.max_pool2d_with_indices.default", (Shaped((1, 4, 8, 8), torch.float32), [2, 2])),
        (
            "aten.max_pool2d_with_indices_backward.default",
            (
                Shaped((1, 4, 4, 4), torch.float32),
                Shaped((1, 4, 8, 8), torch.float32),
                [2, 2],
                [2, 2],
                [0, 0],
                [1, 1],
                False,
                Shaped((1, 4, 4, 4), torch.int64),
            ),
        ),
        ("aten.cat.default", ([Shaped((1, 4, 8, 8), torch.float32)] * 2, 1)),
        ("aten.mean.dim", (Shaped((1, 4, 8, 8), torch.float32), [2, 3])),
    ],
    ids=["pool", "its gradient", "cat", "mean"],
)
def test_an_operator_has_a_row_under_both_layouts(measurer, overload, args):
    _, name, overloaded = overload.split(".")
    key = operator_key(getattr(getattr(aten, name), overloaded), args, {})
    found = profile_of(measurer.operator(OperatorCase(overload, key, overload, args, {})))
    assert [(row.operator, row.key, row.layout) for row in found.measurements] == [
        (overload, key, layout) for layout in LAYOUTS
    ]


@pytest.mark.parametrize(
    ("operator", "measure"), [(LAYOUT_COPY, Measurer.copy), (WEIGHT_COPY, Measurer.weight_copy)]
)
def test_copies_go_both_ways(measurer, operator, measure):
    found = measure(measurer, 2**14)
    assert [(each.operator, each.key, each.layout) for each in found] == [
        (operator, "bytes=16384", layout) for layout in LAYOUTS
    ]


def test_a_device_has_peaks(measurer):
    peaks = measurer.peaks()
    assert peaks.dtype == "float32"
    assert min(peaks.matmul_flops, peaks.convolution_flops, peaks.bandwidth, peaks.call_seconds) > 0


def test_a_dtype_without_kernels_gives_no_rows(monkeypatch):
    monkeypatch.setattr(arenas, "far", lambda device: 2**18)

    def unsupported(*_: object) -> None:
        raise RuntimeError("not implemented for this dtype")

    monkeypatch.setattr(
        "fxpasses.devices.measuring.implementations", lambda *_: {"aten.convolution": unsupported}
    )
    assert Measurer(CPU, torch.float32, QUICK).convolution(POINTWISE, "forward") == []


def test_the_callers_random_numbers_gradients_and_autocast_are_left_alone(measurer, monkeypatch):
    seen = []
    monkeypatch.setattr("fxpasses.devices.measuring.implementations", spied(seen))
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        measurer.convolution(POINTWISE, "forward")
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {(each.dtype, each.requires_grad) for each in seen} == {(torch.float32, False)}


def test_tensors_are_real_inside_a_compilation(measurer, monkeypatch):
    seen = []
    monkeypatch.setattr("fxpasses.devices.measuring.implementations", spied(seen))
    with new_fake_mode():
        assert measurer.convolution(POINTWISE, "forward")
    assert seen
    assert not any(isinstance(each, FakeTensor) for each in seen)


def spied(seen: list[torch.Tensor]) -> Callable[..., dict[str, Callable[[], Callable[[], torch.Tensor]]]]:
    """An implementation that keeps what a convolution gives."""

    def run(values) -> torch.Tensor:
        seen.append(aten.convolution.default(values.input, values.weight, None, *POINTWISE.arguments))
        return seen[-1]

    return lambda case, direction, layout, values: {"aten.convolution": lambda: lambda: run(values)}


def test_what_would_take_much_of_the_memory_is_not_measured(measurer, monkeypatch):
    monkeypatch.setattr("fxpasses.devices.measuring.free_memory", lambda device: 2**14)
    assert measurer.convolution(POINTWISE, "forward") == []
    case = OperatorCase("op", "key", "aten.mean.dim", (Shaped((1, 64, 8, 8), torch.float32), [2, 3]), {})
    assert measurer.operator(case) == []


def test_the_memory_that_is_free_is_what_the_system_says():
    assert 2**20 < free_memory(CPU) < 2**50
