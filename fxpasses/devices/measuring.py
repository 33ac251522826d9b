"""Measuring what operators cost on a device: in both layouts, in turns, with operands that no cache holds.

    Measurer(device, dtype).convolution(case, direction)     rows of a device profile
                           .operator(case)
                           .copy(bytes)
                           .peaks()                          its roofline

What is measured is what runs; whether it is right is not asked here. Nothing of the caller's is changed: no
gradients, no autocast, no random state.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fxpasses.devices.arena import Arena
from fxpasses.devices.caches import free_memory, in_turn
from fxpasses.devices.convolutions import (
    OPERATORS,
    Candidates,
    Convolution,
    Direction,
    Kernel,
    Operands,
    implementations,
    to_layout,
)
from fxpasses.devices.keys import bytes_key
from fxpasses.devices.operators import OperatorCase, Shaped
from fxpasses.devices.profile import LAYOUT_COPY, LAYOUTS, WEIGHT_COPY, Layout, Measurement, Roofline
from fxpasses.devices.timing import Effort, measure_interleaved
from fxpasses.torch_internals.fake_tensors import without_fake_tensors

aten = torch.ops.aten

WHILE_COMPILING = Effort(rounds=7, sample_seconds=2e-4, case_seconds=0.06, least=3)
"""What a compilation spends on one operator: some hundredths of a second."""

_ROOM = 4
"""How many times over the operands and results of a call must fit into the memory that is free."""

_LIVE = ("aten.convolution", "mm")
"""Implementations whose weight may change between calls."""


@dataclass(frozen=True)
class Timing:
    """The times of one implementation of one operator in one layout.

    Attributes:
        operator, key, layout, implementation, dtype: as in `Measurement`.
        times: seconds of one call, one value a round.
    """

    operator: str
    key: str
    layout: Layout
    implementation: str
    dtype: str
    times: tuple[float, ...]

    def measurement(self) -> Measurement:
        """The row of a device profile."""
        ordered = sorted(self.times)
        quarter = len(ordered) // 4
        return Measurement(
            self.operator,
            self.key,
            self.layout,
            self.implementation,
            self.dtype,
            statistics.median(ordered),
            ordered[-1 - quarter] - ordered[quarter],
            len(ordered),
        )


class Measurer:
    """Measures on one device, with operands of one dtype."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        effort: Effort = WHILE_COMPILING,
        *,
        hot: bool = False,
    ) -> None:
        """Args:
        device: where.
        dtype: of all operands.
        effort: how long to spend on each operator.
        hot: whether every call has the same operands, and so finds them in a cache.
        """
        self.device, self.dtype, self._effort = device, dtype, effort
        self._arena = Arena(device, dtype, hot=hot)

    def convolution(self, case: Convolution, direction: Direction) -> list[Timing]:
        """One direction of a convolution; implementations that the device lacks are left out."""
        shapes = [case.input_size, case.weight_size]
        written = math.prod(case.output_size)
        if direction != "forward":
            shapes.append(case.output_size)
            written = math.prod(case.input_size)
        if not self._has_room(shapes, written):
            return []
        candidates: Candidates = {}
        with self._quietly():
            for layout in LAYOUTS:
                for x, weight, *grad in self._arena.sets(shapes, layout, written=written):
                    # A forward has no gradient and reads none.
                    operands = Operands(x, weight, grad[0] if grad else x)
                    found = implementations(case, direction, layout, operands)
                    for name in _LIVE:
                        if name in found:
                            candidates.setdefault((layout, name), []).append(found[name])
            return self._timed(OPERATORS[direction], case.key, candidates)

    def operator(self, case: OperatorCase) -> list[Timing]:
        """An operator that works in either layout."""
        shapes = [given.shape for given in case.tensors]
        if not self._has_room(shapes, 0):
            return []
        candidates: Candidates = {}
        with self._quietly():
            for layout in LAYOUTS:
                sets = self._arena.sets(shapes, layout)
                candidates[layout, case.overload] = [partial(_call, case, given, layout) for given in sets]
            return self._timed(case.operator, case.key, candidates)

    def copy(self, num_bytes: int) -> list[Timing]:
        """Copies between the layouts, of 64 channels as most activations of a network's beginning have."""
        pixels = max(1, num_bytes // self.dtype.itemsize // 64)
        height = 2 ** ((pixels.bit_length() - 1) // 2)
        return self._copy(LAYOUT_COPY, num_bytes, (1, 64, height, max(1, pixels // height)), written=True)

    def weight_copy(self, num_bytes: int) -> list[Timing]:
        """The same of filters of 3 x 3 taps, whose copy is read at once and freed, so that it is near."""
        filters = max(1, math.isqrt(num_bytes // self.dtype.itemsize // 9))
        return self._copy(WEIGHT_COPY, num_bytes, (filters, filters, 3, 3), written=False)

    def _copy(self, operator: str, num_bytes: int, shape: tuple[int, ...], *, written: bool) -> list[Timing]:
        elements = num_bytes // self.dtype.itemsize if written else 0
        candidates: Candidates = {}
        with self._quietly():
            for layout in LAYOUTS:
                source: Layout = "contiguous" if layout == "channels_last" else "channels_last"
                sets = self._arena.sets([shape], source, written=elements)
                candidates[layout, "aten.contiguous"] = [
                    partial(_copying, given, layout) for (given,) in sets
                ]
            return self._timed(operator, bytes_key(num_bytes), candidates)

    def peaks(self) -> Roofline:
        """The peaks of a device: a matrix product, a 3x3 convolution, a copy, and a call on 16 values."""
        large = self.device.type == "cuda"
        n, elements = (8192, 2**28) if large else (1024, 2**23)
        case = Convolution.of(
            (64, 256, 56, 56) if large else (1, 128, 56, 56), (256 if large else 128,) * 2 + (3, 3)
        )
        with self._quietly():
            times = measure_interleaved(self._peak_kernels(n, elements, case), self.device, self._effort)
        medians = {name: statistics.median(samples) for name, samples in times.items()}
        return Roofline(
            dtype=self._dtype_name,
            matmul_flops=2 * n**3 / medians["matmul"],
            convolution_flops=case.flops / min(medians[layout] for layout in LAYOUTS),
            bandwidth=2 * elements * self.dtype.itemsize / medians["copy"],
            call_seconds=medians["call"],
        )

    def _peak_kernels(self, n: int, elements: int, case: Convolution) -> dict[str, Callable[[], object]]:
        def convolutions(layout: Layout) -> list[Callable[[], object]]:
            sets = self._arena.sets((case.input_size, case.weight_size), layout)
            return [partial(aten.convolution.default, x, w, None, *case.arguments) for x, w in sets]

        # What is written are blocks of their own: the operands of others stay random.
        product, target = (
            torch.empty(*size, dtype=self.dtype, device=self.device) for size in ((n, n), (elements,))
        )
        matrices = self._arena.sets([(n, n)], "contiguous")
        copies = self._arena.sets([(elements,)], "contiguous")
        few = torch.ones(16, dtype=self.dtype, device=self.device)
        target.zero_()  # its pages are there before it is timed
        return {
            **in_turn({"matmul": [partial(torch.mm, a, a, out=product) for (a,) in matrices]}),
            **in_turn({"copy": [partial(target.copy_, source) for (source,) in copies]}),
            **in_turn({layout: convolutions(layout) for layout in LAYOUTS}),
            "call": partial(torch.add, few, few, out=few),
        }

    def _has_room(self, shapes: Sequence[Sequence[int]], written: int) -> bool:
        """Whether operands and results of a call leave most of the free memory to others."""
        num_bytes = (sum(map(math.prod, shapes)) + written) * self.dtype.itemsize
        return num_bytes * _ROOM <= free_memory(self.device)

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[None]:
        with (
            without_fake_tensors(),
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
        ):
            yield

    def _timed(self, operator: str, key: str, candidates: Candidates) -> list[Timing]:
        kernels: dict[tuple[Layout, str], Sequence[Kernel]] = {}
        for candidate, builds in candidates.items():
            with contextlib.suppress(RuntimeError, NotImplementedError):  # the device lacks it
                built = [build() for build in builds]
                built[0]()
                kernels[candidate] = built
        named: Mapping[str, Sequence[Kernel]] = {" ".join(place): built for place, built in kernels.items()}
        times = measure_interleaved(in_turn(named), self.device, self._effort)
        return [
            Timing(operator, key, *place, self._dtype_name, tuple(times[" ".join(place)]))
            for place in kernels
        ]


def _call(case: OperatorCase, given: Sequence[Tensor], layout: Layout) -> Kernel:
    operands = iter(given)

    def make(_: Shaped) -> Tensor:
        return next(operands)

    args, kwargs = case.call(make)

    def run() -> Tensor | tuple[Tensor, ...]:
        result = case.target(*args, **kwargs)
        if isinstance(result, tuple):
            return tuple(to_layout(tensor, layout) for tensor in result)
        return to_layout(result, layout)

    return run


def _copying(source: Tensor, layout: Layout) -> Kernel:
    return lambda: to_layout(source, layout)
