"""Which implementation of a convolution is the fastest here, torch's or a kernel of ours: by measuring.

What was measured is in the device's own store, so that the next process does not measure it again. It is
written there by `keep`, once a compilation: a store may be large.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fxpasses.devices.caches import far as far_bytes
from fxpasses.devices.caches import sets_needed
from fxpasses.devices.own import own_store
from fxpasses.devices.profile import Choice
from fxpasses.kernels import library
from fxpasses.kernels.convolution import Sizes, kernels_for, pack
from fxpasses.kernels.kernel import Kernel, Kind
from fxpasses.torch_internals.fake_tensors import without_fake_tensors
from fxpasses.torch_internals.onednn import (
    pack_convolution_weight,
    packed_convolution,
    packed_convolution_onto,
)

_MARGIN = 1.05
"""Ours may take this part of their time: among others of ours it reads what was just written."""
_ALIKE = 1.05
"""What two measurements of one kernel differ by: of two alike, the one is taken that can make single rows."""
_CALL = 10e-6
"""Seconds that a call of an operator from Python takes in a model, which ours saves there."""
_ROUNDS = (5, 15)
_LONG = 0.02
"""Seconds for which one implementation is measured at most, once the fewest rounds are done."""
_LINE = 16
"""Floats of a line of the caches."""
_FAR = 2**25
"""Bytes of other tensors after which one is near no more."""


@dataclass(frozen=True)
class KernelTiming:
    """What was measured for one convolution.

    Attributes:
        kernel: of ours, the fastest; None where there is none.
        seconds: that it takes.
        theirs: seconds that torch's takes: oneDNN's convolution, or a matrix product.
    """

    kernel: Kernel | None
    seconds: float
    theirs: float

    @property
    def pays(self) -> bool:
        """Whether ours is faster, in a model where most kernels are ours."""
        return self.kernel is not None and self.seconds < _MARGIN * self.theirs + _CALL


def choose(
    sizes: Sizes,
    image: tuple[int, int, int, int],
    *,
    summand: bool = False,
    planar: bool = False,
    far: bool = False,
) -> KernelTiming:
    """What a convolution takes with random operands: as the store has it, else by measuring.

    Args:
        sizes: of the convolution.
        image: the sizes of what it reads: batch, channels, height, width.
        summand: whether a tensor is added to the result, which oneDNN does in that tensor's memory.
        planar: whether the image is in contiguous memory, not in channels-last.
        far: whether the filters are in no cache when they are read, as in a model of many weights.
    """
    return _kept(
        _key(sizes, image, summand, planar, far), lambda: _measure(sizes, image, summand, planar, far)
    )


def known(sizes: Sizes, image: tuple[int, int, int, int]) -> KernelTiming | None:
    """What the store has of a convolution, whatever it adds and wherever its operands are; or None."""
    found = own_store("cpu").profile().choices
    ways = itertools.product((False, True), repeat=3)
    keys = (_key(sizes, image, summand, planar, far) for far, planar, summand in ways)
    return next((_timing(found[key]) for key in keys if key in found), None)


def _key(sizes: Sizes, image: tuple[int, int, int, int], summand: bool, planar: bool, far: bool) -> str:
    return f"{sizes!r} image={image} summand={summand} planar={planar} far={far} {library.identity()}"


def _timing(choice: Choice) -> KernelTiming:
    kernel = None if choice.kernel is None else Kernel.from_code(choice.kernel)
    return KernelTiming(kernel, choice.seconds, choice.library)


def _measure(
    sizes: Sizes, image: tuple[int, int, int, int], summand: bool, planar: bool, far: bool
) -> KernelTiming:
    with without_fake_tensors(), torch.no_grad(), torch.random.fork_rng(devices=()):
        x = torch.randn(image)
        if not planar:
            x = x.contiguous(memory_format=torch.channels_last)
        filters = torch.randn(sizes.filters, sizes.channels // sizes.groups, *sizes.kernel)
        bias = torch.randn(sizes.filters)
        space = map(list, (sizes.stride, sizes.padding, sizes.dilation))
        arguments = (x, filters, bias, *space, False, [0, 0], sizes.groups)
        pack_theirs = pack_convolution_weight(arguments, image)
        theirs = [pack_theirs(filters) for _ in range(_sets_of_filters(filters) if far else 1)]
        bound = [packed_convolution(arguments, packed) for packed in theirs]
        operator, given = bound[0]
        result = operator(*given)
        copies = _copies(x, filters, result)
        images = [x, *(x.clone() for _ in range(copies - 1))]
        ours = kernels_for(sizes, result.shape[0] * result.shape[2] * result.shape[3], planar=planar)
        others = [result.clone() for _ in images] if summand else None
        if others is None:
            calls = [lambda at: operator(images[at % copies], *bound[at % len(bound)][1][1:])]
        else:
            turns = range(math.lcm(copies, len(theirs)))
            onto = [
                packed_convolution_onto((images[at % copies], *arguments[1:]), theirs[at % len(theirs)])
                for at in turns
            ]
            calls = [lambda at: onto[at % len(turns)](others[at % copies])]
        packed = [pack(sizes, kernel, filters, bias) for kernel in ours]
        for kernel, weights in zip(ours, _apart(packed) if far else [[one] for one in packed], strict=True):
            added = None if kernel.kind is Kind.DEPTHWISE else others
            calls.append(_call(sizes, kernel, images, weights, added))
        return _fastest(ours, calls, copies)


def _sets_of_filters(filters: torch.Tensor) -> int:
    return min(_ROUNDS[1], sets_needed(filters.nbytes, filters.device))


@functools.lru_cache(1)
def _memory(floats: int) -> torch.Tensor:
    return torch.full((floats,), 0.01)


def _apart(packed: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """For each packed weight tensors of its size, of which no cache holds one when all are read in turn.

    They hold other numbers, and share memory that is larger than the caches.
    """
    cpu = torch.device("cpu")
    lines = [-(-one.numel() // _LINE) * _LINE for one in packed]
    pool = _memory(max(far_bytes(cpu) // 4, *lines))
    found: list[list[torch.Tensor]] = [[] for _ in packed]
    start = 0
    for _ in range(_ROUNDS[1]):
        for one, length, views in zip(packed, lines, found, strict=True):
            start = start if start + length <= len(pool) else 0
            views.append(pool[start : start + one.numel()])
            start += length
    return found


def choose_linear(rows: int, channels: int, filters: int) -> KernelTiming:
    """What a linear layer and torch's matrix product take with random operands, as for `choose`.

    Args:
        rows: of what it reads, over all its leading sizes.
        channels: size of a row.
        filters: size of a row of the result.
    """
    key = f"linear rows={rows} channels={channels} filters={filters} {library.identity()}"
    return _kept(key, lambda: _measure_linear(rows, channels, filters))


def _measure_linear(rows: int, channels: int, filters: int) -> KernelTiming:
    sizes = Sizes.of_linear(channels, filters)
    ours = kernels_for(sizes, rows)
    with without_fake_tensors(), torch.no_grad(), torch.random.fork_rng(devices=()):
        x, weight, bias = torch.randn(rows, channels), torch.randn(filters, channels), torch.randn(filters)
        copies = _copies(x, weight, torch.addmm(bias, x, weight.t()))
        images = [x, *(x.clone() for _ in range(copies - 1))]
        calls = [lambda at: torch.addmm(bias, images[at % copies], weight.t())]
        for kernel in ours:
            calls.append(_call(sizes, kernel, images, [pack(sizes, kernel, weight, bias)]))
        return _fastest(ours, calls, copies)


_unwritten: dict[Path, dict[str, Choice]] = defaultdict(dict)
"""What was measured and is not in the store yet, by the store's file."""


def _kept(key: str, measure: Callable[[], KernelTiming]) -> KernelTiming:
    """What the device's store has under a key, or what is measured now."""
    store = own_store("cpu")  # one for each number of threads
    unwritten = _unwritten[store.path]
    found = unwritten.get(key) or store.profile().choices.get(key)
    if found is not None:
        return _timing(found)
    timing = measure()
    code = None if timing.kernel is None else timing.kernel.code
    unwritten[key] = Choice(code, timing.seconds, timing.theirs)
    return timing


def keep() -> None:
    """Writes what was measured to the device's store."""
    _memory.cache_clear()
    store = own_store("cpu")
    if unwritten := _unwritten.pop(store.path, None):
        store.merge(replace(store.empty, choices=unwritten))


def _fastest(
    ours: Sequence[Kernel], calls: Sequence[Callable[[int], torch.Tensor]], copies: int
) -> KernelTiming:
    """What was measured of torch's call, which is the first, and of our kernels' calls."""
    theirs, *seconds = _medians(calls, copies)
    if not ours:
        return KernelTiming(None, theirs, theirs)
    timed = sorted(zip(seconds, ours, strict=True), key=lambda timed: (timed[0], timed[1].code))
    alike = [one for one in timed if one[0] < _ALIKE * timed[0][0]]
    best, kernel = next((one for one in alike if one[1].kind is Kind.SLIDING), timed[0])
    return KernelTiming(kernel, best, theirs)


def _copies(*tensors: torch.Tensor) -> int:
    """How many images to read in turn, so that neither they nor the results are near when they come again."""
    return min(_ROUNDS[1], 1 + _FAR // sum(tensor.nbytes for tensor in tensors))


def _call(
    sizes: Sizes,
    kernel: Kernel,
    images: Sequence[torch.Tensor],
    packed: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor] | None = None,
) -> Callable[[int], torch.Tensor]:
    rest = (sizes.argument(kernel), kernel.code, 0, 0.0, 0.0)
    summands: Sequence[torch.Tensor | None] = others or [None] * len(images)

    def call(at: int) -> torch.Tensor:
        image, summand = images[at % len(images)], summands[at % len(images)]
        found: torch.Tensor = torch.ops.fxpasses.convolution(image, packed[at % len(packed)], summand, *rest)
        return found

    return call


def _medians(calls: Sequence[Callable[[int], torch.Tensor]], copies: int) -> list[float]:
    """The median time of each call, in turns, as it is among other work: with operands that are not near."""
    results = deque((call(0) for call in calls), maxlen=copies * len(calls))
    taken: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    for done in range(_ROUNDS[1]):
        if done >= _ROUNDS[0] and time.perf_counter() - began > _LONG * len(calls):
            break
        for times, call in zip(taken, calls, strict=True):
            start = time.perf_counter()
            result = call(done + 1)
            times.append(time.perf_counter() - start)
            results.append(result)  # stays alive, so that the next result lies elsewhere
    return [statistics.median(times) for times in taken]
