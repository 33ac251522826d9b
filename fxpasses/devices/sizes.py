"""A convolution as the cost model sees it: sizes and arguments, which may be symbolic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from fxpasses.devices.keys import convolution_key
from fxpasses.torch_internals.sizes import size_expression, size_hint

if TYPE_CHECKING:
    import sympy

Seconds: TypeAlias = "float | sympy.Expr"

Sizes = Sequence["int | torch.SymInt"]


@dataclass(frozen=True)
class ConvolutionSizes:
    """A convolution as the cost model sees it.

    Attributes:
        input, weight, output: sizes of the three tensors, [N, C, *spatial] and [K, C / groups, *kernel].
        arguments: stride, padding, dilation, transposed, output_padding, groups.
    """

    input: Sizes
    weight: Sizes
    output: Sizes
    arguments: tuple[Any, ...]

    @property
    def flops(self) -> Seconds:
        """Multiplications and additions of one direction; each of the three has as many."""
        positions = self.input if self.arguments[3] else self.output
        return 2 * product(positions) * product(self.weight[1:])

    @property
    def groups(self) -> int:
        """Into how many groups the channels fall."""
        return int(self.arguments[5])

    def key(self) -> str:
        """The key under which a device profile stores it."""
        stride, padding, dilation, transposed, output_padding, groups = self.arguments
        input_size, weight_size = ([size_hint(size) for size in sizes] for sizes in (self.input, self.weight))
        lists = [
            [size_hint(number) for number in given] for given in (stride, padding, dilation, output_padding)
        ]
        return convolution_key(
            input_size,
            weight_size,
            lists[0],
            lists[1],
            lists[2],
            bool(transposed),
            lists[3],
            size_hint(groups),
        )


def product(sizes: Sizes) -> Any:
    """The product of sizes, an expression where one of them is symbolic."""
    return math.prod(size_expression(size) for size in sizes)
