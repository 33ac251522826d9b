"""Where a convolution reads: its stride, padding and dilation as numbers, one per spatial dimension.

With its first padding p, stride s and dilation d, the kernel's element i reads the input at o·s - p + i·d for
the result at o, and zero outside. Two convolutions of one stride and dilation read the same places where a
smaller kernel lies i0 = (p - p') / d elements inside a larger one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxpasses.graph.operands import tensor_of
from fxpasses.graph.views import Convolution


@dataclass(frozen=True)
class Geometry:
    """Numbers per spatial dimension.

    Attributes:
        kernel, stride, padding, dilation: `padding` is that before the first element.
        symmetric: whether as much is padded behind the last.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    symmetric: bool = True

    @staticmethod
    def of(convolution: Convolution) -> Geometry | None:
        """The geometry of a direct convolution; None where one of its numbers is not a constant."""
        weight = tensor_of(convolution.weight)
        if weight is None or convolution.transposed:
            return None
        rank = weight.ndim - 2
        kernel = _numbers(list(weight.shape[2:]), rank)
        stride, dilation = _numbers(convolution.stride, rank), _numbers(convolution.dilation, rank)
        if kernel is None or stride is None or dilation is None:
            return None
        if convolution.padding == "valid":
            return Geometry(kernel, stride, (0,) * rank, dilation)
        if convolution.padding == "same":
            around = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            halves = tuple(total // 2 for total in around)
            return Geometry(kernel, stride, halves, dilation, not any(total % 2 for total in around))
        padding = _numbers(convolution.padding, rank)
        return None if padding is None else Geometry(kernel, stride, padding, dilation)

    @property
    def elements(self) -> int:
        """How many elements the kernel has for each pair of channels."""
        return math.prod(self.kernel)

    def offsets_of(self, smaller: Geometry) -> tuple[int, ...] | None:
        """Where a smaller kernel lies inside this one, so that both read the same places; None if nowhere."""
        found = []
        for position, (k, k1) in enumerate(zip(self.kernel, smaller.kernel, strict=True)):
            d, d1 = self.dilation[position], smaller.dilation[position]
            shift = self.padding[position] - smaller.padding[position]
            same_spacing = k1 == 1 or d == d1
            if self.stride[position] != smaller.stride[position] or not same_spacing or shift % d:
                return None
            first = shift // d
            if first < 0 or first + k1 > k:
                return None
            found.append(first)
        return tuple(found)


def reads_inside(convolution: Convolution) -> bool:
    """Whether a direct convolution reads inside its input only, whatever its kernel's size may be."""
    padding = convolution.padding
    if convolution.transposed or padding == "valid":
        return not convolution.transposed
    if isinstance(padding, str):
        found = Geometry.of(convolution)
        return found is not None and found.symmetric and not any(found.padding)
    return all(isinstance(pad, int) and pad == 0 for pad in _listed(padding))


def _listed(given: object) -> list[object]:
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _numbers(given: object, rank: int) -> tuple[int, ...] | None:
    listed = _listed(given)
    numbers = [number for number in listed if isinstance(number, int)]
    if len(numbers) != len(listed):
        return None
    return tuple(numbers * rank if len(numbers) == 1 else numbers)
