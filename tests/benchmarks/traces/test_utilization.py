"""Utilisation: exact values on traces whose answers are known, clear errors on what is no trace."""

from __future__ import annotations

import contextlib
import csv
import gzip
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks import utilization
from benchmarks.shared.environment import UnavailableDeviceError
from benchmarks.traces.analysis import TraceError, Utilization, analyse, busy_intervals, load_trace, of_kind
from benchmarks.traces.intervals import Interval, innermost, intersection, length, union
from benchmarks.traces.kernel_patterns import classify, is_frame
from benchmarks.traces.profiled_calls import Protocol, devices_of
from benchmarks.utilization import benchmark_utilization
from fxpasses.torch_internals.fake_tensors import FakeTensorMode

GPU_TRACE = Path(__file__).parent / "data" / "gpu_trace.json"
GEMM, CONV, ADD = (
    "ampere_sgemm_128x64_tn",
    "sm80_xmma_fprop_implicit_gemm_f32",
    "vectorized_elementwise_kernel",
)

Raw = dict[str, object]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a trace of the given events."""

    def to_file(events: Sequence[Raw], name: str = "trace.json") -> Path:
        path = tmp_path / name
        data = json.dumps({"schemaVersion": 1, "traceEvents": list(events)}).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return to_file


def kernel(start: float, end: float, name: str = ADD, *, device: int = 0, stream: int = 7) -> Raw:
    arguments = {"device": device, "stream": stream, "correlation": 1}
    times = {"ts": 1e6 + start, "dur": end - start}
    return {
        "ph": "X",
        "cat": "kernel",
        "name": name,
        "pid": device,
        "tid": stream,
        "args": arguments,
        **times,
    }


def operator(start: float, end: float, name: str, *, thread: int = 1) -> Raw:
    times = {"ts": 1e6 + start, "dur": end - start}
    return {"ph": "X", "cat": "cpu_op", "name": name, "pid": 99, "tid": thread, "args": {}, **times}


def annotation(start: float, end: float, name: str) -> Raw:
    return operator(start, end, name) | {"cat": "user_annotation"}


def analysed(path: Path, window: str | None = None) -> Utilization:
    return analyse(load_trace(path), window)


def test_overlapping_streams_count_once(write: Write) -> None:
    result = analysed(write([kernel(0, 60), kernel(40, 100, stream=20), kernel(150, 200)]))
    assert result.utilization == 150 / 200
    (device,) = result.devices
    assert {stream.stream: stream.utilization for stream in device.streams} == {
        "7": 110 / 200,
        "20": 60 / 200,
    }
    assert device.busy_seconds == 150e-6


def test_gaps_are_idle(write: Write) -> None:
    result = analysed(write([kernel(0, 10), kernel(30, 40), kernel(90, 100)]))
    assert result.window_seconds == 100e-6
    assert result.utilization == 0.3


def test_kernels_back_to_back_leave_no_gap(write: Write) -> None:
    assert analysed(write([kernel(0, 10), kernel(10, 40)])).utilization == 1.0


def test_a_kernel_is_clipped_to_the_window(write: Write) -> None:
    events = [annotation(100, 200, "ProfilerStep#1"), kernel(50, 120), kernel(190, 900)]
    result = analysed(write(events))
    assert result.window == "ProfilerStep#*"
    assert result.utilization == 0.3


def test_a_device_that_is_always_busy_is_never_above_1(write: Write) -> None:
    events = [annotation(100, 200, "ProfilerStep#1")]
    events += [kernel(0, 300, GEMM, stream=index) for index in range(4)]
    result = analysed(write(events))
    assert (result.utilization, result.mm_conv_utilization, result.mm_conv_share) == (1.0, 1.0, 1.0)


def test_a_window_of_several_steps_leaves_out_what_lies_between(write: Write) -> None:
    events = [annotation(0, 10, "step"), annotation(90, 100, "step"), kernel(0, 5), kernel(40, 60)]
    assert analysed(write(events), "step").utilization == 5 / 20


def test_without_an_annotation_the_window_is_all_events_of_cpu_and_device(write: Write) -> None:
    result = analysed(write([operator(0, 10, "aten::mm"), kernel(50, 100)]))
    assert result.window_seconds == 100e-6
    assert result.utilization == 0.5


def test_a_window_that_is_not_there_lists_those_that_are(write: Write) -> None:
    path = write([annotation(0, 10, "forward"), kernel(0, 5)])
    with pytest.raises(TraceError, match=r"trace\.json has no annotation .* 'backward'; it has: forward"):
        analysed(path, "backward")


def test_two_devices_are_averaged_and_told_apart(write: Write) -> None:
    result = analysed(write([kernel(0, 100, GEMM), kernel(0, 50, CONV, device=1), kernel(50, 60, device=1)]))
    assert [device.device for device in result.devices] == ["0", "1"]
    assert [device.utilization for device in result.devices] == [1.0, 0.6]
    assert result.utilization == 0.8
    assert result.mm_conv_utilization == 0.75
    assert result.mm_conv_share == 150 / 160


def test_the_same_stream_number_on_two_devices_is_two_streams(write: Write) -> None:
    result = analysed(write([kernel(0, 100), kernel(0, 100, device=1)]))
    assert [[stream.stream for stream in device.streams] for device in result.devices] == [["7"], ["7"]]
    assert [device.busy_seconds for device in result.devices] == [100e-6, 100e-6]


def test_ten_devices_stand_in_the_order_of_their_numbers(write: Write) -> None:
    result = analysed(write([kernel(0, 10, device=index) for index in range(12)]))
    assert [device.device for device in result.devices] == [str(index) for index in range(12)]


def test_products_and_convolutions_that_overlap_count_once_together(write: Write) -> None:
    events = [kernel(0, 60, GEMM), kernel(40, 100, CONV, stream=20), kernel(100, 200)]
    (device,) = analysed(write(events)).devices
    assert (device.matmul_seconds, device.convolution_seconds) == (60e-6, 60e-6)
    assert device.mm_conv_utilization == 0.5


def test_nested_operators_count_once_on_a_cpu(write: Write) -> None:
    events = [
        operator(0, 100, "aten::conv2d"),
        operator(10, 90, "aten::convolution"),
        operator(20, 80, "aten::mkldnn_convolution"),
        operator(20, 25, "aten::empty"),
        operator(150, 200, "aten::relu"),
    ]
    result = analysed(write(events))
    assert result.source == "cpu"
    assert result.utilization == 150 / 200
    # What the innermost convolution takes is its time; the rest is dispatch.
    assert result.devices[0].convolution_seconds == 60e-6
    assert result.mm_conv_utilization == 60 / 200


def test_a_linear_operator_counts_as_the_product_inside_of_it(write: Write) -> None:
    events = [operator(0, 100, "aten::linear"), operator(0, 20, "aten::t"), operator(30, 90, "aten::addmm")]
    (device,) = analysed(write(events)).devices
    assert device.matmul_seconds == 60e-6


def test_equal_nested_operators_of_two_threads_are_not_confused(write: Write) -> None:
    events = [operator(0, 50, "aten::mm"), operator(0, 100, "aten::mm", thread=2)]
    (device,) = analysed(write(events)).devices
    assert device.matmul_seconds == 100e-6
    assert {stream.stream: stream.busy_seconds for stream in device.streams} == {
        "99/1": 50e-6,
        "99/2": 100e-6,
    }


def test_frames_are_not_work(write: Write) -> None:
    events = [
        operator(0, 100, "Torch-Compiled Region: 0/0"),
        operator(0, 100, "autograd::engine::evaluate_function: ConvolutionBackward0"),
        operator(0, 100, "ConvolutionBackward0"),
        operator(10, 30, "aten::convolution_backward"),
        operator(40, 50, "graph_0_cpp_fused_convolution_relu_0"),
    ]
    result = analysed(write(events))
    assert result.utilization == 0.3
    assert result.devices[0].convolution_seconds == 20e-6


def test_device_events_are_what_counts_where_there_are_any(write: Write) -> None:
    result = analysed(write([operator(0, 100, "aten::mm"), kernel(50, 60)]))
    assert result.source == "device"
    assert result.utilization == 0.1


def test_busy_time_over_wall_time_may_be_above_1_and_the_window_is_not(write: Write) -> None:
    trace = load_trace(write([kernel(0, 60, GEMM), kernel(60, 90), kernel(0, 30, device=1)]))
    result = analyse(trace, wall_seconds=50e-6)
    assert (result.utilization, result.mm_conv_utilization) == ((1 + 30 / 90) / 2, 60 / 90 / 2)
    assert result.wall_utilization == pytest.approx((90 + 30) / 2 / 50)
    assert result.mm_conv_wall_utilization == pytest.approx(60 / 2 / 50)
    unknown = analyse(trace)
    assert (unknown.wall_utilization, unknown.mm_conv_wall_utilization) == (None, None)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(TraceError, match="wall time of its work must be positive"):
            analyse(trace, wall_seconds=wrong)


def test_over_wall_time_it_is_what_pytorchs_own_utility_computes(write: Write) -> None:
    from torch._functorch.benchmark_utils import compute_utilization

    labels: Raw = {"ph": "M", "name": "process_labels", "pid": 0, "args": {"labels": "GPU 0"}}
    times = [(0, 60), (40, 100), (150, 200), (160, 170)]
    path = write([labels, *(kernel(*time, GEMM, stream=at) for at, time in enumerate(times))])
    result = analyse(load_trace(path), wall_seconds=120e-6)
    assert result.wall_utilization == pytest.approx(compute_utilization(str(path), 120e-6)[0]) == 150 / 120
    assert result.mm_conv_wall_utilization == pytest.approx(compute_utilization(str(path), 120e-6)[1])


def test_busy_intervals_and_kinds_are_functions_of_events(write: Write) -> None:
    events = load_trace(write([kernel(0, 10), kernel(5, 20, GEMM), kernel(30, 40, CONV)])).events
    shifted = [replace(event, start=event.start - 10**9, end=event.end - 10**9) for event in events]
    assert busy_intervals(shifted, ((0, 35_000),)) == ((0, 20_000), (30_000, 35_000))
    assert [event.name for event in of_kind(shifted, "matmul")] == [GEMM]
    assert [event.name for event in of_kind(shifted, "convolution")] == [CONV]


def test_the_trace_of_a_gpu_gives_the_values_worked_out_by_hand() -> None:
    # Window [100, 1100) µs, the step on the CPU; the first kernel begins before it, the last ends after it.
    # Stream  7: [100,150) add  [200,590) to NHWC, convolution 300, batch norm  [700,720) relu
    #            [730,750) triton  [760,765) memset  [1050,1100) product
    # Stream 20: [120,220) copy  [500,650) product
    result = analysed(GPU_TRACE)
    assert result.window_seconds == 1000e-6
    (device,) = result.devices
    assert (device.device, device.name) == ("0", "NVIDIA A100-SXM4-40GB")
    assert {stream.stream: stream.busy_seconds for stream in device.streams} == {"7": 535e-6, "20": 250e-6}
    assert device.busy_seconds == 645e-6
    assert device.convolution_seconds == 300e-6
    assert device.matmul_seconds == 200e-6
    assert device.mm_conv_seconds == 460e-6  # 40 µs of the product ran beside the convolution
    assert device.copy_seconds == 105e-6
    assert (result.utilization, result.mm_conv_utilization) == (0.645, 0.46)


def test_compressed_traces_are_known_by_their_content(tmp_path: Path) -> None:
    misnamed = tmp_path / "trace.json"
    misnamed.write_bytes(gzip.compress(GPU_TRACE.read_bytes()))
    assert analysed(misnamed).devices == analysed(GPU_TRACE).devices


def test_the_list_form_of_chrome_traces_is_read(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps([kernel(0, 10), kernel(30, 40)]), "utf-8")
    assert analysed(path).utilization == 0.5


def test_names_that_are_no_utf8_do_not_cost_the_trace(tmp_path: Path, write: Write) -> None:
    path = tmp_path / "bytes.json"
    path.write_bytes(
        write([kernel(0, 10, "KERNEL"), kernel(30, 40)]).read_bytes().replace(b"KERNEL", b"\xff\x01")
    )
    assert analysed(path).utilization == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (GPU_TRACE.read_bytes()[:-200], "is no JSON, or truncated"),
        (gzip.compress(GPU_TRACE.read_bytes())[:-20], "cannot be read"),
        (gzip.compress(GPU_TRACE.read_bytes())[:40] + b"garbage" * 9, "cannot be read"),
        (b'{"schemaVersion": 1}', "no list of traceEvents"),
        (b"42", "no list of traceEvents"),
        (b"[" * 100_000, "is no JSON, or truncated"),
        (b'{"traceEvents": []}', "no operator, kernel or annotation"),
        (json.dumps([kernel(0, 1) | {"ts": "soon"}]).encode(), "event 0 has ts = 'soon'"),
        (json.dumps([kernel(0, 1), kernel(0, 1) | {"dur": float("nan")}]).encode(), "event 1 has dur = nan"),
        (json.dumps([kernel(5, 1)]).encode(), r"event 0 has the negative duration -4"),
        (json.dumps([annotation(0, 5, "x")]).encode(), "no operator and no kernel"),
        (json.dumps([kernel(0, 0)]).encode(), "spans no time"),
    ],
    ids=[
        "empty",
        "blank",
        "truncated",
        "truncated gzip",
        "corrupt gzip",
        "no events",
        "a number",
        "too deep",
        "no event",
        "text for a time",
        "NaN",
        "negative",
        "nothing ran",
        "no duration",
    ],
)
def test_what_is_no_trace_is_one_clear_error_that_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    path = tmp_path / "some trace.json"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=message) as error:
        analysed(path)
    assert str(path) in str(error.value)
    assert utilization.main([str(path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: trace ")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nowhere\.json cannot be read"):
        load_trace(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (GEMM, "matmul"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x128_16x4_nn_align4>(...)", "matmul"),
        ("void splitKreduce_kernel<32, 16, int, float>(...)", "matmul"),
        ("Cijk_Ailk_Bljk_SB_MT64x64x16_MI32x32", "matmul"),
        ("triton_tem_fused_addmm_relu_1", "matmul"),
        ("aten::addmm", "matmul"),
        ("mkldnn::_linear_pointwise", "matmul"),
        ("mkl::_mkl_linear", "matmul"),
        (CONV, "convolution"),
        ("cudnn_infer_ampere_scudnn_128x64_relu_medium_nn_v1", "convolution"),
        ("void cudnn::winograd_nonfused::winogradForwardData4x4<float>(...)", "convolution"),
        (
            "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_f16_s16816fprop_optimized_f16>(...)",
            "convolution",
        ),
        ("void at::native::conv_depthwise2d_forward_kernel<3, float, int>(...)", "convolution"),
        ("triton_tem_fused_convolution_3", "convolution"),
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::convolution_backward", "convolution"),
        ("mkldnn::_convolution_pointwise", "convolution"),
        ("void cudnn::ops::nchwToNhwcKernel<float>(...)", "other"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float>(...)", "other"),
        ("triton_poi_fused_convolution_relu_0", "other"),
        ("triton_red_fused_mm_sum_4", "other"),
        ("graph_0_cpp_fused_convolution_backward_0", "other"),
        ("void at::native::vectorized_elementwise_kernel<4>(...)", "other"),
        ("aten::mul", "other"),
        ("aten::mean", "other"),
        ("aten::max_pool2d", "other"),
    ],
)
def test_a_name_is_classified_by_what_it_computes(name: str, kind: str) -> None:
    assert classify(name) == kind


@pytest.mark.parametrize(
    ("name", "frame"),
    [
        ("autograd::engine::evaluate_function: MmBackward0", True),
        ("MmBackward0", True),
        ("torch::autograd::AccumulateGrad", True),
        ("Torch-Compiled Region: 0/0", True),
        ("## Call CompiledFxGraph fpibj3hp ##", True),
        ("TorchDynamo Cache Lookup", True),
        ("aten::convolution_backward", False),
        ("aten::mm", False),
        ("graph_0_cpp_fused_relu_0", False),
        ("mkldnn::_convolution_pointwise", False),
    ],
)
def test_frames_are_told_from_operators(name: str, frame: bool) -> None:
    assert is_frame(name) is frame


moments = st.integers(0, 60)
intervals = st.lists(st.tuples(moments, moments), max_size=8)


def points(pieces: Sequence[Interval]) -> set[int]:
    return {point for start, end in pieces for point in range(start, end)}


@given(intervals, intervals)
def test_the_algebra_of_intervals_is_that_of_sets(first: list[Interval], second: list[Interval]) -> None:
    a, b = union(first), union(second)
    assert points(a) == points(first)
    assert length(a) == len(points(first))
    assert list(a) == sorted(a)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(a))
    assert points(intersection(a, b)) == points(first) & points(second)
    assert length(union([*a, *b])) == length(a) + length(b) - length(intersection(a, b))


def test_the_innermost_calls_are_those_without_another_inside() -> None:
    calls = [(0, 100), (10, 50), (20, 30), (60, 90), (100, 110), (100, 110)]
    assert innermost(calls) == [False, False, True, True, False, True]


@pytest.fixture(scope="module")
def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 30 * 30, 10)).eval()


def test_a_trace_of_todays_profiler_is_understood(tmp_path: Path, small_model: nn.Module) -> None:
    kept = tmp_path / "kept" / "trace.json.gz"
    x = torch.randn(2, 3, 32, 32)
    found = benchmark_utilization(small_model, x, trace_path=kept, repeats=2)
    assert 0 < found[1] <= found[0] <= 1

    trace = load_trace(kept)
    names = [event.name for event in trace.events]
    assert names.count(utilization.WINDOW) == 1
    # Two repeats lie in the window; what came before is not in the trace.
    assert names.count("aten::conv2d") == names.count("aten::addmm") == 2
    result = analyse(trace, utilization.WINDOW)
    assert result.source == "cpu"
    assert (result.utilization, result.mm_conv_utilization) == found
    (device,) = result.devices
    assert 0 < device.convolution_seconds < device.busy_seconds <= result.window_seconds
    assert device.matmul_seconds > 0


def test_the_backward_is_in_the_trace_of_a_training_step(tmp_path: Path, small_model: nn.Module) -> None:
    path = tmp_path / "trace.json"
    benchmark_utilization(
        lambda x: small_model(x).sum().backward(), torch.randn(2, 3, 32, 32), trace_path=path, repeats=1
    )
    names = {event.name for event in of_kind(load_trace(path).events, "convolution")}
    assert "aten::convolution_backward" in names


def test_what_the_optimizer_returns_is_what_runs(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    benchmark_utilization(torch.add, (a, b), trace_path=path, optimizer=lambda _: torch.mm, repeats=1)
    names = {event.name for event in load_trace(path).events}
    assert "aten::mm" in names
    assert "aten::add" not in names


def test_generated_kernels_of_a_compiled_function_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() + 1).sum(0)

    found = benchmark_utilization(function, torch.randn(64, 64), path, optimizer=torch.compile)
    assert found[0] > 0
    assert found[1] == 0
    assert any("cpp_fused" in event.name for event in load_trace(path).events)


# What is called, and how ---------------------------------------------------------------------------------


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
    assert all(device is given for device in seen)


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
    assert "aten::mm" in {event.name for event in load_trace(path).events}
    assert torch.is_grad_enabled()


def test_the_profiler_takes_arguments_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    given = {"with_stack": True, "record_shapes": True, "activities": []}
    benchmark_utilization(torch.mm, (X, X.t()), path, kwargs_for_profiler=given)
    events = json.loads(path.read_text("utf-8"))["traceEvents"]
    assert "python_function" in {event.get("cat") for event in events}
    (sizes,) = {str(event["args"]["Input Dims"]) for event in events if event["name"] == "aten::mm"}
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
    assert [protocol.devices for protocol in protocols] == [(torch.device("cuda:1"),), (torch.device("cpu"),)]
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


@pytest.mark.timed
def test_the_command_reads_traces_and_writes_what_it_found(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    second = write([kernel(0, 10, GEMM), kernel(30, 40, device=1)], "two.json.gz")
    out, rows = tmp_path / "out.json", tmp_path / "out.csv"
    assert utilization.main([str(GPU_TRACE), str(second), "--json", str(out), "--csv", str(rows)]) == 0
    assert "64.5%" in capsys.readouterr().out
    data = json.loads(out.read_text("utf-8"))
    assert [trace["utilization"] for trace in data["traces"]] == [0.645, 0.25]
    assert data["environment"] is None
    with rows.open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [(trace["device"], trace["stream"]) for trace in read] == [
        ("0", "all"),
        ("0", "7"),
        ("0", "20"),
        ("0", "all"),
        ("0", "7"),
        ("1", "all"),
        ("1", "7"),
    ]
    assert float(read[0]["utilization"]) == 0.645


@pytest.mark.timed
def test_the_command_traces_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, trace = tmp_path / "out.json", tmp_path / "trace.json"
    common = ["--model", "resnet18", "--size", "32", "--batch", "2", "--device", "cpu", "--repeats", "1"]
    files = ["--json", str(out), "--trace", str(trace)]
    assert utilization.main([*common, "--mode", "training", "--wall-time", *files]) == 0
    printed = capsys.readouterr().out
    assert "matmul+conv" in printed
    assert "ms unprofiled" in printed
    data = json.loads(out.read_text("utf-8"))
    (found,) = data["traces"]
    assert 0 < found["mm_conv_utilization"] <= found["utilization"] <= 1
    assert 0 < found["mm_conv_wall_utilization"] <= found["wall_utilization"]
    assert data["environment"]["libraries"]["torch"] == torch.__version__
    # 20 convolutions forward, and as many operators backward.
    names = [event.name for event in load_trace(trace).events]
    assert names.count("aten::convolution") == names.count("aten::convolution_backward") == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([str(GPU_TRACE), "--model", "resnet18"], "either traces to read or --model"),
        (["--model", "resnet18", "--backend", "eagre"], "Did you mean 'eager'?"),
        (["--model", "resnet1812", "--device", "cpu"], "no model 'resnet1812'"),
        ([str(GPU_TRACE), "--window", "nothing"], "it has: ProfilerStep#3"),
    ],
)
def test_arguments_that_do_not_fit_are_one_clear_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert utilization.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1


@pytest.mark.gpu
def test_a_trace_of_todays_profiler_on_a_gpu_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    a = torch.randn(2048, 2048, device="cuda")
    before = torch.cuda.get_rng_state()
    found = benchmark_utilization(lambda x: torch.mm(x, torch.rand_like(x)), a, path, wall_time=True)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    result = analysed(path, utilization.WINDOW)
    assert result.source == "device"
    assert 0 < found[1] <= found[0] <= 1
    assert result.devices[0].name == torch.cuda.get_device_name()
    assert found.details.wall_utilization is not None
    assert found.details.wall_utilization > 0
