"""Operands that no cache holds, cut from one block of memory: they cost no allocation and no copies.

    block   [ x0 | w0 | x1 | w1 | x2 | w2 | ...         ]     sets of operands, read in turn

When a set comes again, so much of the block was read since that nothing of it is in a cache. The values are
random, and the same for whatever is cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fxpasses.devices.caches import far
from fxpasses.devices.profile import Layout

_ALIGNMENT = 64
_TILE = 4096
_MOST_SETS = 256


class Arena:
    """A block of memory on one device, for operands of one dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, hot: bool = False) -> None:
        """Args:
        device: where.
        dtype: of the operands.
        hot: whether there is to be one set alone, so that every call but the first finds it in a cache.
        """
        self._device, self._dtype, self._hot = device, dtype, hot
        self._block = torch.empty(0, dtype=dtype, device=device)

    def sets(
        self, shapes: Sequence[Sequence[int]], layout: Layout, *, written: int = 0
    ) -> list[tuple[torch.Tensor, ...]]:
        """As many sets of operands as it takes, so that each is in no cache when it comes again.

        Args:
            shapes: of the operands of one call.
            layout: of those with 4 or 5 dimensions; the others are contiguous.
            written: elements that one call writes, beside what it reads.
        """
        read = sum(map(_aligned, map(math.prod, shapes)))
        block = self._at_least(read)
        count = min(_MOST_SETS, block.numel() // max(read, 1))
        moved = max(1, (read + written) * self._dtype.itemsize)
        enough = 1 if self._hot else 1 + far(self._device) // moved
        return [self._cut(index * read, shapes, layout) for index in range(max(1, min(count, enough)))]

    def _at_least(self, elements: int) -> torch.Tensor:
        wanted = max(elements, far(self._device) // self._dtype.itemsize)
        if self._block.numel() < wanted:
            tiles = -(-wanted // _TILE)
            generator = torch.Generator(self._device).manual_seed(0)
            tile = torch.randn(_TILE, generator=generator, device=self._device).to(self._dtype)
            self._block = torch.empty(0, dtype=self._dtype, device=self._device)  # freed before the next one
            self._block = tile.expand(tiles, _TILE).reshape(-1)
        return self._block

    def _cut(self, start: int, shapes: Sequence[Sequence[int]], layout: Layout) -> tuple[torch.Tensor, ...]:
        found = []
        for shape in shapes:
            count = math.prod(shape)
            found.append(_laid_out(self._block[start : start + count], shape, layout))
            start += _aligned(count)
        return tuple(found)


def _aligned(elements: int) -> int:
    return -(-elements // _ALIGNMENT) * _ALIGNMENT


def _laid_out(flat: torch.Tensor, shape: Sequence[int], layout: Layout) -> torch.Tensor:
    if layout == "contiguous" or len(shape) not in (4, 5):
        return flat.view(*shape)
    return flat.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
