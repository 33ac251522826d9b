"""Traces: exact values where the answers are known, clear errors on what is no trace."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from made_traces import CONV, GEMM, GPU_TRACE, Raw, WriteTrace, analysed, annotation, kernel, operator

from benchmarks import utilization
from benchmarks.traces.analysis import TraceError, analyse, busy_intervals, load_trace, of_kind


def test_overlapping_streams_count_once(write_trace: WriteTrace) -> None:
    result = analysed(write_trace([kernel(0, 60), kernel(40, 100, stream=20), kernel(150, 200)]))
    assert result.utilization == 150 / 200
    (device,) = result.devices
    assert {each.stream: each.utilization for each in device.streams} == {"7": 110 / 200, "20": 60 / 200}
    assert device.busy_seconds == 150e-6


def test_gaps_are_idle(write_trace: WriteTrace) -> None:
    result = analysed(write_trace([kernel(0, 10), kernel(30, 40), kernel(90, 100)]))
    assert result.window_seconds == 100e-6
    assert result.utilization == 0.3


def test_kernels_back_to_back_leave_no_gap(write_trace: WriteTrace) -> None:
    assert analysed(write_trace([kernel(0, 10), kernel(10, 40)])).utilization == 1.0


def test_a_kernel_is_clipped_to_the_window(write_trace: WriteTrace) -> None:
    events = [annotation(100, 200, "ProfilerStep#1"), kernel(50, 120), kernel(190, 900)]
    result = analysed(write_trace(events))
    assert result.window == "ProfilerStep#*"
    assert result.utilization == 0.3


def test_a_device_that_is_always_busy_is_never_above_1(write_trace: WriteTrace) -> None:
    events = [annotation(100, 200, "ProfilerStep#1")]
    events += [kernel(0, 300, GEMM, stream=each) for each in range(4)]
    result = analysed(write_trace(events))
    assert (result.utilization, result.mm_conv_utilization, result.mm_conv_share) == (1.0, 1.0, 1.0)


def test_a_window_of_several_steps_leaves_out_what_lies_between(write_trace: WriteTrace) -> None:
    events = [annotation(0, 10, "step"), annotation(90, 100, "step"), kernel(0, 5), kernel(40, 60)]
    assert analysed(write_trace(events), "step").utilization == 5 / 20


def test_without_an_annotation_the_window_is_all_events_of_cpu_and_device(write_trace: WriteTrace) -> None:
    result = analysed(write_trace([operator(0, 10, "aten::mm"), kernel(50, 100)]))
    assert result.window_seconds == 100e-6
    assert result.utilization == 0.5


def test_a_window_that_is_not_there_lists_those_that_are(write_trace: WriteTrace) -> None:
    path = write_trace([annotation(0, 10, "forward"), kernel(0, 5)])
    with pytest.raises(TraceError, match=r"trace\.json has no annotation .* 'backward'; it has: forward"):
        analysed(path, "backward")


def test_two_devices_are_averaged_and_told_apart(write_trace: WriteTrace) -> None:
    events = [kernel(0, 100, GEMM), kernel(0, 50, CONV, device=1), kernel(50, 60, device=1)]
    result = analysed(write_trace(events))
    assert [each.device for each in result.devices] == ["0", "1"]
    assert [each.utilization for each in result.devices] == [1.0, 0.6]
    assert result.utilization == 0.8
    assert result.mm_conv_utilization == 0.75
    assert result.mm_conv_share == 150 / 160


def test_the_same_stream_number_on_two_devices_is_two_streams(write_trace: WriteTrace) -> None:
    result = analysed(write_trace([kernel(0, 100), kernel(0, 100, device=1)]))
    assert [[each.stream for each in device.streams] for device in result.devices] == [["7"], ["7"]]
    assert [device.busy_seconds for device in result.devices] == [100e-6, 100e-6]


def test_ten_devices_stand_in_the_order_of_their_numbers(write_trace: WriteTrace) -> None:
    result = analysed(write_trace([kernel(0, 10, device=each) for each in range(12)]))
    assert [each.device for each in result.devices] == [str(each) for each in range(12)]


def test_products_and_convolutions_that_overlap_count_once_together(write_trace: WriteTrace) -> None:
    events = [kernel(0, 60, GEMM), kernel(40, 100, CONV, stream=20), kernel(100, 200)]
    (device,) = analysed(write_trace(events)).devices
    assert (device.matmul_seconds, device.convolution_seconds) == (60e-6, 60e-6)
    assert device.mm_conv_utilization == 0.5


def test_nested_operators_count_once_on_a_cpu(write_trace: WriteTrace) -> None:
    events = [
        operator(0, 100, "aten::conv2d"),
        operator(10, 90, "aten::convolution"),
        operator(20, 80, "aten::mkldnn_convolution"),
        operator(20, 25, "aten::empty"),
        operator(150, 200, "aten::relu"),
    ]
    result = analysed(write_trace(events))
    assert result.source == "cpu"
    assert result.utilization == 150 / 200
    # What the innermost convolution takes is its time; the rest is dispatch.
    assert result.devices[0].convolution_seconds == 60e-6
    assert result.mm_conv_utilization == 60 / 200


def test_a_linear_operator_counts_as_the_product_inside_of_it(write_trace: WriteTrace) -> None:
    events = [operator(0, 100, "aten::linear"), operator(0, 20, "aten::t"), operator(30, 90, "aten::addmm")]
    (device,) = analysed(write_trace(events)).devices
    assert device.matmul_seconds == 60e-6


def test_equal_nested_operators_of_two_threads_are_not_confused(write_trace: WriteTrace) -> None:
    events = [operator(0, 50, "aten::mm"), operator(0, 100, "aten::mm", thread=2)]
    (device,) = analysed(write_trace(events)).devices
    assert device.matmul_seconds == 100e-6
    assert {each.stream: each.busy_seconds for each in device.streams} == {"99/1": 50e-6, "99/2": 100e-6}


def test_frames_are_not_work(write_trace: WriteTrace) -> None:
    events = [
        operator(0, 100, "Torch-Compiled Region: 0/0"),
        operator(0, 100, "autograd::engine::evaluate_function: ConvolutionBackward0"),
        operator(0, 100, "ConvolutionBackward0"),
        operator(10, 30, "aten::convolution_backward"),
        operator(40, 50, "graph_0_cpp_fused_convolution_relu_0"),
    ]
    result = analysed(write_trace(events))
    assert result.utilization == 0.3
    assert result.devices[0].convolution_seconds == 20e-6


def test_device_events_are_what_counts_where_there_are_any(write_trace: WriteTrace) -> None:
    result = analysed(write_trace([operator(0, 100, "aten::mm"), kernel(50, 60)]))
    assert result.source == "device"
    assert result.utilization == 0.1


def test_busy_time_over_wall_time_may_be_above_1_and_the_window_is_not(write_trace: WriteTrace) -> None:
    trace = load_trace(write_trace([kernel(0, 60, GEMM), kernel(60, 90), kernel(0, 30, device=1)]))
    result = analyse(trace, wall_seconds=50e-6)
    assert (result.utilization, result.mm_conv_utilization) == ((1 + 30 / 90) / 2, 60 / 90 / 2)
    assert result.wall_utilization == pytest.approx((90 + 30) / 2 / 50)
    assert result.mm_conv_wall_utilization == pytest.approx(60 / 2 / 50)
    unknown = analyse(trace)
    assert (unknown.wall_utilization, unknown.mm_conv_wall_utilization) == (None, None)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(TraceError, match="wall time of its work must be positive"):
            analyse(trace, wall_seconds=wrong)


def test_over_wall_time_it_is_what_pytorchs_own_utility_computes(write_trace: WriteTrace) -> None:
    from torch._functorch.benchmark_utils import compute_utilization

    labels: Raw = {"ph": "M", "name": "process_labels", "pid": 0, "args": {"labels": "GPU 0"}}
    times = [(0, 60), (40, 100), (150, 200), (160, 170)]
    path = write_trace([labels, *(kernel(*each, GEMM, stream=at) for at, each in enumerate(times))])
    result = analyse(load_trace(path), wall_seconds=120e-6)
    assert result.wall_utilization == pytest.approx(compute_utilization(str(path), 120e-6)[0]) == 150 / 120
    assert result.mm_conv_wall_utilization == pytest.approx(compute_utilization(str(path), 120e-6)[1])


def test_busy_intervals_and_kinds_are_functions_of_events(write_trace: WriteTrace) -> None:
    events = load_trace(write_trace([kernel(0, 10), kernel(5, 20, GEMM), kernel(30, 40, CONV)])).events
    shifted = [replace(each, start=each.start - 10**9, end=each.end - 10**9) for each in events]
    assert busy_intervals(shifted, ((0, 35_000),)) == ((0, 20_000), (30_000, 35_000))
    assert [each.name for each in of_kind(shifted, "matmul")] == [GEMM]
    assert [each.name for each in of_kind(shifted, "convolution")] == [CONV]


def test_the_trace_of_a_gpu_gives_the_values_worked_out_by_hand() -> None:
    # Window [100, 1100) µs, the step on the CPU; the first kernel begins before it, the last ends after it.
    # Stream  7: [100,150) add  [200,590) to NHWC, convolution 300, batch norm  [700,720) relu
    #            [730,750) triton  [760,765) memset  [1050,1100) product
    # Stream 20: [120,220) copy  [500,650) product
    result = analysed(GPU_TRACE)
    assert result.window_seconds == 1000e-6
    (device,) = result.devices
    assert (device.device, device.name) == ("0", "NVIDIA A100-SXM4-40GB")
    assert {each.stream: each.busy_seconds for each in device.streams} == {"7": 535e-6, "20": 250e-6}
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


def test_names_that_are_no_utf8_do_not_cost_the_trace(tmp_path: Path, write_trace: WriteTrace) -> None:
    path = tmp_path / "bytes.json"
    path.write_bytes(
        write_trace([kernel(0, 10, "KERNEL"), kernel(30, 40)]).read_bytes().replace(b"KERNEL", b"\xff\x01")
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
