"""Calls under the profiler: warm-up calls, wall time without it, then a window of calls in a trace.

    warm-up     compilation, autotuning and caches happen here
    wall time   where asked for: `repeats` calls, and what they have queued on a device, without the profiler
    window      `repeats` calls and what they have queued, twice: the profiler's own start is in the first

Each begins with the same seed, so that all draw the same random numbers; afterwards the random generators are
in the state that they were in.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from benchmarks.torch_internals import tree_leaves
from benchmarks.traces.analysis import Utilization, analyse, load_trace
from fxpasses.errors import FxpassesError

WINDOW = "benchmark_utilization"
Call = Callable[[], object]
Function = Callable[..., object]

_OURS = ("schedule", "on_trace_ready")
_WITHOUT_QUEUE = ("cpu", "meta")


class UtilizationArgumentError(FxpassesError, ValueError):
    """Arguments that do not go together, or a value that one of them does not take."""


@dataclass(frozen=True)
class Protocol:
    """How often to call, and what to measure.

    Attributes:
        devices: where what is called runs: they are waited for, and traced.
        repeats: calls within the window, and for wall time.
        warmup: calls before.
        seed: of the random generators.
        wall_time: whether to measure wall time without the profiler.
        profiler: further arguments of `torch.profiler.profile`.
    """

    devices: tuple[torch.device, ...]
    repeats: int = 3
    warmup: int = 5
    seed: int = 1337
    wall_time: bool = False
    profiler: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("repeats", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise UtilizationArgumentError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        taken = [name for name in _OURS if name in self.profiler]
        if taken:
            raise UtilizationArgumentError(
                f"{' and '.join(taken)} of the profiler cannot be given: they make the window and the trace. "
                "Take repeats, warmup and trace_path instead."
            )


def traced(call: Call, protocol: Protocol, trace_path: str | Path | None) -> Utilization:
    """The utilisation of the devices while something is called.

    Args:
        call: what to call.
        protocol: how.
        trace_path: the file to keep the trace in (`.json` or `.json.gz`); None to drop it.

    Raises:
        UtilizationArgumentError: the profiler does not take its arguments; nothing was called.
    """
    with tempfile.TemporaryDirectory() as folder, _forked_seeds(protocol.devices):
        path = Path(trace_path) if trace_path is not None else Path(folder) / "trace.json"
        profiler = _profiler(protocol, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(protocol.seed)
        for _ in range(protocol.warmup):
            call()
        wall_seconds = _wall_seconds(call, protocol) if protocol.wall_time else None
        with profiler:
            for _ in range(2):
                torch.manual_seed(protocol.seed)
                synchronize(protocol.devices)
                with record_function(WINDOW):
                    for _ in range(protocol.repeats):
                        call()
                    # Within the window: kernels that are still queued belong to it.
                    synchronize(protocol.devices)
                profiler.step()
        return analyse(load_trace(path), WINDOW, wall_seconds)


def bound(f: Function, input: object, keywords: Mapping[str, object]) -> Callable[[Function], object]:  # noqa: A002
    """What calls `f`, or what was made of it, on `input` as it is.

    A tuple that `f` takes as its positional arguments is spread out. Whatever else it is, also a tuple of
    another number of values, a list or a dict, is the one argument.
    """
    if type(input) is tuple and _takes(f, input, keywords):
        return lambda function: function(*input, **keywords)
    return lambda function: function(input, **keywords)


def devices_of(f: Function, *arguments: object) -> tuple[torch.device, ...]:
    """The accelerators that tensors of the arguments, or of the module that is called, lie on.

    Where all lie on the CPU, that; where there are none, this machine's accelerator if it has one.
    """
    owner = f if isinstance(f, nn.Module) else getattr(f, "__self__", None)
    held = [*owner.parameters(), *owner.buffers()] if isinstance(owner, nn.Module) else []
    tensors = [leaf for leaf in (*tree_leaves(arguments), *held) if isinstance(leaf, torch.Tensor)]
    found = dict.fromkeys(tensor.device for tensor in tensors)
    accelerators = tuple(device for device in found if device.type not in _WITHOUT_QUEUE)
    here = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return accelerators or tuple(found)[:1] or (here,)


def synchronize(devices: Sequence[torch.device]) -> None:
    """Waits until everything that is queued has run."""
    for device in devices:
        if device.type not in _WITHOUT_QUEUE:
            torch.accelerator.synchronize(device)


def _takes(f: Function, arguments: tuple[object, ...], keywords: Mapping[str, object]) -> bool:
    try:
        signature = inspect.signature(f.forward if isinstance(f, nn.Module) else f)
    except ValueError:
        return True  # torch's own functions have none
    try:
        signature.bind(*arguments, **keywords)
    except TypeError:
        return False
    return True


def _profiler(protocol: Protocol, path: Path) -> profile:
    kinds = [getattr(ProfilerActivity, device.type.upper(), None) for device in protocol.devices]
    given = protocol.profiler.get("activities", [kind for kind in kinds if kind is not None])
    # The window is an annotation of the CPU's.
    activities = {ProfilerActivity.CPU, *given}  # type: ignore[misc]  # as profile takes it
    try:
        return profile(
            **{**protocol.profiler, "activities": activities},  # type: ignore[arg-type]
            schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
            on_trace_ready=lambda finished: finished.export_chrome_trace(str(path)),
        )
    except TypeError as error:
        raise UtilizationArgumentError(f"the profiler does not take its arguments: {error}.") from error


def _wall_seconds(call: Call, protocol: Protocol) -> float:
    torch.manual_seed(protocol.seed)
    synchronize(protocol.devices)
    start = time.perf_counter()
    for _ in range(protocol.repeats):
        call()
    synchronize(protocol.devices)
    return time.perf_counter() - start


def _forked_seeds(devices: Sequence[torch.device]) -> contextlib.AbstractContextManager[None]:
    kind = devices[0].type
    if kind in _WITHOUT_QUEUE:
        return torch.random.fork_rng(devices=())
    everyone = range(torch.get_device_module(kind).device_count())
    return torch.random.fork_rng(devices=everyone, device_type=kind)
