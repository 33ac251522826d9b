"""Device utilisation from a Chrome trace of torch's profiler, as pure functions over its events.

    busy(device)  = union of the intervals in which it runs a kernel or a copy, on any stream, clipped to W
    utilisation   = |busy| / |W|,   over n devices: sum of |busy| / (n |W|)   so never above 1

W is the profiled window: the spans of an annotation (`ProfilerStep#...` where the profiler had a schedule),
else everything from the first event to the last. Only devices that run something in the trace count. On a
trace without device events the device is the CPU, the streams are its threads, and what it runs are
operators: nested ones add nothing to a union, frames such as autograd's nodes are left out, and only the
innermost operator that is a matrix product or convolution is counted as one.

A profiler slows down what it watches, and with it the window. Where the wall time of the same work without
the profiler is known, |busy| over it is another utilisation, which may be above 1: on a CPU, profiling makes
operators longer.
"""

from __future__ import annotations

import fnmatch
import gzip
import json
import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

from benchmarks.traces.intervals import Interval, Intervals, innermost, intersection, length, union
from benchmarks.traces.kernel_patterns import Kind, classify, is_frame
from fxpasses.errors import FxpassesError

Source = Literal["device", "cpu"]

DEVICE_CATEGORIES = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
CPU_CATEGORIES = frozenset({"cpu_op"})
ANNOTATION = "user_annotation"
PROFILER_STEPS = "ProfilerStep#*"
# What the default window spans; `gpu_user_annotation` repeats an annotation of the CPU and is no work.
_TIMED = DEVICE_CATEGORIES | CPU_CATEGORIES | {ANNOTATION, "cuda_runtime", "cuda_driver"}


class TraceError(FxpassesError, ValueError):
    """A file that is no trace, or a trace that does not hold what was asked for."""


@dataclass(frozen=True)
class Event:
    """One event with a duration, in integer nanoseconds.

    `device` and `stream` are those of a kernel; for the CPU they are ``cpu`` and the process and thread.
    """

    name: str
    category: str
    start: int
    end: int
    device: str
    stream: str


@dataclass(frozen=True)
class Trace:
    """The events of a file, and the names of its devices."""

    path: str
    events: tuple[Event, ...]
    device_names: Mapping[str, str]


@dataclass(frozen=True)
class StreamUse:
    """A stream of a device, or a thread of the CPU."""

    stream: str
    busy_seconds: float
    utilization: float


@dataclass(frozen=True)
class DeviceUse:
    """One device within the window; seconds are lengths of unions over its streams.

    Attributes:
        device: such as ``0``, or ``cpu``.
        name: the marketing name, where the trace has it.
        busy_seconds: time in which anything ran.
        matmul_seconds: time in which a matrix product ran.
        convolution_seconds: time in which a convolution ran.
        mm_conv_seconds: time in which one of either ran.
        copy_seconds: time in which memory was copied or set.
        utilization: busy over the window, in [0, 1].
        mm_conv_utilization: matrix products and convolutions over the window, in [0, 1].
        streams: each by itself.
    """

    device: str
    name: str
    busy_seconds: float
    matmul_seconds: float
    convolution_seconds: float
    mm_conv_seconds: float
    copy_seconds: float
    utilization: float
    mm_conv_utilization: float
    streams: tuple[StreamUse, ...]


@dataclass(frozen=True)
class Utilization:
    """All devices of a trace, and the means over them.

    Attributes:
        path: of the trace.
        source: whether devices ran anything, or the CPU alone.
        window: the annotations that are the window, or what is in their place.
        window_seconds: the length of the window.
        devices: those that ran anything.
        wall_seconds: how long the work of the window takes without the profiler; None where nobody said.
    """

    path: str
    source: Source
    window: str
    window_seconds: float
    devices: tuple[DeviceUse, ...]
    wall_seconds: float | None = None

    @property
    def utilization(self) -> float:
        """The mean over the devices of the share of the window in which they were busy, in [0, 1]."""
        return sum(device.utilization for device in self.devices) / len(self.devices)

    @property
    def mm_conv_utilization(self) -> float:
        """The same of matrix products and convolutions."""
        return sum(device.mm_conv_utilization for device in self.devices) / len(self.devices)

    @property
    def wall_utilization(self) -> float | None:
        """The mean over the devices of busy time over wall time without the profiler; None without it."""
        return self._over_wall_time([device.busy_seconds for device in self.devices])

    @property
    def mm_conv_wall_utilization(self) -> float | None:
        """The same of matrix products and convolutions."""
        return self._over_wall_time([device.mm_conv_seconds for device in self.devices])

    def _over_wall_time(self, seconds: Sequence[float]) -> float | None:
        return sum(seconds) / len(seconds) / self.wall_seconds if self.wall_seconds else None

    @property
    def mm_conv_share(self) -> float:
        """Matrix products and convolutions over busy time of all devices; 0 where nothing was busy."""
        busy = sum(device.busy_seconds for device in self.devices)
        return sum(device.mm_conv_seconds for device in self.devices) / busy if busy else 0.0


def load_trace(path: str | PathLike[str]) -> Trace:
    """Reads a trace, plain or compressed by gzip, whatever its name ends with.

    Raises:
        TraceError: the file is missing, empty, truncated, corrupt or no trace of torch's profiler.
    """
    name = str(path)
    try:
        content = Path(path).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"trace {name} cannot be read: {error}") from error
    if not content.strip():
        raise TraceError(f"trace {name} is empty; profile again and export it after the profiler has ended.")
    try:
        # The profiler writes names of kernels as they are: bytes that are no UTF-8 must not cost the trace.
        data = json.loads(content.decode("utf-8", errors="replace"), strict=False)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"trace {name} is no JSON, or truncated: {error}") from error
    raw = data.get("traceEvents") if isinstance(data, dict) else data
    if not isinstance(raw, list):
        raise TraceError(f"trace {name} has no list of traceEvents; export it by export_chrome_trace.")
    events = tuple(_event(name, index, event) for index, event in enumerate(raw) if _is_timed(event))
    if not events:
        raise TraceError(f"trace {name} holds no operator, kernel or annotation with a duration.")
    return Trace(name, events, _device_names(data))


def analyse(trace: Trace, window: str | None = None, wall_seconds: float | None = None) -> Utilization:
    """The utilisation of every device of a trace.

    Args:
        trace: from `load_trace`.
        window: a pattern (`*`, `?`) of names of annotations whose spans are the window. None: the
            profiler's steps where there are any, else from the first event to the last.
        wall_seconds: how long the work of the window takes without the profiler, where that is known.

    Raises:
        TraceError: no annotation fits the pattern, nothing in the trace ever ran on a device or CPU, or the
            wall time is none.
    """
    if wall_seconds is not None and not 0 < wall_seconds < math.inf:
        raise TraceError(
            f"trace {trace.path}: the wall time of its work must be positive, got {wall_seconds}."
        )
    spans, description = _window(trace, window)
    source: Source = "device" if any(event.category in DEVICE_CATEGORIES for event in trace.events) else "cpu"
    running = [event for event in trace.events if _runs(event, source)]
    if not running:
        raise TraceError(
            f"trace {trace.path} holds no operator and no kernel; profile with activity CPU or CUDA."
        )
    by_device: dict[str, list[Event]] = defaultdict(list)
    for event in running:
        by_device[event.device].append(event)
    devices = tuple(
        _device_use(device, trace.device_names.get(device, ""), by_device[device], spans)
        for device in sorted(by_device, key=_natural)
    )
    return Utilization(trace.path, source, description, length(spans) / 1e9, devices, wall_seconds)


def busy_intervals(events: Iterable[Event], window: Intervals) -> Intervals:
    """When at least one of the events runs, within the window."""
    return intersection(union((event.start, event.end) for event in events), window)


def of_kind(events: Sequence[Event], kind: Kind) -> list[Event]:
    """The events that compute something of a kind; of nested ones that compute, only the innermost."""
    by_stream: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        if event.category not in ("gpu_memcpy", "gpu_memset") and classify(event.name) != "other":
            by_stream[event.stream].append(event)
    found = []
    for candidates in by_stream.values():
        nested = candidates[0].category in CPU_CATEGORIES
        intervals: list[Interval] = [(event.start, event.end) for event in candidates]
        inner = innermost(intervals) if nested else [True] * len(candidates)
        found += [event for event, keep in zip(candidates, inner, strict=True) if keep]
    return [event for event in found if classify(event.name) == kind]


def _device_use(device: str, name: str, events: Sequence[Event], window: Intervals) -> DeviceUse:
    whole = length(window)
    products = busy_intervals(of_kind(events, "matmul"), window)
    convolutions = busy_intervals(of_kind(events, "convolution"), window)
    copies = [event for event in events if event.category in ("gpu_memcpy", "gpu_memset")]
    busy, both = length(busy_intervals(events, window)), length(union([*products, *convolutions]))
    by_stream: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        by_stream[event.stream].append(event)
    streams = []
    for stream in sorted(by_stream, key=_natural):
        of_stream = length(busy_intervals(by_stream[stream], window))
        streams.append(StreamUse(stream, of_stream / 1e9, of_stream / whole))
    return DeviceUse(
        device=device,
        name=name,
        busy_seconds=busy / 1e9,
        matmul_seconds=length(products) / 1e9,
        convolution_seconds=length(convolutions) / 1e9,
        mm_conv_seconds=both / 1e9,
        copy_seconds=length(busy_intervals(copies, window)) / 1e9,
        utilization=busy / whole,
        mm_conv_utilization=both / whole,
        streams=tuple(streams),
    )


def _window(trace: Trace, pattern: str | None) -> tuple[Intervals, str]:
    annotations = [event for event in trace.events if event.category == ANNOTATION]
    wanted = PROFILER_STEPS if pattern is None else pattern
    spans = union((e.start, e.end) for e in annotations if fnmatch.fnmatchcase(e.name, wanted))
    if spans:
        return spans, wanted
    if pattern is not None:
        names = ", ".join(sorted({event.name for event in annotations})[:20]) or "(none)"
        raise TraceError(
            f"trace {trace.path} has no annotation with a duration that fits {pattern!r}; it has: {names}."
        )
    everything = union([(min(e.start for e in trace.events), max(e.end for e in trace.events))])
    if not everything:
        raise TraceError(f"trace {trace.path} spans no time: all its events have a duration of 0.")
    return everything, "first event to last"


def _runs(event: Event, source: Source) -> bool:
    if source == "device":
        return event.category in DEVICE_CATEGORIES
    return event.category in CPU_CATEGORIES and not is_frame(event.name)


def _is_timed(raw: object) -> bool:
    return isinstance(raw, dict) and raw.get("ph") == "X" and raw.get("cat") in _TIMED


def _event(path: str, index: int, raw: Mapping[str, object]) -> Event:
    start, duration = _nanoseconds(path, index, raw, "ts"), _nanoseconds(path, index, raw, "dur")
    if duration < 0:
        raise TraceError(f"trace {path}: event {index} has the negative duration {raw['dur']!r}.")
    category, process, thread = str(raw["cat"]), raw.get("pid"), raw.get("tid")
    given = raw.get("args")
    arguments: Mapping[str, object] = given if isinstance(given, dict) else {}
    if category in DEVICE_CATEGORIES:
        device, stream = arguments.get("device", process), arguments.get("stream", thread)
        return Event(str(raw.get("name", "")), category, start, start + duration, str(device), str(stream))
    return Event(str(raw.get("name", "")), category, start, start + duration, "cpu", f"{process}/{thread}")


def _nanoseconds(path: str, index: int, raw: Mapping[str, object], key: str) -> int:
    value = raw.get(key)
    # NaN and infinity pass json.loads; neither is a time.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        raise TraceError(f"trace {path}: event {index} has {key} = {value!r}, which is no time in µs.")
    return round(value * 1000)


def _device_names(data: object) -> dict[str, str]:
    properties = data.get("deviceProperties") if isinstance(data, dict) else None
    if not isinstance(properties, list):
        return {}
    found = [device for device in properties if isinstance(device, dict) and "id" in device]
    return {str(device["id"]): str(device.get("name", "")) for device in found}


def _natural(text: str) -> tuple[int, str]:
    """Numbers in the order of their values, before anything else."""
    return (int(text), "") if text.isdecimal() else (1 << 62, text)
