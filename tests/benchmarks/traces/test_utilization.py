"""Utilisation of what runs here: today's profiler is understood, and the command says what it found."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from made_traces import GEMM, GPU_TRACE, WriteTrace, analysed, kernel
from torch import nn

from benchmarks import utilization
from benchmarks.traces.analysis import analyse, load_trace, of_kind
from benchmarks.utilization import benchmark_utilization


@pytest.fixture(scope="module")
def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 30 * 30, 10)).eval()


def test_a_trace_of_todays_profiler_is_understood(tmp_path: Path, small_model: nn.Module) -> None:
    kept = tmp_path / "kept" / "trace.json.gz"
    x = torch.randn(2, 3, 32, 32)
    found = benchmark_utilization(small_model, x, trace_path=kept, repeats=2)
    assert 0 < found[1] <= found[0] <= 1

    trace = load_trace(kept)
    names = [each.name for each in trace.events]
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
    names = {each.name for each in of_kind(load_trace(path).events, "convolution")}
    assert "aten::convolution_backward" in names


def test_what_the_optimizer_returns_is_what_runs(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    benchmark_utilization(torch.add, (a, b), trace_path=path, optimizer=lambda _: torch.mm, repeats=1)
    names = {each.name for each in load_trace(path).events}
    assert "aten::mm" in names
    assert "aten::add" not in names


def test_generated_kernels_of_a_compiled_function_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() + 1).sum(0)

    found = benchmark_utilization(function, torch.randn(64, 64), path, optimizer=torch.compile)
    assert found[0] > 0
    assert found[1] == 0
    assert any("cpp_fused" in each.name for each in load_trace(path).events)


@pytest.mark.timed
def test_the_command_reads_traces_and_writes_what_it_found(
    tmp_path: Path, write_trace: WriteTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    second = write_trace([kernel(0, 10, GEMM), kernel(30, 40, device=1)], "two.json.gz")
    out, rows = tmp_path / "out.json", tmp_path / "out.csv"
    assert utilization.main([str(GPU_TRACE), str(second), "--json", str(out), "--csv", str(rows)]) == 0
    assert "64.5%" in capsys.readouterr().out
    data = json.loads(out.read_text("utf-8"))
    assert [each["utilization"] for each in data["traces"]] == [0.645, 0.25]
    assert data["environment"] is None
    with rows.open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [(each["device"], each["stream"]) for each in read] == [
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
    names = [each.name for each in load_trace(trace).events]
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
