"""Frames: what the dimensions of a value stand for, which tells its order in memory in either layout.

An axis is a piece of the images (N), of the channels (C) or of the pixels (D, H, W), and has a place among
the axes of its kind. Two orders in memory follow, whatever a view has made of the dimensions:

    value                          axes                 contiguous       channels_last
    x             [N, C, H, W]     n0 c0 p0 p1          N C H W          N H W C
    view          [N, G, C/G, HW]  n0 c0 c1 p0          N G C/G HW       N HW G C/G
    permute       [N, HW, C]       n0 p0 c0             N C HW           N HW C

A view cuts axes into pieces and glues neighbours together. It is a view in both layouts if it glues only what
are neighbours in both: H and W, or groups and the channels of one, but not channels and pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import sympy
import torch

from fxpasses.torch_internals.sizes import size_expression, size_hint

Axis: TypeAlias = tuple[int, int]
"""The kind of an axis (`IMAGES`, `CHANNELS` or `PIXELS`), and its place among those of its kind."""

Frame: TypeAlias = tuple[Axis, ...]
"""The axis that each dimension of a value is."""

IMAGES, CHANNELS, PIXELS = range(3)

Size: TypeAlias = "int | torch.SymInt"


def is_one(size: Size) -> bool:
    """Whether a size is 1 for certain; a symbolic one never is."""
    return isinstance(size, int) and size == 1


@functools.cache
def plain(rank: int) -> Frame:
    """The frame of N, C, *spatial."""
    return ((IMAGES, 0), (CHANNELS, 0), *((PIXELS, place) for place in range(rank - 2)))


@functools.lru_cache(maxsize=4096)
def contiguous_order(frame: Frame) -> tuple[int, ...]:
    """The dimensions from the outermost to the innermost, where channels come before pixels."""
    return tuple(sorted(range(len(frame)), key=frame.__getitem__))


@functools.lru_cache(maxsize=4096)
def channels_last_order(frame: Frame) -> tuple[int, ...]:
    """The dimensions from the outermost to the innermost, where channels come last."""
    return tuple(sorted(range(len(frame)), key=lambda d: (frame[d][0] == CHANNELS, *frame[d])))


def permuted(frame: Frame, dims: Sequence[int]) -> Frame:
    """The frame of a permuted view."""
    return tuple(frame[d % len(frame)] for d in dims)


def without(frame: Frame, dims: Collection[int]) -> Frame:
    """The frame where dimensions are left out."""
    return _numbered([axis for d, axis in enumerate(frame) if d not in dims])


def inserted(frame: Frame, dim: int) -> Frame:
    """The frame with a new dimension: an outer piece of the one that it stands before, or the innermost."""
    keys = [(kind, place, 1) for kind, place in frame]
    new = (*frame[dim], 0) if dim < len(frame) else (*frame[-1], 2)
    return _numbered([*keys[:dim], new, *keys[dim:]])


def padded(frame: Frame, rank: int) -> Frame:
    """The frame of a value that is broadcast to more dimensions."""
    missing = rank - len(frame)
    new = [(IMAGES, d - missing) for d in range(missing)]
    return frame if missing <= 0 else _numbered([*new, *frame])


def reshaped(frame: Frame, before: Sequence[Size], after: Sequence[Size]) -> Frame | None:
    """The frame of a view of other sizes; None where it is no view in one of the layouts.

    Symbolic sizes are compared as expressions, without a guard.

    Args:
        frame: of what is viewed.
        before: its sizes.
        after: those of the view.
    """
    groups = _groups(before, after)
    if groups is None:
        return None
    orders = [
        [d for d in order if not is_one(before[d])]
        for order in (contiguous_order(frame), channels_last_order(frame))
    ]
    keys: dict[int, tuple[int, ...]] = {}
    for taken, given in groups:
        if not all(_are_neighbours(taken, order) for order in orders):
            return None
        for piece, d in enumerate(given):
            keys[d] = (*frame[taken[0]], piece, 0)
    nearest: tuple[int, ...] = (IMAGES, -1, 0, 0)
    for d in range(len(after)):
        # A dimension of size 1 lies behind its neighbour, where it changes no order.
        keys.setdefault(d, (*nearest[:-1], nearest[-1] + 1))
        nearest = keys[d]
    return _numbered([keys[d] for d in range(len(after))])


def agree(first: Frame, second: Frame, sizes: Sequence[Size]) -> bool:
    """Whether a value of these sizes lies in memory the same way in either of two frames, in each layout."""
    if first == second:
        return True
    return all(
        [d for d in order(first) if not is_one(sizes[d])]
        == [d for d in order(second) if not is_one(sizes[d])]
        for order in (contiguous_order, channels_last_order)
    )


def _numbered(keys: Sequence[tuple[int, ...]]) -> Frame:
    """The frame of axes whose keys begin with their kind and tell their order."""
    frame: list[Axis] = [(0, 0)] * len(keys)
    places = [0, 0, 0]
    for d in sorted(range(len(keys)), key=keys.__getitem__):
        kind = keys[d][0]
        frame[d] = kind, places[kind]
        places[kind] += 1
    return tuple(frame)


def _are_neighbours(dims: Sequence[int], order: Sequence[int]) -> bool:
    """Whether dimensions follow each other in an order."""
    start = order.index(dims[0])
    return list(dims) == list(order[start : start + len(dims)])


def _groups(before: Sequence[Size], after: Sequence[Size]) -> list[tuple[list[int], list[int]]] | None:
    """The smallest groups of dimensions that hold the same elements before and after; None if unclear.

    Dimensions of size 1 are in no group.
    """
    if any(size_hint(size) == 0 for size in before):
        return None
    taken, given = ([d for d, size in enumerate(sizes) if not is_one(size)] for sizes in (before, after))
    groups: list[tuple[list[int], list[int]]] = []
    while taken and given:
        first, second = [taken.pop(0)], [given.pop(0)]
        count, wanted = _Count(before[first[0]]), _Count(after[second[0]])
        while not count.equals(wanted):
            if count.hint < wanted.hint and taken:
                first.append(taken.pop(0))
                count.multiply(before[first[-1]])
            elif wanted.hint < count.hint and given:
                second.append(given.pop(0))
                wanted.multiply(after[second[-1]])
            else:
                return None
        groups.append((first, second))
    return None if taken or given else groups


class _Count:
    """A number of elements: its expression, and its value when traced."""

    def __init__(self, size: Size) -> None:
        self.expression: Any = size_expression(size)
        self.hint = size_hint(size)

    def multiply(self, size: Size) -> None:
        self.expression = self.expression * size_expression(size)
        self.hint *= size_hint(size)

    def equals(self, other: _Count) -> bool:
        """Whether both are the same number for all sizes."""
        if self.hint != other.hint:
            return False
        difference = self.expression - other.expression
        return bool(difference == 0) or bool(sympy.expand(difference) == 0)
