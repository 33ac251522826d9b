"""Measuring one operator in both layouts: compare the results first, then time what is right, in turns.

    candidates (layout, implementation) -> build -> run once -> close to the float64 reference?
        unsupported: it could not be built or run; the others go on
        mismatch:    a wrong result; no time of this operator is reported at all
        measured:    seconds, one value a round, paired with those of the other candidates

Operands are in no cache when they are read (`fxpasses.devices.caches`), unless the setting says hot: then
each candidate repeats its call on the same ones.

What is close enough is said by `fxpasses.comparison.kernel_tolerance`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.layout.setting import Setting
from benchmarks.shared.statistics import Ratio, Summary, paired_ratio, summarize
from fxpasses.devices.caches import in_turn
from fxpasses.devices.convolutions import (
    OPERATORS,
    Candidates,
    Convolution,
    Direction,
    Kernel,
    Operands,
    implementations,
    in_layout,
    operands,
    reference,
)
from fxpasses.devices.measuring import Timing
from fxpasses.devices.profile import LAYOUTS, Layout, Measurement
from fxpasses.devices.timing import measure_interleaved

Status = Literal["measured", "mismatch", "unsupported", "untimed"]


@dataclass(frozen=True)
class Variant:
    """One implementation of one operator in one layout, and what came of it.

    Attributes:
        operator: its name in a device profile, as are key, layout, implementation and dtype.
        status: ``untimed`` where another variant of the same operator was wrong.
        times: seconds of one call, one value a round; empty unless measured.
        reason: why there are no times.
    """

    operator: str
    key: str
    layout: Layout
    implementation: str
    dtype: str
    status: Status
    times: tuple[float, ...] = ()
    reason: str = ""

    @classmethod
    def of(cls, timing: Timing) -> Variant:
        """What was timed without being compared."""
        named = (timing.operator, timing.key, timing.layout, timing.implementation, timing.dtype)
        return cls(*named, "measured", timing.times)

    @property
    def summary(self) -> Summary:
        """Median and quartiles in seconds.

        Raises:
            ValueError: it was not measured.
        """
        return summarize(self.times)

    def measurement(self) -> Measurement:
        """The row of a device profile.

        Raises:
            ValueError: it was not measured.
        """
        if not self.times:
            raise ValueError(f"{self.operator} {self.key} was not measured: {self.reason}")
        named = (self.operator, self.key, self.layout, self.implementation, self.dtype)
        return Timing(*named, self.times).measurement()


@dataclass(frozen=True)
class Comparison:
    """One implementation of an operator in each layout, and the speed-up of channels_last over contiguous."""

    contiguous: Variant
    channels_last: Variant
    speedup: Ratio


def measure_convolution(case: Convolution, direction: Direction, setting: Setting) -> list[Variant]:
    """Every implementation of one direction of a convolution in both layouts."""
    with setting.arithmetic():
        values = operands(case, direction, setting.torch_dtype, setting.device)
        candidates: Candidates = defaultdict(list)
        for layout in LAYOUTS:
            # Of the three tensors each direction reads two and writes the third.
            for tensors in setting.sets(in_layout(values, layout), Operands.copied, values.num_bytes):
                for name, build in implementations(case, direction, layout, tensors).items():
                    candidates[layout, name].append(build)
        expected = reference(case, direction, values)
        return measure(OPERATORS[direction], case.key, candidates, [expected], setting)


def measure(
    operator: str,
    key: str,
    candidates: Candidates,
    expected: Sequence[Tensor],
    setting: Setting,
) -> list[Variant]:
    """Checks and times the candidates of one operator.

    Args:
        operator: its name in a device profile.
        key: its key there.
        candidates: by layout and name of the implementation, what builds its kernel on each set of operands.
        expected: the floating-point results in float64.
        setting: on what and how.
    """
    kernels: dict[tuple[Layout, str], list[Kernel]] = {}
    failures: dict[tuple[Layout, str], tuple[Status, str]] = {}
    for candidate, builds in candidates.items():
        try:
            built = [build() for build in builds]
            result = built[0]()
        except (RuntimeError, NotImplementedError) as error:
            failures[candidate] = "unsupported", _first_line(error)
            continue
        wrong = _difference(result, expected, setting.tolerance)
        if wrong:
            failures[candidate] = "mismatch", wrong
        else:
            kernels[candidate] = built
    if any(status == "mismatch" for status, _ in failures.values()):
        culprits = [" ".join(place) for place, (status, _) in failures.items() if status == "mismatch"]
        reason = f"{', '.join(culprits)} of the same operator is wrong"
        failures |= dict.fromkeys(kernels, ("untimed", reason))
        kernels = {}
    named = {" ".join(candidate): built for candidate, built in kernels.items()}
    times = measure_interleaved(in_turn(named), setting.device, setting.effort)
    return [
        _variant(operator, key, candidate, setting.dtype, failures, times.get(" ".join(candidate), []))
        for candidate in candidates
    ]


def compare(variants: Sequence[Variant], implementation: str | None = None) -> Comparison | None:
    """Channels-last against contiguous; None where one of the two was not measured.

    Args:
        variants: what `measure` returned for one operator.
        implementation: the one to compare with itself; None for the fastest of each layout.
    """
    best: dict[Layout, Variant] = {}
    for layout in LAYOUTS:
        measured = [
            variant
            for variant in variants
            if variant.layout == layout
            and variant.status == "measured"
            and implementation in (None, variant.implementation)
        ]
        if not measured:
            return None
        best[layout] = min(measured, key=lambda variant: variant.summary.median)
    slow, fast = best["contiguous"], best["channels_last"]
    return Comparison(slow, fast, paired_ratio(fast.times, slow.times))


def _variant(
    operator: str,
    key: str,
    candidate: tuple[Layout, str],
    dtype: str,
    failures: Mapping[tuple[Layout, str], tuple[Status, str]],
    times: Sequence[float],
) -> Variant:
    status, reason = failures.get(candidate, ("measured", ""))
    return Variant(operator, key, *candidate, dtype, status, tuple(times), reason)


def _difference(result: object, expected: Sequence[Tensor], tolerance: float) -> str:
    """How the results differ from those expected; empty where they do not."""
    results = result if isinstance(result, tuple) else (result,)
    # Indices are left out: of two equal values in a window, any may be the maximum.
    floating = [result for result in results if isinstance(result, Tensor) and result.is_floating_point()]
    if len(floating) != len(expected):
        return f"{len(floating)} floating-point results instead of {len(expected)}"
    for actual, wanted in zip(floating, expected, strict=True):
        # A sum over many values is larger than one, and so is its rounding error.
        magnitude = max(1.0, float(wanted.square().mean().sqrt()))
        try:
            torch.testing.assert_close(
                actual.double(), wanted, rtol=tolerance, atol=tolerance * magnitude, check_stride=False
            )
        except AssertionError as error:
            return " ".join(str(error).split())
    return ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
