"""Measuring one operator in both layouts: compare the results first, then time what is right, in turns.

    candidates (layout, implementation) -> build -> run once -> close to the float64 reference?
        unsupported: it could not be built or run; the others go on
        mismatch:    a wrong result; no time of this operator is reported at all
        measured:    seconds, one value a round, paired with those of the other candidates

Operands are in no cache when they are read (`benchmarks.layout.caches`), unless the setting says hot: then
each candidate repeats its call on the same ones.

What is close enough is said by `fxpasses.comparison.kernel_tolerance`.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from benchmarks.layout.caches import in_turn, sets_needed
from benchmarks.layout.cases import (
    DTYPES,
    OPERATORS,
    Convolution,
    Direction,
    Kernel,
    Operands,
    implementations,
    in_layout,
    operands,
    reference,
)
from benchmarks.shared.interleaving import Effort, measure_interleaved
from benchmarks.shared.statistics import Ratio, Summary, paired_ratio, summarize
from fxpasses.comparison import kernel_tolerance
from fxpasses.devices.profile import LAYOUTS, Layout, Measurement

Status = Literal["measured", "mismatch", "unsupported", "untimed"]
Set = TypeVar("Set")
Candidates = dict[tuple[Layout, str], list[Callable[[], Kernel]]]


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
        summary = self.summary
        return Measurement(
            self.operator,
            self.key,
            self.layout,
            self.implementation,
            self.dtype,
            summary.median,
            summary.iqr,
            summary.n,
        )


@dataclass(frozen=True)
class Comparison:
    """One implementation of an operator in each layout, and the speed-up of channels_last over contiguous."""

    contiguous: Variant
    channels_last: Variant
    speedup: Ratio


@dataclass(frozen=True)
class Setting:
    """On what, with which arithmetic and with how much effort to measure.

    Attributes:
        dtype: as in ``float32``.
        device: where.
        effort: how long.
        tf32: whether a GPU may use TF32 for float32.
        hot: whether every call has the same operands, and so finds them in a cache.
    """

    dtype: str
    device: torch.device
    effort: Effort
    tf32: bool = False
    hot: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that `dtype` names."""
        return DTYPES[self.dtype]

    @property
    def tolerance(self) -> float:
        """Relative, and absolute for results of unit variance."""
        return kernel_tolerance(self.torch_dtype, tf32=self.tf32 and self.device.type == "cuda")

    def sets(self, first: Set, copied: Callable[[Set], Set], num_bytes: int) -> list[Set]:
        """The sets of operands to take in turn: `first`, and as many copies as it takes.

        Args:
            first: one set.
            copied: makes another of it, elsewhere in memory.
            num_bytes: that one call reads and writes.
        """
        count = 1 if self.hot else sets_needed(num_bytes, self.device)
        return [first, *(copied(first) for _ in range(count - 1))]

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """No autograd, and TF32 exactly where it was asked for; restored afterwards."""
        convolution, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        before = convolution.allow_tf32, matmul.allow_tf32
        try:
            convolution.allow_tf32 = matmul.allow_tf32 = self.tf32
            with torch.no_grad():
                yield
        finally:
            convolution.allow_tf32, matmul.allow_tf32 = before


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
