"""Measuring in both layouts: no time for a wrong result, operands that are cold unless asked for, turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from layout_settings import CASES, CPU, QUICK, SETTING
from torch import Tensor

from benchmarks import tensor_layout
from benchmarks.layout import measure as layout_measure
from benchmarks.layout import operators as layout_operators
from benchmarks.layout.measure import Variant, compare, measure_convolution
from benchmarks.layout.operators import layout_sensitive, measure_operator
from benchmarks.layout.setting import Setting
from benchmarks.operators.inputs.notation import Call, TensorSpec
from benchmarks.torch_internals import TorchDispatchMode
from fxpasses.devices import convolutions as layout_convolutions
from fxpasses.devices.convolutions import (
    DIRECTIONS,
    Candidates,
    Convolution,
    Direction,
    Kernel,
    Operands,
    operands,
)
from fxpasses.devices.profile import (
    LAYOUTS,
    Layout,
)
from fxpasses.devices.timing import Effort, measure_interleaved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_passes_the_comparison(dtype: str) -> None:
    setting = Setting(dtype, CPU, QUICK, hot=True)
    for direction in DIRECTIONS:
        variants = measure_convolution(CASES["pointwise"], direction, setting)
        # A CPU may lack the prepacked kernel of a dtype; none may be wrong.
        assert {each.status for each in variants} <= {"measured", "unsupported"}
        assert all(len(each.times) == 2 for each in variants if each.status == "measured")
        assert compare(variants) is not None


def test_tolerance_is_that_of_the_shorter_arithmetic() -> None:
    assert Setting("float32", CPU, QUICK).tolerance == 1e-3
    assert Setting("float32", CPU, QUICK, tf32=True).tolerance == 1e-3  # a CPU has none
    assert Setting("float32", torch.device("cuda"), QUICK, tf32=True).tolerance == 4 * 2**-10
    assert Setting("bfloat16", CPU, QUICK).tolerance == 4 * 2**-7


@pytest.fixture
def wrong_in_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution that is off by one per cent in channels_last."""
    right = layout_convolutions._convolution

    def wrong(case: Convolution, direction: Direction, layout: Layout, values: Operands) -> Kernel:
        kernel = right(case, direction, layout, values)
        if layout == "contiguous":
            return kernel

        def off() -> Tensor:
            result = kernel()
            assert isinstance(result, Tensor)
            return result * 1.01

        return off

    monkeypatch.setattr(layout_convolutions, "_convolution", wrong)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Operands]:
    """The operands of every call of a convolution, in the order of the calls."""
    found: list[Operands] = []
    right = layout_measure.implementations

    def recorded(
        case: Convolution, direction: Direction, layout: Layout, values: Operands
    ) -> dict[str, Callable[[], Kernel]]:
        def built(build: Callable[[], Kernel]) -> Kernel:
            kernel = build()
            return lambda: (found.append(values), kernel())[1]

        builds = right(case, direction, layout, values)
        return {name: partial(built, build) for name, build in builds.items()}

    monkeypatch.setattr(layout_measure, "implementations", recorded)
    return found


def test_operands_come_again_only_after_all_others_were_read(
    monkeypatch: pytest.MonkeyPatch, reads: list[Operands]
) -> None:
    case = CASES["grouped"]
    monkeypatch.setattr("fxpasses.devices.caches.far", lambda device: 6 * operands_of(case).num_bytes)
    variants = measure_convolution(case, "forward", Setting("float32", CPU, QUICK))
    assert {each.status for each in variants} == {"measured"}
    timed = reads[len(variants) :]  # the first call of each is compared with float64
    assert len(timed) > 14
    for tensor in ("input", "weight"):
        places = [getattr(each, tensor).data_ptr() for each in timed]
        assert all(len({*places[at : at + 7]}) == 7 for at in range(len(places) - 6))


def operands_of(case: Convolution) -> Operands:
    return operands(case, "forward", torch.float32, CPU)


def test_hot_operands_are_the_same_in_every_call(
    monkeypatch: pytest.MonkeyPatch, reads: list[Operands]
) -> None:
    monkeypatch.setattr("fxpasses.devices.caches.far", lambda device: 2**30)
    measure_convolution(CASES["plain"], "weight_grad", SETTING)
    assert len({id(each) for each in reads}) == len(LAYOUTS)


@pytest.mark.parametrize(("hot", "sets"), [(False, 3), (True, 1)])
def test_operators_have_cold_operands_too(monkeypatch: pytest.MonkeyPatch, hot: bool, sets: int) -> None:
    def keep(operator: str, key: str, candidates: Candidates, *rest: object) -> list[Variant]:
        kept.update(candidates)
        return []

    kept: Candidates = {}
    setting = Setting("float32", CPU, QUICK, hot=hot)
    # Twice as much as an operator's 64 KiB and its result's 64 bytes take.
    monkeypatch.setattr("fxpasses.devices.caches.far", lambda device: 2 * (2**16 + 64))
    monkeypatch.setattr(layout_operators, "measure", keep)
    call = Call((TensorSpec((2, 8, 32, 32), torch.float32), [2, 3]), {})
    measure_operator(*layout_sensitive("aten.mean.dim", call, training=False), setting)
    assert {layout for layout, _ in kept} == {*LAYOUTS}
    for builds in kept.values():
        kernels = [build() for build in builds]
        assert len({place_read_by(each) for each in kernels}) == len(kernels) == sets


def place_read_by(kernel: Kernel) -> int:
    """Where the first operand of a call lies."""
    with FirstRead() as found:
        kernel()
    assert found.place is not None
    return found.place


class FirstRead(TorchDispatchMode):
    """Keeps where the first tensor lies that the first operator reads."""

    place: int | None = None

    def __torch_dispatch__(self, func: Callable[..., object], types: object, args=(), kwargs=None) -> object:
        if self.place is None:
            self.place = args[0].data_ptr()
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("wrong_in_channels_last")
def test_a_wrong_result_has_no_time_and_takes_those_of_its_case_with_it() -> None:
    variants = measure_convolution(CASES["plain"], "forward", SETTING)
    status = {(each.layout, each.implementation): each.status for each in variants}
    assert status["channels_last", "aten.convolution"] == "mismatch"
    assert status["contiguous", "aten.convolution"] == "untimed"
    assert all(each.times == () and each.reason for each in variants)
    assert compare(variants) is None


@pytest.mark.usefixtures("wrong_in_channels_last")
def test_a_wrong_result_makes_the_exit_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plain() == 1
    captured = capsys.readouterr()
    assert "channels_last aten.convolution is wrong, no time is reported" in captured.err
    assert "mismatch" in captured.out


def test_right_results_make_the_exit_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plain() == 0
    assert "is wrong" not in capsys.readouterr().err


def run_plain() -> int:
    sizes = ["--input", "2,6,9,8", "--weight", "8,6,3,3", "--padding", "1"]
    return tensor_layout.main([*sizes, "--device", "cpu", "--repeats", "2", "--passes", "forward"])


def test_an_unsupported_implementation_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Kernel:
        raise RuntimeError("no such kernel\nand a long stack")

    monkeypatch.setattr(layout_convolutions, "_prepacked", missing)
    variants = measure_convolution(CASES["plain"], "forward", SETTING)
    assert {each.implementation: each.status for each in variants} == {
        "aten.convolution": "measured",
        "mkldnn.prepacked": "unsupported",
    }
    reasons = {each.reason for each in variants if each.status == "unsupported"}
    assert reasons == {"RuntimeError: no such kernel"}


@pytest.mark.parametrize(("channels", "status"), [(3, "unsupported"), (16, "measured")])
def test_a_kernel_that_writes_past_its_end_is_not_run(channels: int, status: str) -> None:
    case = Convolution.of((2, channels, 8, 8), (8, channels, 1, 1), (2,))
    variants = measure_convolution(case, "weight_grad", SETTING)
    assert {each.layout: each.status for each in variants} == {
        "contiguous": "measured",
        "channels_last": status,
    }


def test_measuring_leaves_the_precision_settings_as_they_were() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with Setting("float32", CPU, QUICK, tf32=not before[1]).arithmetic():
        assert torch.backends.cuda.matmul.allow_tf32 is not before[1]
        assert not torch.is_grad_enabled()
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
    assert torch.is_grad_enabled()


def test_callables_take_turns_and_have_one_sample_a_round() -> None:
    calls: list[str] = []
    callables = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = measure_interleaved(callables, CPU, Effort(rounds=7, sample_seconds=0, case_seconds=10))
    assert {name: len(samples) for name, samples in times.items()} == {"a": 7, "b": 7}
    rounds = calls[4:]  # two calls of each came first, to warm up and to estimate
    assert [sorted(pair) for pair in zip(rounds[::2], rounds[1::2], strict=True)] == [["a", "b"]] * 7


def test_a_case_that_would_take_too_long_has_fewer_rounds() -> None:
    slow = {"slow": lambda: time.sleep(0.002)}
    assert len(measure_interleaved(slow, CPU, Effort(rounds=50, case_seconds=0.001))["slow"]) == 6


def test_a_result_of_another_number_of_tensors_is_a_mismatch() -> None:
    assert "2 floating-point results instead of 1" in layout_measure._difference(
        (torch.ones(1), torch.ones(1)), [torch.ones(1, dtype=torch.float64)], 1e-3
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gpu_is_measured_in_both_layouts(dtype: str) -> None:
    setting = Setting(dtype, torch.device("cuda"), QUICK)
    for direction in DIRECTIONS:
        variants = measure_convolution(CASES["pointwise"], direction, setting)
        assert {each.status for each in variants} == {"measured"}
        assert all(seconds > 0 for each in variants for seconds in each.times)
