"""What a convolution costs that was not measured, from measured ones that resemble it.

    seconds  ~  roofline(FLOPs, bytes) · exp(mean of log(measured / roofline) over its neighbours)

Neighbours compute the same direction of the same kind of convolution (plain, grouped, depthwise, transposed)
in the same layout and dtype, those of the same kernel size first. The nearest count the most: those whose
channels and positions are the most alike, by octaves. How much neighbours differ among themselves, and how
far they are, says how far the truth may be.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fxpasses.devices.convolutions import Convolution
from fxpasses.devices.profile import OPERATORS_OF_CONVOLUTIONS, DeviceProfile, Layout, Roofline

_NEIGHBOURS = 4
_PER_OCTAVE = 0.05
"""How much less is known of a neighbour for each octave that it is away, as a logarithm."""
_LEAST = 0.1
"""What two measurements of one convolution differ by, as a logarithm."""
_OTHER_KERNEL = 3.0
"""How many octaves away another kernel size is."""


class Prediction(NamedTuple):
    """Predicted seconds; the truth is expected between `seconds / factor` and `seconds * factor`."""

    seconds: float
    factor: float


class _Known(NamedTuple):
    case: Convolution
    log_ratio: float
    log_sizes: tuple[float, ...]


@dataclass
class Predictor:
    """Predicts from the rows of one profile.

    Attributes:
        profile: what was measured.
    """

    profile: DeviceProfile
    _known: dict[tuple[object, ...], list[_Known]] = field(init=False)

    def __post_init__(self) -> None:
        self._known = defaultdict(list)
        fastest: dict[tuple[str, str, Layout, str], float] = {}
        for row in self.profile.measurements:
            if row.operator in OPERATORS_OF_CONVOLUTIONS and row.implementation == "aten.convolution":
                fastest[row.operator, row.key, row.layout, row.dtype] = row.seconds
        for (operator, key, layout, dtype), seconds in fastest.items():
            peaks = self.profile.roofline(dtype)
            try:
                case = Convolution.of_key(key)
            except ValueError:
                continue
            if peaks is not None:
                ratio = math.log(seconds / _roofline(case, peaks, dtype))
                place = (operator, layout, dtype, _kind(case))
                self._known[place].append(_Known(case, ratio, _log_sizes(case)))

    def predict(self, operator: str, case: Convolution, layout: Layout, dtype: str) -> Prediction | None:
        """What one direction of a convolution takes in a layout; None where nothing resembles it.

        Args:
            operator: the direction, as a profile calls it.
            case: the convolution.
            layout: of its tensors.
            dtype: as in ``float32``.
        """
        peaks = self.profile.roofline(dtype)
        known = self._known.get((operator, layout, dtype, _kind(case)), [])
        if peaks is None or not known:
            return None
        sizes = _log_sizes(case)
        near = sorted((_octaves(each, case, sizes), each.log_ratio) for each in known)[:_NEIGHBOURS]
        weights = [1 / (0.25 + distance) for distance, _ in near]
        total = sum(weights)
        mean = sum(weight * ratio for weight, (_, ratio) in zip(weights, near, strict=True)) / total
        variance = sum(w * (ratio - mean) ** 2 for w, (_, ratio) in zip(weights, near, strict=True)) / total
        error = math.sqrt(variance + _LEAST**2) + _PER_OCTAVE * near[0][0]
        if len(near) == 1:
            error *= 2  # one neighbour says nothing of how much they differ
        return Prediction(_roofline(case, peaks, dtype) * math.exp(mean), math.exp(error))


def _kind(case: Convolution) -> tuple[object, ...]:
    spatial = len(case.stride)
    if case.transposed:
        return "transposed", case.groups > 1, spatial
    if case.groups == 1:
        return "plain", spatial
    return ("depthwise" if case.weight_size[1] == 1 else "grouped"), spatial


def _log_sizes(case: Convolution) -> tuple[float, ...]:
    """Logarithms to base 2 of batch, positions read, channels read and made a group, groups, and step."""
    read = math.prod(case.input_size[2:])
    per_group = (case.input_size[1] / case.groups, case.output_channels / case.groups)
    sizes: Sequence[float] = (case.input_size[0], read, *per_group, case.groups, 4 * math.prod(case.stride))
    return tuple(map(math.log2, sizes))


def _octaves(known: _Known, case: Convolution, sizes: Sequence[float]) -> float:
    away = math.dist(known.log_sizes, sizes)
    same = known.case.weight_size[2:] == case.weight_size[2:] and known.case.dilation == case.dilation
    return away if same else away + _OTHER_KERNEL


_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def _roofline(case: Convolution, peaks: Roofline, dtype: str) -> float:
    elements = sum(map(math.prod, (case.input_size, case.weight_size, case.output_size)))
    return peaks.seconds(case.flops, elements * _BYTES.get(dtype, 4))
