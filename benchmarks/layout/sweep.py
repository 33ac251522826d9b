"""The sweep: what the convolutions, copies and layout-sensitive operators of given models cost on a device.

    models --recorded on fake tensors--> distinct cases with their occurrences (Workload)
           --measured, the heaviest first, until the budget ends--> variants and what was not reached
           --> device profile

The heaviest case is the one with the most arithmetic (for an operator: elements) over all its occurrences.
The peaks of the device and the ladder of copies come first: they are the cost model's fallback for whatever
was not reached.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch

from benchmarks.layout.measure import Variant, measure_convolution
from benchmarks.layout.operators import OperatorCase, layout_sensitive, measure_operator
from benchmarks.layout.setting import DTYPES, Setting
from benchmarks.operators.inputs.notation import Call, TensorSpec, parse_call
from benchmarks.operators.inputs.suites import Entry, Mode, record
from benchmarks.shared.environment import environment_block
from fxpasses.backend.memory import arrange_memory
from fxpasses.devices.convolutions import (
    DIRECTIONS,
    Convolution,
    Direction,
)
from fxpasses.devices.keys import bytes_key
from fxpasses.devices.measuring import Measurer
from fxpasses.devices.profile import (
    COLD,
    HOT,
    LAYOUT_COPY,
    OPERANDS,
    WEIGHT_COPY,
    DeviceProfile,
    Roofline,
)
from fxpasses.devices.store import device_name
from fxpasses.errors import FxpassesError

aten = torch.ops.aten


class SweepError(FxpassesError, ValueError):
    """A model that cannot be recorded at the given batch and size."""


@dataclass
class Workload:
    """The distinct cases of some models, with their occurrences; one-dimensional convolutions are counted."""

    convolutions: Counter[tuple[Convolution, Direction]] = field(default_factory=Counter)
    operators: dict[tuple[str, str], OperatorCase] = field(default_factory=dict)
    occurrences: Counter[tuple[str, str]] = field(default_factory=Counter)
    one_dimensional: int = 0

    def add(self, overload: str, call: Call, count: int, *, training: bool) -> None:
        """Adds `count` occurrences of a recorded call."""
        if overload in ("aten.convolution.default", "aten.convolution_backward.default"):
            self._add_convolution(call, count, backward=overload == "aten.convolution_backward.default")
        for case in layout_sensitive(overload, call, training=training):
            self.operators[case.operator, case.key] = case
            self.occurrences[case.operator, case.key] += count

    def __iadd__(self, other: Workload) -> Workload:
        """Adds what another batch size needs."""
        self.convolutions.update(other.convolutions)
        self.operators |= other.operators
        self.occurrences.update(other.occurrences)
        self.one_dimensional += other.one_dimensional
        return self

    def _add_convolution(self, call: Call, count: int, *, backward: bool) -> None:
        # convolution:          input, weight, bias, stride, ..., groups
        # convolution_backward: grad_output, input, weight, bias_sizes, stride, ..., groups, output_mask
        first = 1 if backward else 0
        x, weight = call.args[first], call.args[first + 1]
        assert isinstance(x, TensorSpec)
        assert isinstance(weight, TensorSpec)
        if len(x.shape) not in (4, 5):
            self.one_dimensional += count
            return
        stride, padding, dilation, transposed, output_padding, groups = call.args[first + 3 : first + 9]
        case = Convolution.of(
            x.shape,
            weight.shape,
            cast("list[int]", stride),
            cast("list[int]", padding),
            cast("list[int]", dilation),
            bool(transposed),
            cast("list[int]", output_padding),
            cast(int, groups),
        )
        mask = cast("list[bool]", call.args[10])[:2] if backward else [True]
        for direction, wanted in zip(DIRECTIONS[1:] if backward else DIRECTIONS[:1], mask, strict=True):
            if wanted:
                self.convolutions[case, direction] += count


@dataclass(frozen=True)
class Task:
    """One case to measure, with the label under which it is reported when the budget ends before it."""

    label: str
    run: Callable[[Setting], list[Variant]]


@dataclass(frozen=True)
class SweepResult:
    """What a sweep measured in one dtype, and the labels of what it did not reach."""

    variants: tuple[Variant, ...]
    roofline: Roofline
    not_measured: tuple[str, ...]


def collect(
    specs: Sequence[str], *, batch: int, size: Sequence[int], modes: Sequence[Mode], dtype: str
) -> Workload:
    """Records the models without computing anything.

    Args:
        specs: model specifications; timm's where they have no source.
        batch: images, or clips, a batch.
        size: the spatial dimensions of the input, [H, W] or [T, H, W].
        modes: inference records the forward pass in eval mode, training forward and backward.
        dtype: of parameters and inputs.

    Raises:
        ModelSpecError: a model does not exist or cannot be built.
        SweepError: a model does not run on inputs of this size.
    """
    workload = Workload()
    for spec in specs:
        named = spec if ":" in spec else f"timm:{spec}"
        for mode in modes:
            try:
                counts = record(Entry(named, batch, (3, *size)), mode, DTYPES[dtype]).counts
            except FxpassesError:
                raise
            except Exception as error:
                shape = [batch, 3, *size]
                raise SweepError(f"{named} does not run on an input of the size {shape}: {error}") from error
            for overload, calls in counts.items():
                for text, count in calls.items():
                    workload.add(overload, parse_call(text), count, training=mode == "training")
    return workload


def tasks(workload: Workload, device: torch.device, dtype: str) -> list[Task]:
    """Everything there is to measure for a workload, in the order of its worth."""
    copies = [
        Task(f"{operator} {bytes_key(n)}", partial(_measure_copy, operator, n))
        for operator in (LAYOUT_COPY, WEIGHT_COPY)
        for n in _copy_sizes(device)
    ]
    convolutions = sorted(workload.convolutions.items(), key=lambda item: -item[0][0].flops * item[1])
    operators = sorted(
        workload.operators.items(), key=lambda item: -item[1].elements * workload.occurrences[item[0]]
    )
    return [
        *copies,
        *(
            Task(f"convolution.{direction} {case.key} {dtype}", partial(measure_convolution, case, direction))
            for (case, direction), _ in convolutions
        ),
        *(
            Task(f"{operator} {key} {dtype}", partial(measure_operator, case))
            for (operator, key), case in operators
        ),
    ]


def sweep(todo: Iterable[Task], setting: Setting, deadline: float) -> SweepResult:
    """Measures the device's peaks, then the tasks in their order.

    Args:
        todo: from `tasks`; a progress bar may be around it.
        setting: on what and how to measure.
        deadline: the value of `time.monotonic` from which on no task is begun.
    """
    if setting.device.type == "cpu":
        # As the backend has it for large graphs. Else what allocates its result pays for page faults beyond
        # 32 MiB, 13.6 ms instead of 2, and what writes into a buffer of its own does not.
        arrange_memory("keep")
    peaks = _measure_roofline(setting)
    variants: list[Variant] = []
    not_measured: list[str] = []
    for task in todo:
        if time.monotonic() >= deadline:
            not_measured.append(task.label)
        else:
            variants += task.run(setting)
    return SweepResult(tuple(variants), peaks, tuple(not_measured))


def to_profile(
    results: Sequence[SweepResult], device: torch.device, *, tf32: bool, hot: bool
) -> DeviceProfile:
    """The device profile of sweeps in several dtypes.

    Args:
        results: of `sweep`.
        device: where they ran.
        tf32: whether a GPU used TF32 for float32.
        hot: whether operands were in a cache.
    """
    block = environment_block(str(device))
    libraries = {name: str(block[name]) for name in ("onednn", "cudnn", "cuda") if block.get(name)}
    rows = [variant for result in results for variant in result.variants if variant.status == "measured"]
    return DeviceProfile(
        device=device_name(device),
        torch_version=torch.__version__,
        libraries=libraries,
        settings={
            "float32_precision": "tf32" if tf32 and device.type == "cuda" else "ieee",
            OPERANDS: HOT if hot else COLD,
        },
        rooflines=tuple(result.roofline for result in results),
        measurements=tuple(variant.measurement() for variant in rows),
    )


def _measurer(setting: Setting) -> Measurer:
    return Measurer(setting.device, setting.torch_dtype, setting.effort, hot=setting.hot)


def _copy_sizes(device: torch.device) -> list[int]:
    return [2**exponent for exponent in range(14, 31 if device.type == "cuda" else 27, 2)]


def _measure_copy(operator: str, num_bytes: int, setting: Setting) -> list[Variant]:
    measurer = _measurer(setting)
    measure = measurer.weight_copy if operator == WEIGHT_COPY else measurer.copy
    with setting.arithmetic():
        return [Variant.of(timing) for timing in measure(num_bytes)]


def _measure_roofline(setting: Setting) -> Roofline:
    with setting.arithmetic():
        return _measurer(setting).peaks()
