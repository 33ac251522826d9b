"""A device profile: what operators and layout copies cost on one device, as measured there.

A profile is a table. A row (`Measurement`) says how long one *implementation* of one *operator* took on one
*key* (shapes and arguments, spelled canonically: `keys`) when its tensors had one *layout*. A cost model asks

    profile.seconds(operator, key, layout)   = min over the implementations measured, and which one it was
    profile.copy_seconds(bytes, layout)      interpolated between the sizes that were measured
    profile.roofline(dtype).seconds(F, B)    = call + max(F / peak FLOP/s, B / bandwidth)

The first is an exact match or None, never a guess; the last is the fallback where nothing was measured
(S. Williams, A. Waterman, D. Patterson, "Roofline", CACM 52(4), 2009). Times are medians, in seconds.
Profiles are files of JSON; `store` says where they are looked for and which of them are trusted.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from fxpasses.report.whole_files import write_whole

Layout = Literal["contiguous", "channels_last"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
SCHEMA_VERSION = 1

# Names of operators that no single ATen overload stands for.
CONVOLUTION_FORWARD = "convolution.forward"
CONVOLUTION_INPUT_GRAD = "convolution.input_grad"
CONVOLUTION_WEIGHT_GRAD = "convolution.weight_grad"
OPERATORS_OF_CONVOLUTIONS = (CONVOLUTION_FORWARD, CONVOLUTION_INPUT_GRAD, CONVOLUTION_WEIGHT_GRAD)
CHANNEL_AFFINE = "channel_affine"  # y = x * scale[c] + shift[c]
LAYOUT_COPY = "layout_copy"  # of an image; the measurement's layout is the one that is copied *to*
WEIGHT_COPY = "weight_copy"  # of filters of 3 x 3 taps; likewise
_COPIES = (LAYOUT_COPY, WEIGHT_COPY)

# How operands were measured: a setting of a profile, and its values. A profile that does not say was hot.
OPERANDS = "operands"
COLD = "cold"  # in no cache when they are read
HOT = "hot"  # one call repeated on the same operands


class Estimate(NamedTuple):
    """The fastest implementation of an operator in a layout: its median time in seconds, and its name."""

    seconds: float
    implementation: str


@dataclass(frozen=True)
class Measurement:
    """One row of a profile.

    Attributes:
        operator: one of this module's names, or an ATen overload such as ``aten.mean.dim``.
        key: shapes and arguments, from `keys.convolution_key`, `keys.operator_key` or `keys.bytes_key`.
        layout: of every 4-D or 5-D tensor involved; for a copy the layout of the result.
        implementation: what ran, such as ``aten.convolution`` or ``mm``.
        dtype: as in ``float32``.
        seconds: the median time of one call.
        spread: the interquartile range of the samples, in seconds.
        samples: how many samples the median was taken over.
    """

    operator: str
    key: str
    layout: Layout
    implementation: str
    dtype: str
    seconds: float
    spread: float
    samples: int


@dataclass(frozen=True)
class Verdict:
    """Which of two programs for one graph was faster, in a race of the user's calls.

    Attributes:
        winner: its name.
        loser: the other's.
        ratio: the median of the time of the one that was looked at first over the other's.
        low, high: its 95 % interval.
        pairs: of how many pairs of calls.
    """

    winner: str
    loser: str
    ratio: float
    low: float
    high: float
    pairs: int

    @property
    def is_certain(self) -> bool:
        """Whether the interval leaves 1."""
        return not self.low <= 1 <= self.high


@dataclass(frozen=True)
class Choice:
    """What was measured of the implementations of one convolution over a packed weight.

    Attributes:
        kernel: the number of the fastest of our kernels; None where there is none.
        seconds: that it takes, or the library's where there is none.
        library: seconds that the library's takes: oneDNN's convolution, or a matrix product.
    """

    kernel: int | None
    seconds: float
    library: float


@dataclass(frozen=True)
class Roofline:
    """The peaks of a device in one dtype, each measured once on a large instance.

    Attributes:
        dtype: as in ``float32``.
        matmul_flops: floating-point operations a second of a large matrix product.
        convolution_flops: the same of a large 3x3 convolution, in its better layout.
        bandwidth: bytes a second, read plus written, of a large copy.
        call_seconds: the time of one operator call on almost no data.
    """

    dtype: str
    matmul_flops: float
    convolution_flops: float
    bandwidth: float
    call_seconds: float

    def seconds(self, flops: float, num_bytes: float, *, kind: str = "convolution") -> float:
        """The roofline's estimate for `flops` operations that read and write `num_bytes` together.

        Args:
            flops: floating-point operations; 0 for pure data movement.
            num_bytes: bytes read plus bytes written.
            kind: ``"convolution"`` or ``"matmul"``: which peak applies.
        """
        peak = self.matmul_flops if kind == "matmul" else self.convolution_flops
        return self.call_seconds + max(flops / peak, num_bytes / self.bandwidth)


@dataclass(frozen=True)
class DeviceProfile:
    """Everything that was measured on one device.

    Attributes:
        device: the name that `store.device_name` gives there.
        torch_version: of the torch that ran the measurements.
        libraries: versions of the kernel libraries, such as ``{"onednn": "3.12.0"}``.
        settings: what else decides the times, such as ``{"float32_precision": "ieee", "operands": "cold"}``.
        rooflines: one for each dtype measured.
        measurements: the rows.
        verdicts: of races, by the key of the graph.
        choices: between kernels, by the sizes of the convolution.
        revision: changes when rows are added on purpose, so that what was compiled before is planned anew.
    """

    device: str
    torch_version: str
    libraries: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    rooflines: tuple[Roofline, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    choices: Mapping[str, Choice] = field(default_factory=dict)
    revision: str = ""

    def seconds(
        self,
        operator: str,
        key: str,
        layout: Layout,
        dtype: str = "float32",
        *,
        implementations: Collection[str] | None = None,
    ) -> Estimate | None:
        """The fastest implementation measured for exactly this operator, key, layout and dtype, or None.

        Args:
            operator: one of this module's names, or an ATen overload such as ``aten.mean.dim``.
            key: from `keys.convolution_key` or `keys.operator_key`.
            layout: the layout of its tensors.
            dtype: as in ``float32``.
            implementations: those that may be chosen from; None for all.
        """
        rows = self._index.get((operator, key, layout, dtype), ())
        allowed = [row for row in rows if implementations is None or row.implementation in implementations]
        if not allowed:
            return None
        best = min(allowed, key=lambda row: row.seconds)
        return Estimate(best.seconds, best.implementation)

    def copy_seconds(
        self, num_bytes: int, layout: Layout, dtype: str = "float32", *, of_weight: bool = False
    ) -> float | None:
        """The time to copy a tensor of `num_bytes` bytes into `layout`, or None where none was measured.

        Of a weight as of an image, where only those were measured.

        Linear between the two sizes measured around it; in proportion to the size beyond the largest one;
        the smallest one's time below it, where the call is what costs.
        """
        points = self._copies.get((WEIGHT_COPY, layout, dtype)) if of_weight else None
        points = points or self._copies.get((LAYOUT_COPY, layout, dtype))
        if not points:
            return None
        if num_bytes <= points[0][0]:
            return points[0][1]
        for (size0, time0), (size1, time1) in itertools.pairwise(points):
            if num_bytes <= size1:
                return time0 + (time1 - time0) * (num_bytes - size0) / (size1 - size0)
        size, time = points[-1]
        return time * num_bytes / size

    @property
    def operands(self) -> str:
        """`COLD`, or `HOT` where operands were in a cache while they were measured."""
        return self.settings.get(OPERANDS, HOT)

    def roofline(self, dtype: str = "float32") -> Roofline | None:
        """The peaks measured in `dtype`, or None."""
        return next((roofline for roofline in self.rooflines if roofline.dtype == dtype), None)

    def merged(self, newer: DeviceProfile) -> DeviceProfile:
        """This profile with the rows and peaks of `newer` added, which win where both have one.

        Raises:
            ValueError: the two belong to different devices, torch versions or settings, so that their
                times must not be compared.
        """
        for name, mine in self._conditions.items():
            theirs = newer._conditions[name]
            if mine != theirs:
                raise ValueError(
                    f"profiles of different {name} cannot be merged: {mine!r} against {theirs!r}. "
                    "Write the new one to a file of its own."
                )
        rows = {_identity(row): row for row in (*self.measurements, *newer.measurements)}
        peaks = {roofline.dtype: roofline for roofline in (*self.rooflines, *newer.rooflines)}
        return replace(
            newer,
            rooflines=tuple(peaks.values()),
            measurements=tuple(rows.values()),
            verdicts={**self.verdicts, **newer.verdicts},
            choices={**self.choices, **newer.choices},
            revision=newer.revision or self.revision,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile as JSON; the file appears whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        write_whole(Path(path), self._text())

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> DeviceProfile:
        """The profile in the JSON that `save` wrote.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: the data is no profile's.
        """
        return DeviceProfile(
            device=_text(data["device"]),
            torch_version=_text(data["torch_version"]),
            libraries={_text(name): _text(version) for name, version in data["libraries"].items()},
            settings={_text(name): _text(value) for name, value in data["settings"].items()},
            rooflines=tuple(_roofline(row) for row in data["rooflines"]),
            measurements=tuple(_measurement(row) for row in data["measurements"]),
            verdicts={_text(key): _verdict(row) for key, row in data.get("verdicts", {}).items()},
            choices={_text(key): _choice(row) for key, row in data.get("choices", {}).items()},
            revision=_text(data.get("revision", "")),
        )

    def _text(self) -> str:
        """The profile as JSON, one measurement a line: there are thousands, and a diff should be short."""
        fields = asdict(replace(self, measurements=()))
        fields["measurements"] = fields.pop("measurements")  # last, whatever else there is
        head = json.dumps({"schema": SCHEMA_VERSION} | fields, indent=1)
        rows = ",\n".join(json.dumps(asdict(row)) for row in self.measurements)
        return head.removesuffix("[]\n}") + f"[\n{rows}\n]}}\n"

    @cached_property
    def digest(self) -> str:
        """Equal for profiles of equal content, in whichever process."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def _conditions(self) -> Mapping[str, object]:
        """What times to be compared have in common."""
        settings = {**self.settings, OPERANDS: self.operands}
        return {"device": self.device, "torch_version": self.torch_version, "settings": settings}

    @cached_property
    def _index(self) -> Mapping[tuple[str, str, Layout, str], Sequence[Measurement]]:
        index: dict[tuple[str, str, Layout, str], list[Measurement]] = {}
        for row in self.measurements:
            index.setdefault((row.operator, row.key, row.layout, row.dtype), []).append(row)
        return index

    @cached_property
    def _copies(self) -> Mapping[tuple[str, Layout, str], Sequence[tuple[int, float]]]:
        points: dict[tuple[str, Layout, str], dict[int, float]] = {}
        for row in self.measurements:
            if row.operator in _COPIES:
                sizes = points.setdefault((row.operator, row.layout, row.dtype), {})
                size = int(row.key.removeprefix("bytes="))
                sizes[size] = min(row.seconds, sizes.get(size, math.inf))
        return {key: sorted(sizes.items()) for key, sizes in points.items()}


def _roofline(data: Mapping[str, Any]) -> Roofline:
    names = ("matmul_flops", "convolution_flops", "bandwidth", "call_seconds")
    return Roofline(_text(data["dtype"]), *(_positive(name, data[name]) for name in names))


def _verdict(data: Mapping[str, Any]) -> Verdict:
    numbers = (_positive(name, data[name], or_zero=True) for name in ("ratio", "low", "high", "pairs"))
    ratio, low, high, pairs = numbers
    return Verdict(_text(data["winner"]), _text(data["loser"]), ratio, low, high, int(pairs))


def _choice(data: Mapping[str, Any]) -> Choice:
    kernel = data["kernel"]
    if kernel is not None and type(kernel) is not int:
        raise TypeError(f"a kernel has a number, got {kernel!r}")
    return Choice(kernel, _positive("seconds", data["seconds"]), _positive("library", data["library"]))


def _measurement(data: Mapping[str, Any]) -> Measurement:
    if data["layout"] not in LAYOUTS:
        raise ValueError(f"layout {data['layout']!r} is none of {LAYOUTS}")
    if data["operator"] in _COPIES and not re.fullmatch(r"bytes=\d{1,18}", data["key"]):
        raise ValueError(f"the key of a {data['operator']} is bytes=N, got {data['key']!r}")
    return Measurement(
        operator=_text(data["operator"]),
        key=_text(data["key"]),
        layout=data["layout"],
        implementation=_text(data["implementation"]),
        dtype=_text(data["dtype"]),
        seconds=_positive("seconds", data["seconds"]),
        spread=_positive("spread", data["spread"], or_zero=True),
        samples=int(_positive("samples", data["samples"])),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r}")
    return value


def _positive(name: str, value: object, *, or_zero: bool = False) -> float:
    # JSON as Python reads it allows NaN and Infinity: either would win or lose every comparison.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not or_zero):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return float(value)


def _identity(row: Measurement) -> tuple[str, ...]:
    return row.operator, row.key, row.layout, row.implementation, row.dtype
