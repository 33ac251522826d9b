"""The operator `fxpasses::convolution`: a convolution in inference with what follows it fused in.

    activation(convolution(image, filters) + bias + summand)

over float32 images on an x86 CPU with AVX2 or AVX-512. Images lie in channels-last memory, but for kernels
that are planar (see `Kernel`). A matrix is read as an image of one column, so a linear layer is a convolution
too. Filters and bias are packed in one tensor, in an order that depends on the kernel's kind:

============ ===============================================================================================
depthwise    taps by channels, the bias last
product,     panels of as many output channels as are computed at a time, of which each holds its bias and
few channels then taps by input channels (planar: input channels by taps)
sliding      for each vector of output channels its bias, then taps by the input channels of a group
winograd     panels as a product's, each of 16 products over single pixels: G filter G' for Winograd's
             F(2x2, 3x3), of which the sixth has the bias
============ ===============================================================================================

Groups that are narrower than a vector are merged, with zeros between them, but for a sliding kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fxpasses.kernels import library
from fxpasses.kernels.kernel import DEPTHWISE, SLIDING, Kernel, Kind

_WIDTHS = (4, 2, 3, 1)
_TRANSFORM = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
"""G of Winograd's F(2, 3)."""
_TILES = {2: 14, 4: 7, 3: 8, 1: 14}
"""About how many tiles Winograd's kernels compute at a time, by their width."""
ACTIVATIONS = ("none", "clamp", "silu", "hardswish", "sigmoid", "hardsigmoid", "gelu", "leaky_relu")
"""What the operator's argument `activation` counts."""


@dataclass(frozen=True)
class Sizes:
    """A 2-D convolution that is not transposed, without the sizes of its image.

    Attributes:
        channels: of the image.
        filters: channels of the result.
        groups: into how many both are divided.
        kernel, stride, padding, dilation: height and width each.
    """

    channels: int
    filters: int
    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @staticmethod
    def of_linear(channels: int, filters: int) -> Sizes:
        """Those of a linear layer."""
        return Sizes(channels, filters, 1, (1, 1), (1, 1), (0, 0), (1, 1))

    @property
    def is_depthwise(self) -> bool:
        """Whether every channel has one filter of its own."""
        return self.groups == self.channels == self.filters

    @property
    def merged(self) -> int:
        """How many groups are computed as one, so that their results fill a vector."""
        vector = library.vector_length()
        width = self.filters // self.groups
        fitting = (count for count in range(1, self.groups + 1) if self.groups % count == 0)
        return next((count for count in fitting if width * count >= vector), self.groups)

    def argument(self, kernel: Kernel) -> list[int]:
        """The operator's argument `sizes`."""
        is_merged = kernel.kind in (Kind.PRODUCT, Kind.FEW_CHANNELS)
        groups = self.groups // self.merged if is_merged else self.groups
        return [self.filters, groups, *self.kernel, *self.stride, *self.padding, *self.dilation]


def kernels_for(sizes: Sizes, pixels: int, *, planar: bool = False) -> tuple[Kernel, ...]:
    """The kernels worth measuring for a convolution, none where the operator cannot be had.

    Args:
        sizes: of the convolution.
        pixels: how many its result has, over the batch.
        planar: whether its image is in contiguous memory.
    """
    vector = library.vector_length()
    if not vector:
        return ()
    if sizes.is_depthwise:
        return (DEPTHWISE,) if sizes.channels >= vector else ()
    sliding = (SLIDING,) if _slides(sizes, vector) else ()
    winograd = () if planar else _winograds(sizes, pixels, vector)
    return (*_products(sizes, pixels, vector, planar), *sliding, *winograd)


def takes_winograd(sizes: Sizes) -> bool:
    """Whether Winograd's kernels can compute a convolution here."""
    vector = library.vector_length()
    three = (sizes.kernel, sizes.stride, sizes.dilation, sizes.groups) == ((3, 3), (1, 1), (1, 1), 1)
    return bool(vector) and three and sizes.channels % vector == 0


def _slides(sizes: Sizes, vector: int) -> bool:
    """Whether it has groups that fill vectors, and three taps a row that do not lie apart."""
    reads, gives = sizes.channels // sizes.groups, sizes.filters // sizes.groups
    fills = gives % vector == 0 or (reads == gives and vector % gives == 0 and sizes.filters % vector == 0)
    three = sizes.kernel[1] == 3 and sizes.stride[1] in (1, 2) and sizes.dilation[1] == 1
    return sizes.groups > 1 and fills and three


def _winograds(sizes: Sizes, pixels: int, vector: int) -> Iterator[Kernel]:
    if not takes_winograd(sizes) or pixels < _TILES[1]:
        return
    # Those that compute the fewest tiles and output channels that nobody wants.
    tiles = -(-pixels // 4)
    computed = {
        width: -(-tiles // at_a_time) * at_a_time * -(-sizes.filters // (width * vector)) * width
        for width, at_a_time in _TILES.items()
        if width > 1 or sizes.filters <= vector
    }
    yield from (Kernel(Kind.WINOGRAD, width) for width in sorted(computed, key=computed.__getitem__)[:2])


def _products(sizes: Sizes, pixels: int, vector: int, planar: bool) -> Iterator[Kernel]:
    filters = sizes.filters // sizes.groups * sizes.merged
    # Blocks of four vectors do not fit into the 16 registers of AVX2.
    widths = _WIDTHS if vector > 8 or pixels == 1 else tuple(width for width in _WIDTHS if width < 4)
    padded = {width: -(-filters // (width * vector)) * width * vector for width in widths}
    least = min(padded.values())
    few_channels = sizes.channels < vector and sizes.groups == 1 and sizes.kernel[1] > 1
    # That with four vectors, of those that read pixel by pixel computes no more vectors than it must.
    exact = None if few_channels else 4
    worthwhile = [width for width in widths if width == exact or padded[width] <= 1.15 * least]
    for width in worthwhile[:3]:
        if pixels == 1:
            if width in (1, 4):
                yield Kernel(Kind.PRODUCT, width, single_pixel=True)
        elif few_channels and sizes.dilation[1] == 1:
            yield Kernel(Kind.FEW_CHANNELS, width, planar=planar)
        else:
            yield Kernel(Kind.PRODUCT, width)


def pack(sizes: Sizes, kernel: Kernel, filters: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Filters and bias as a kernel reads them.

    Args:
        sizes: of the convolution.
        kernel: which will read them.
        filters: float32 of shape [filters, channels / groups, height, width], or of a linear layer
            [filters, channels].
        bias: [filters], or None for zeros.

    Returns:
        A 1-D tensor.
    """
    if bias is None:
        bias = filters.new_zeros(sizes.filters)
    filters = filters.reshape(sizes.filters, sizes.channels // sizes.groups, *sizes.kernel)
    if kernel.kind is Kind.DEPTHWISE:
        return torch.cat([filters.flatten(1).t(), bias[None]]).flatten()
    if kernel.kind is Kind.SLIDING:
        by_vectors = filters.reshape(-1, library.vector_length(), *filters.shape[1:])
        vectors = by_vectors.permute(0, 3, 4, 2, 1).flatten(1, 3)
        return torch.cat([bias.view(-1, 1, library.vector_length()), vectors], 1).flatten()
    if kernel.kind is Kind.WINOGRAD:
        return _pack_winograd(kernel, filters, bias)
    merged = sizes.merged
    dense = _merged(filters, sizes.groups, merged)  # [supergroups, filters, channels, height, width]
    supergroups, width = dense.shape[:2]
    order = (0, 2, 3, 4, 1) if kernel.planar else (0, 3, 4, 2, 1)
    rows = dense.permute(order).reshape(supergroups, -1, width)
    rows = torch.cat([bias.reshape(supergroups, 1, width), rows], 1)
    panel = kernel.width * library.vector_length()
    panels = -(-width // panel)
    rows = torch.nn.functional.pad(rows, (0, panels * panel - width))
    return rows.reshape(supergroups, -1, panels, panel).transpose(1, 2).flatten()


def _pack_winograd(kernel: Kernel, filters: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    count, channels = filters.shape[:2]
    left = filters.new_tensor(_TRANSFORM, dtype=torch.float64)
    taps = (left @ filters.double() @ left.t()).float()  # rounded once
    rows = taps.permute(2, 3, 1, 0).reshape(16, channels, count)
    begins = filters.new_zeros(16, 1, count)
    begins[5, 0] = bias
    panel = kernel.width * library.vector_length()
    panels = -(-count // panel)
    rows = torch.nn.functional.pad(torch.cat([begins, rows], 1), (0, panels * panel - count))
    return rows.reshape(16, 1 + channels, panels, panel).permute(2, 0, 1, 3).flatten()


def _merged(filters: torch.Tensor, groups: int, merged: int) -> torch.Tensor:
    """Blocks of `merged` groups on the diagonal of one group each."""
    count, channels, *taps = filters.shape
    grouped = filters.reshape(groups // merged, merged, count // groups, channels, *taps)
    if merged == 1:
        return grouped[:, 0]
    wide = grouped.new_zeros(groups // merged, merged, count // groups, merged, channels, *taps)
    for group in range(merged):
        wide[:, group, :, group] = grouped[:, group]
    return wide.reshape(groups // merged, merged * count // groups, merged * channels, *taps)
