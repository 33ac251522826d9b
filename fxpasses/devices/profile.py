"""Device profiles: what operators and layout copies cost on one device, as measured there.

A profile is a table. A row (`Measurement`) says how long one *implementation* of one *operator* took on one
*key* (shapes and arguments, spelled canonically) when its tensors had one *layout*. A cost model asks

    profile.seconds(operator, key, layout)   = min over the implementations measured, and which one it was
    profile.copy_seconds(bytes, layout)      interpolated between the sizes that were measured
    profile.roofline(dtype).seconds(F, B)    = call + max(F / peak FLOP/s, B / bandwidth)

The first is an exact match or None, never a guess; the last is the fallback where nothing was measured
(S. Williams, A. Waterman, D. Patterson, "Roofline", CACM 52(4), 2009). Times are medians, in seconds.

A profile belongs to one device. `find` looks for it in the user's cache folder, then among those shipped
with the package (`SHIPPED`). A file that cannot be trusted (corrupt, of another device, of another schema
version) is named in a warning and ignored, so that a caller falls back instead of failing a compilation.
`python -m benchmarks.tensor_layout --sweep MODELS --profile FILE` writes one.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import platform
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch.fx.operator_schemas import normalize_function

Layout = Literal["contiguous", "channels_last"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
SCHEMA_VERSION = 1

SHIPPED = "profiles"
"""The folder of the package that holds the profiles it is shipped with."""

# Names of operators that no single ATen overload stands for.
CONVOLUTION_FORWARD = "convolution.forward"
CONVOLUTION_INPUT_GRAD = "convolution.input_grad"
CONVOLUTION_WEIGHT_GRAD = "convolution.weight_grad"
CHANNEL_AFFINE = "channel_affine"  # y = x * scale[c] + shift[c]
LAYOUT_COPY = "layout_copy"  # the measurement's layout is the one that is copied *to*

# How operands were measured: a setting of a profile, and its values. A profile that does not say was hot.
OPERANDS = "operands"
COLD = "cold"  # in no cache when they are read
HOT = "hot"  # one call repeated on the same operands


class DeviceProfileWarning(UserWarning):
    """A device profile was found and not used; the message names the file and the reason."""


class Estimate(NamedTuple):
    """The fastest implementation of an operator in a layout: its median time in seconds, and its name."""

    seconds: float
    implementation: str


@dataclass(frozen=True)
class Measurement:
    """One row of a profile.

    Attributes:
        operator: one of this module's names, or an ATen overload such as ``aten.mean.dim``.
        key: shapes and arguments, from `convolution_key`, `operator_key` or `bytes_key`.
        layout: of every 4-D or 5-D tensor involved; for `LAYOUT_COPY` the layout of the result.
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
        device: the name that `device_name` gives there.
        torch_version: of the torch that ran the measurements.
        libraries: versions of the kernel libraries, such as ``{"onednn": "3.12.0"}``.
        settings: what else decides the times, such as ``{"float32_precision": "ieee", "operands": "cold"}``.
        rooflines: one for each dtype measured.
        measurements: the rows.
    """

    device: str
    torch_version: str
    libraries: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    rooflines: tuple[Roofline, ...] = ()
    measurements: tuple[Measurement, ...] = ()

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
            key: from `convolution_key` or `operator_key`.
            layout: the layout of its tensors.
            dtype: as in ``float32``.
            implementations: those that may be chosen from; None for all.
        """
        rows = self._index.get((operator, key, layout, dtype), ())
        allowed = [each for each in rows if implementations is None or each.implementation in implementations]
        if not allowed:
            return None
        best = min(allowed, key=lambda each: each.seconds)
        return Estimate(best.seconds, best.implementation)

    def copy_seconds(self, num_bytes: int, layout: Layout, dtype: str = "float32") -> float | None:
        """The time to copy a tensor of `num_bytes` bytes into `layout`, or None where none was measured.

        Linear between the two sizes measured around it; in proportion to the size beyond the largest one;
        the smallest one's time below it, where the call is what costs.
        """
        points = self._copies.get((layout, dtype))
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
        return next((each for each in self.rooflines if each.dtype == dtype), None)

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
        rows = {_identity(each): each for each in (*self.measurements, *newer.measurements)}
        peaks = {each.dtype: each for each in (*self.rooflines, *newer.rooflines)}
        return replace(newer, rooflines=tuple(peaks.values()), measurements=tuple(rows.values()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile as JSON; the file appears whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may share a cache folder: each writes a file of its own and moves it into place.
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        partial.write_text(self._text(), "utf-8")
        partial.replace(target)

    def _text(self) -> str:
        """The profile as JSON, one measurement a line: there are thousands, and a diff should be short."""
        head = json.dumps({"schema": SCHEMA_VERSION} | asdict(replace(self, measurements=())), indent=1)
        rows = ",\n".join(json.dumps(asdict(each)) for each in self.measurements)
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
        for each in self.measurements:
            index.setdefault((each.operator, each.key, each.layout, each.dtype), []).append(each)
        return index

    @cached_property
    def _copies(self) -> Mapping[tuple[Layout, str], Sequence[tuple[int, float]]]:
        points: dict[tuple[Layout, str], dict[int, float]] = {}
        for each in self.measurements:
            if each.operator == LAYOUT_COPY:
                sizes = points.setdefault((each.layout, each.dtype), {})
                size = int(each.key.removeprefix("bytes="))
                sizes[size] = min(each.seconds, sizes.get(size, math.inf))
        return {key: sorted(sizes.items()) for key, sizes in points.items()}


def convolution_key(
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool = False,
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
) -> str:
    """The key of a convolution and of its gradients, from the arguments of `aten.convolution`.

    A list of one value stands for all spatial dimensions, as in ATen; `output_padding` counts only where
    the convolution is transposed. A bias is no part of the key: it hardly costs.
    """
    spatial = len(input_size) - 2
    lists = {"stride": stride, "padding": padding, "dilation": dilation}
    if transposed:
        lists["output_padding"] = output_padding
    fields = {
        name: _times(values if len(values) > 1 else [*values] * spatial) for name, values in lists.items()
    }
    parts = (
        {"input": _times(input_size), "weight": _times(weight_size)} | fields | {"groups": str(int(groups))}
    )
    return " ".join(["transposed"] * bool(transposed) + [f"{name}={value}" for name, value in parts.items()])


def operator_key(target: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]) -> str:
    """The key of a call of an ATen overload: tensors as shapes, defaults filled in, dimensions from 0 up.

    Args:
        target: the overload.
        args: positional arguments; a tensor may be anything with a `shape` (for an FX node, pass its
            ``meta["val"]``). Symbolic sizes must have been replaced by their hints.
        kwargs: keyword arguments.

    Raises:
        ValueError: the arguments do not fit the overload's schema.
    """
    normalized = normalize_function(
        cast(Any, target), cast(Any, tuple(args)), dict(kwargs), normalize_to_only_use_kwargs=True
    )
    if normalized is None:
        raise ValueError(f"{target} does not take {len(args)} positional arguments and {sorted(kwargs)}")
    rank = max((len(shape) for value in normalized.kwargs.values() for shape in _shapes(value)), default=0)
    fields = dict(normalized.kwargs)
    if rank and isinstance(fields.get("dim"), int | list | tuple):
        fields["dim"] = _canonical_dims(fields["dim"], rank)
    return " ".join(f"{name}={_spelled(value)}" for name, value in fields.items())


def shape_key(shape: Sequence[int]) -> str:
    """The key of an operator that a tensor's shape describes, such as `CHANNEL_AFFINE`."""
    return f"input={_times(shape)}"


def bytes_key(num_bytes: int) -> str:
    """The key of a `LAYOUT_COPY` of a tensor that takes `num_bytes` bytes."""
    return f"bytes={int(num_bytes)}"


def device_name(device: str | torch.device = "cpu") -> str:
    """The name that profiles of this device carry; for a CPU with the number of threads torch may use."""
    checked = torch.device(device)
    if checked.type == "cpu":
        return f"{processor_name()}, {torch.get_num_threads()} threads"
    if checked.type == "cuda":
        return torch.cuda.get_device_name(checked)
    return checked.type


def processor_name() -> str:
    """The processor's brand, family and model: virtual machines often hide the model behind a bare brand."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    name = fields.get("model name", "").strip() or platform.processor() or platform.machine()
    if "cpu family" in fields and "model" in fields:
        return f"{name}, family {fields['cpu family']} model {fields['model']}"
    return name


def cache_folder() -> Path:
    """Where a user's own profiles live: $FXPASSES_PROFILE_DIR, else ~/.cache/fxpasses/profiles."""
    chosen = os.environ.get("FXPASSES_PROFILE_DIR")
    return Path(chosen) if chosen else Path.home() / ".cache" / "fxpasses" / "profiles"


def file_name(device: str) -> str:
    """The name of the file that a profile of `device` is looked for under."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def find(device: str) -> DeviceProfile | None:
    """The profile of a device: the user's own if there is a usable one, else the one shipped, else None.

    Args:
        device: from `device_name`.
    """
    for folder in (cache_folder(), Path(str(resources.files("fxpasses.devices"))) / SHIPPED):
        path = folder / file_name(device)
        if path.is_file() and (profile := load(path, device=device)) is not None:
            return profile
    return None


def load(path: str | os.PathLike[str], *, device: str | None = None) -> DeviceProfile | None:
    """Reads a profile; where it cannot be used, warns with the file and the reason and returns None.

    A file is parsed once and again after it has changed, since every compiled graph asks for it.

    Args:
        path: a file that `DeviceProfile.save` wrote.
        device: the device it must belong to; None for any.
    """
    try:
        return _checked(Path(path), device)
    except _UnusableProfileError as reason:
        advice = "measure it anew with `python -m benchmarks.tensor_layout --sweep MODELS --profile FILE`"
        message = f"device profile {os.fspath(path)} is not used: {reason}; {advice}, or delete it."
        warnings.warn(message, DeviceProfileWarning, stacklevel=2)
        return None


class _UnusableProfileError(Exception):
    """Why a file is no profile for this device and this version."""


def _checked(path: Path, device: str | None) -> DeviceProfile:
    try:
        status = path.stat()
    except OSError as error:
        raise _UnusableProfileError(f"it cannot be read ({error})") from error
    profile = _read(path, status.st_mtime_ns, status.st_size)
    if device is not None and profile.device != device:
        raise _UnusableProfileError(f"it was measured on {profile.device!r}, and this device is {device!r}")
    return profile


@functools.lru_cache(maxsize=16)
def _read(path: Path, _modified: int, _size: int) -> DeviceProfile:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _UnusableProfileError(f"it cannot be read as JSON ({error})") from error
    version = data.get("schema") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise _UnusableProfileError(
            f"its schema version is {version!r}, and this fxpasses reads {SCHEMA_VERSION}"
        )
    try:
        return _profile(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise _UnusableProfileError(f"its content is not a profile's ({what})") from error


def _profile(data: Mapping[str, Any]) -> DeviceProfile:
    return DeviceProfile(
        device=_text(data["device"]),
        torch_version=_text(data["torch_version"]),
        libraries={_text(name): _text(version) for name, version in data["libraries"].items()},
        settings={_text(name): _text(value) for name, value in data["settings"].items()},
        rooflines=tuple(_roofline(each) for each in data["rooflines"]),
        measurements=tuple(_measurement(each) for each in data["measurements"]),
    )


def _roofline(data: Mapping[str, Any]) -> Roofline:
    names = ("matmul_flops", "convolution_flops", "bandwidth", "call_seconds")
    return Roofline(_text(data["dtype"]), *(_positive(name, data[name]) for name in names))


def _measurement(data: Mapping[str, Any]) -> Measurement:
    if data["layout"] not in LAYOUTS:
        raise ValueError(f"layout {data['layout']!r} is none of {LAYOUTS}")
    if data["operator"] == LAYOUT_COPY and not re.fullmatch(r"bytes=\d{1,18}", data["key"]):
        raise ValueError(f"the key of a {LAYOUT_COPY} is bytes=N, got {data['key']!r}")
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


def _times(sizes: Sequence[int]) -> str:
    return "x".join(str(int(each)) for each in sizes)


def _shapes(value: object) -> list[Sequence[int]]:
    """The shapes of a tensor or of a list of tensors."""
    values = value if isinstance(value, list | tuple) else [value]
    return [each.shape for each in values if hasattr(each, "shape")]


def _canonical_dims(dims: int | Sequence[int], rank: int) -> int | list[int]:
    return dims % rank if isinstance(dims, int) else sorted(each % rank for each in dims)


def _spelled(value: object) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return _times(shape) or "scalar"
    if isinstance(value, list | tuple):
        return f"[{','.join(_spelled(each) for each in value)}]"
    return str(value)
