"""A kernel: which loops compute a convolution, and the number by which the C++ operator knows them.

=================== ========== ==========================================================================
kind                code       how it computes
=================== ========== ==========================================================================
`Kind.DEPTHWISE`    0          one filter a channel, several pixels of a row at a time
`Kind.PRODUCT`      1-4        so many vectors of output channels and several pixels at a time
`Kind.PRODUCT`      11, 14     the same, one pixel at a time
`Kind.SLIDING`      20         groups with three taps a row, one or two vectors of output channels and
                               several pixels of a row at a time
`Kind.WINOGRAD`     31-34      3 x 3 taps of stride 1 by 16 products for each 2 x 2 pixels, so many vectors
                               of output channels at a time
`Kind.FEW_CHANNELS` 101-104    as a product, but the taps of a row are read as one: for images of few
                               channels, such as the first layer's
`Kind.FEW_CHANNELS` 201-204    the same over an image in contiguous memory, plane by plane
=================== ========== ==========================================================================

The number is made and read here and in `kernel_of` in the C++ alone; all else asks for attributes.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass


class Kind(enum.Enum):
    """The loops of a kernel."""

    DEPTHWISE = "depthwise"
    PRODUCT = "product"
    SLIDING = "sliding"
    WINOGRAD = "winograd"
    FEW_CHANNELS = "few channels"


@dataclass(frozen=True)
class Kernel:
    """One way to compute a convolution.

    Attributes:
        kind: its loops.
        width: how many vectors of output channels it computes at a time.
        single_pixel: whether it computes one pixel at a time (a product alone does).
        planar: whether it reads an image in contiguous memory, plane by plane (one for few channels alone
            does); all others read channels-last memory.
    """

    kind: Kind
    width: int = 1
    single_pixel: bool = False
    planar: bool = False

    @property
    def code(self) -> int:
        """The operator's argument `kernel`."""
        if self.kind is Kind.DEPTHWISE:
            return 0
        if self.kind is Kind.SLIDING:
            return 20
        if self.kind is Kind.WINOGRAD:
            return 30 + self.width
        memory = 0 if self.kind is Kind.PRODUCT else 200 if self.planar else 100
        return memory + 10 * self.single_pixel + self.width

    @staticmethod
    def from_code(code: int) -> Kernel:
        """The kernel of a code.

        Raises:
            ValueError: there is none.
        """
        try:
            return _BY_CODE[code]
        except KeyError:
            raise ValueError(f"no kernel {code}; there are {', '.join(map(str, _BY_CODE))}") from None

    @property
    def packing(self) -> tuple[Kind, int, bool]:
        """Equal for kernels that read filters packed alike."""
        return self.kind, self.width, self.planar

    @property
    def reads_parts(self) -> bool:
        """Whether it can read some channels of an image that has more, where they lie."""
        return self.is_blocked_product or self.kind is Kind.WINOGRAD

    @property
    def is_blocked_product(self) -> bool:
        """Whether it is a product over several pixels at a time, which can gather what it reads."""
        return self.kind is Kind.PRODUCT and not self.single_pixel


DEPTHWISE = Kernel(Kind.DEPTHWISE)
SLIDING = Kernel(Kind.SLIDING)


def _every() -> Iterator[Kernel]:
    yield DEPTHWISE
    yield from (Kernel(Kind.PRODUCT, width) for width in (1, 2, 3, 4))
    yield from (Kernel(Kind.PRODUCT, width, single_pixel=True) for width in (1, 4))
    yield SLIDING
    yield from (Kernel(Kind.WINOGRAD, width) for width in (1, 2, 3, 4))
    for planar in (False, True):
        yield from (Kernel(Kind.FEW_CHANNELS, width, planar=planar) for width in (1, 2, 3, 4))


_BY_CODE = {kernel.code: kernel for kernel in _every()}
