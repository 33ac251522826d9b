"""Traces made by hand, for tests of what reads them: times in microseconds, use worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.traces.analysis import Utilization, analyse, load_trace

GPU_TRACE = Path(__file__).parent / "data" / "gpu_trace.json"
GEMM, CONV, ADD = (
    "ampere_sgemm_128x64_tn",
    "sm80_xmma_fprop_implicit_gemm_f32",
    "vectorized_elementwise_kernel",
)

Raw = dict[str, object]
WriteTrace = Callable[..., Path]


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
