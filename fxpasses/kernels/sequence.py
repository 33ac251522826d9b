"""The operator `fxpasses::sequence`: many steps over float32 images in one call.

A call from Python costs a step of a small network as much as the step itself: the call, an allocation, and a
walk through code that the last kernel drove out of the caches. Here the steps are words of a program that the
operator reads; what passes between them lives in one block of memory. Batches, heights and widths are no part
of a program: they follow from those of the inputs, so that one serves all sizes. A product over single pixels
may also gather what it reads: several images as one's channels (so that a concatenation is never written),
times a scale or a gate, plus a shift, clamped. Where what passes between convolutions is larger than the
nearer caches, they become a chain, of which a thread makes a few rows at a time.

Values are numbered: the inputs, then the results, then the others. All lie in channels-last memory but inputs
that are read plane by plane.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fxpasses.kernels.kernel import Kernel, Kind

PRODUCT, MEAN, GATHER, CHAIN, SUM, MAX = range(6)
_FAR = 2**19
"""Bytes of a tensor that the nearer caches do not hold, so that it is better made row by row."""
_FILTERS = 2**18
"""Bytes of the filters that are read again for every few rows."""
_AGAIN = 8
"""At most one row of so many may be made by two threads."""


@dataclass(frozen=True)
class Reading:
    """What a step reads, and what it does with that first.

    Attributes:
        values: images of the same batch, height and width, one after another along the channels.
        widths: the channels of each.
        gate: a value of shape [batch, channels] that the image is multiplied by, or None.
        scale, shift: constants of shape [channels], or None.
        limits: of a clamp afterwards, or None.
        firsts: the first channel that is read of each value; None where all of all are.
    """

    values: tuple[int, ...]
    widths: tuple[int, ...]
    gate: int | None = None
    scale: int | None = None
    shift: int | None = None
    limits: tuple[float, float] | None = None
    firsts: tuple[int, ...] | None = None


class Convolution(NamedTuple):
    """One convolution of a step: the operator's arguments, with numbers in the place of tensors.

    Attributes:
        sizes: `Sizes.argument`.
        kernel: which computes it.
        filters: the constant that holds the packed filters.
        summand: the value that is added, or None.
        activation: what follows, and the limits `low` and `high` of a clamp.
    """

    sizes: list[int]
    kernel: Kernel
    filters: int
    summand: int | None
    activation: int
    low: float
    high: float

    @property
    def is_single(self) -> bool:
        """Whether it is a product over all single pixels."""
        return self.kernel.is_blocked_product and self.sizes[1:] == [1, 1, 1, 1, 1, 0, 0, 1, 1]

    @property
    def is_by_rows(self) -> bool:
        """Whether it is one that can make single rows: over each channel or group, or over single pixels."""
        return self.slides or self.is_single

    @property
    def slides(self) -> bool:
        """Whether each of its rows needs several of its image, a channel or a group at a time."""
        return self.kernel.kind in (Kind.DEPTHWISE, Kind.SLIDING)

    def filter_bytes(self, channels: int) -> int:
        """Those of its filters over an image of so many channels; few where each channel has one."""
        filters, groups, height, width = self.sizes[:4]
        return 4 * channels * filters // groups * height * width


@dataclass(frozen=True)
class Step:
    """One step of a program.

    Attributes:
        kind: `PRODUCT` is a convolution, `MEAN` each channel's over the pixels, `GATHER` what is read itself,
            `CHAIN` convolutions of which each reads only what the one before gives, row by row, `SUM` the
            sum of what is read, `MAX` each channel's maximum under a window.
        result: the value that it gives.
        reading: what it reads.
        image: batch, height, width and channels of that, at the hints; a matrix is a batch of single pixels.
        convolutions: the one of a `PRODUCT` or those of a `CHAIN`.
        window: of a `MAX`: kernel, stride, padding and dilation, height and width each.
    """

    kind: int
    result: int
    reading: Reading
    image: tuple[int, int, int, int]
    convolutions: tuple[Convolution, ...] = ()
    window: tuple[int, ...] = ()

    @property
    def planar(self) -> tuple[int, ...]:
        """The values that the step reads in contiguous memory, plane by plane."""
        return self.reading.values if any(one.kernel.planar for one in self.convolutions) else ()

    @property
    def read(self) -> list[int]:
        """The values that the step reads."""
        others = [self.reading.gate, *(one.summand for one in self.convolutions)]
        return [*self.reading.values, *(value for value in others if value is not None)]

    def words(self) -> list[int]:
        """The step as the operator reads it."""
        reading = self.reading
        firsts = reading.firsts or (0,) * len(reading.values)
        parts = [word for part in zip(reading.values, firsts, reading.widths, strict=True) for word in part]
        words = [self.kind, self.result, len(reading.values), *parts, self.image[3]]
        if self.kind in (MEAN, SUM, MAX):
            return [*words, *self.window]
        words += [-1 if number is None else number for number in (reading.gate, reading.scale, reading.shift)]
        words += [reading.limits is not None, *map(_bits, reading.limits or (0.0, 0.0))]
        if self.kind == CHAIN:
            words.append(len(self.convolutions))
        for one in self.convolutions:
            words += [*one.sizes, one.kernel.code, one.filters, -1 if one.summand is None else one.summand]
            words += [one.activation, _bits(one.low), _bits(one.high)]
        return words

    def followed_by(self, other: Step) -> Step | None:
        """Both as one `CHAIN`; None where they cannot be, or where that does not pay."""
        if self.kind not in (PRODUCT, CHAIN) or other.kind != PRODUCT:
            return None
        first, last, (new,) = self.convolutions[0], self.convolutions[-1], other.convolutions
        channels = last.sizes[0]
        plain = self.reading == Reading(self.reading.values[:1], self.reading.widths[:1])
        alone = other.reading == Reading((self.result,), (channels,))
        heads = first.is_by_rows or first.kernel.kind is Kind.FEW_CHANNELS
        if not (plain and alone and heads and new.is_by_rows):
            return None
        count, height, width, _ = other.image
        every = (*self.convolutions, new)
        shared = (one.sizes[2] - one.sizes[4] for one in every if one.slides)
        again = sum(max(0, rows) for rows in shared) * (torch.get_num_threads() - 1)
        if 4 * count * height * width * channels < _FAR or _AGAIN * again > count * height:
            return None
        widths = (self.image[3], *(one.sizes[0] for one in every[:-1]))
        if sum(one.filter_bytes(read) for read, one in zip(widths, every, strict=True)) > _FILTERS:
            return None
        return Step(CHAIN, other.result, self.reading, self.image, every)


def joined(steps: Sequence[Step], given: int) -> list[Step]:
    """The steps, with those joined whose result only the next one reads."""
    readers = Counter(value for step in steps for value in step.read)
    done: list[Step] = []
    for step in steps:
        both = done[-1].followed_by(step) if done else None
        if both is not None and done[-1].result >= given and readers[done[-1].result] == 1:
            done[-1] = both
        else:
            done.append(step)
    return done


def program(steps: Sequence[Step], given: int, others: int) -> list[int]:
    """The words that the operator reads.

    Args:
        steps: in an order in which they can be done.
        given: how many values are inputs or results.
        others: how many are neither.
    """
    steps = joined(steps, given)
    last = {value: at for at, step in enumerate(steps) for value in (step.result, *step.read)}
    planar = sorted({value for step in steps for value in step.planar})
    head = [others, len(steps), len(planar), *(last.get(given + at, -1) for at in range(others)), *planar]
    return [*head, *(word for step in steps for word in step.words())]


def shapes_argument(shapes: Sequence[Sequence[int]]) -> list[int]:
    """The operator's argument `shapes`: four words for each result; a matrix has -1 for height and width."""
    return [size for shape in shapes for size in (*shape, *(() if len(shape) == 4 else (-1, -1)))]


def _bits(number: float) -> int:
    """A double as an integer of the same bits."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
