"""Which layers the kernels of a profile compute, by their sizes and their order.

A class is all layers of equal sizes. Where a call of the model runs as many kernels of a class's sizes as the
class has layers, they are these, in order of execution. (Layers of which neither depends on the other may
change places; as their work is equal, a table of classes does not.) A kernel may also compute several layers
that read the same tensor, as one with the filters of all. Anything else is not certain and not matched.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from benchmarks.layers.layer import Layer


@dataclass(frozen=True)
class Work:
    """The sizes of a convolution as a profile has them; a linear layer is one over single pixels.

    Attributes:
        image: batch, channels, then height and width.
        filters: channels of the result.
        taps, stride, padding, dilation: of each dimension of space.
        is_depthwise: whether every channel has one filter of its own. How many groups others have may not be
            known, as kernels merge them.
        transposed: whether it is a transposed convolution.
    """

    image: tuple[int, ...]
    filters: int
    taps: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    is_depthwise: bool = False
    transposed: bool = False

    @staticmethod
    def of_linear(rows: int, channels: int, filters: int) -> Work:
        """That of a linear layer."""
        return Work((rows, channels, 1, 1), filters, (1, 1), (1, 1), (0, 0), (1, 1))

    @staticmethod
    def of_layer(layer: Layer) -> Work:
        """That of a layer."""
        if layer.is_linear:
            return Work.of_linear(layer.image[0], layer.image[1], layer.weight[0])
        filters = layer.weight[1] * layer.groups if layer.transposed else layer.weight[0]
        spaces = (layer.weight[2:], layer.stride, layer.padding, layer.dilation)
        return Work(layer.image, filters, *spaces, layer.is_depthwise, layer.transposed).plain

    @property
    def plain(self) -> Work:
        """Equal for all that do the same: over one pixel, one tap needs no stride."""
        ones = tuple(1 for _ in self.taps)
        zeros = tuple(0 for _ in self.taps)
        is_pixel = self.image[2:] == self.taps == ones and self.padding == zeros
        return replace(self, stride=ones, dilation=ones) if is_pixel else self


def matched(layers: Sequence[Layer], works: Sequence[Work]) -> list[tuple[int, ...] | None]:
    """Of each kernel of a call, in order of execution, its layers' positions; None where not certain."""
    classes: dict[Work, list[int]] = defaultdict(list)
    for position, layer in enumerate(layers):
        classes[Work.of_layer(layer)].append(position)
    groups = {
        work: {layers[position].groups for position in positions} for work, positions in classes.items()
    }
    several = _several(layers, classes)
    wanted: dict[Work, list[int]] = defaultdict(list)
    for at, work in enumerate(works):
        wanted[work.plain].append(at)
    found: list[tuple[int, ...] | None] = [None] * len(works)
    taken: set[int] = set()
    for work, places in wanted.items():
        sets = several.get(work, [])
        if work not in classes and len(sets) == len(places) and _disjoint(sets):
            for at, positions in zip(places, sets, strict=True):
                found[at] = positions
                taken.update(positions)
    for work, places in wanted.items():
        left = [position for position in classes.get(work, []) if position not in taken]
        if len(left) == len(places) and len(groups[work]) == 1:
            for at, position in zip(places, left, strict=True):
                found[at] = (position,)
    return found


def _several(layers: Sequence[Layer], classes: dict[Work, list[int]]) -> dict[Work, list[tuple[int, ...]]]:
    """What a kernel would do that computes several layers, and which these are: all that read one tensor."""
    works = {position: work for work, positions in classes.items() for position in positions}
    readers: dict[Hashable, list[int]] = defaultdict(list)
    for position, layer in enumerate(layers):
        if layer.groups == 1 and not layer.transposed:
            readers[layer.source, replace(works[position], filters=0)].append(position)
    found: dict[Work, list[tuple[int, ...]]] = defaultdict(list)
    for positions in readers.values():
        for size in range(2, min(len(positions), 6) + 1):
            for some in combinations(positions, size):
                filters = sum(works[position].filters for position in some)
                found[replace(works[some[0]], filters=filters)].append(some)
    return found


def _disjoint(sets: Sequence[tuple[int, ...]]) -> bool:
    return max(Counter(position for each in sets for position in each).values(), default=0) < 2
