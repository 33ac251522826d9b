"""What tensors hold, compared with what they held: of statistics all values, of other tensors a few.

    running_var    0.9 1.1 0.8 0.7     every value: eager's batch norm writes them without a new version
    weight         . . o . O . o .     its largest, its smallest, the least but zero, some more: sentinels

A write that torch does not tell of, such as `weight.data.mul_(2)` or one through a numpy view, moves no
version. Where it writes a whole tensor, it changes the sentinels: a clamp, the largest or the smallest value;
a mask that prunes, the value next to zero; a product, a sum or a copy, these and most others. A write to a
few elements alone may miss them all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxpasses.torch_internals.comparison import compares_in_cpp, comparison, read

_LINE = 64
"""Bytes that a processor fetches at a time: the neighbours of a sentinel cost nothing."""


@dataclass(frozen=True)
class Contents:
    """What was read of the memory of tensors.

    Attributes:
        memory: tensors on the CPU, whose addresses are used as long as this is.
        blocks: what was read there; None if nothing was.
        groups: of the others, by dtype and device.
    """

    memory: tuple[torch.Tensor, ...]
    blocks: object
    groups: tuple[_Group, ...]

    @staticmethod
    def of(sources: Sequence[torch.Tensor], *, everywhere: bool = False) -> Contents:
        """Reads them.

        Args:
            sources: of any dtypes and devices.
            everywhere: whether there are sentinels in tensors on other devices than the CPU, too. Each call
                of `hold` waits for the device then, and reads from each tensor.
        """
        compared = compares_in_cpp()
        members: list[tuple[torch.Tensor, tuple[int, ...] | None]] = []
        groups: dict[tuple[torch.dtype, torch.device], list[tuple[int, torch.Tensor | None]]] = defaultdict(
            list
        )
        for position, source in enumerate(sources):
            if source.numel() == 0:
                continue
            is_statistic = source.ndim == 1 and not isinstance(source, torch.nn.Parameter)
            kind = source.dtype, source.device
            if source.is_cpu and compared and (source.is_contiguous() or not is_statistic):
                members.append((source, None if is_statistic else _sentinels(source)))
            elif is_statistic:
                groups[kind].append((position, None))
            elif everywhere:
                found = torch.tensor(_sentinels(source), device=source.device)
                groups[kind].append((position, found))
        made = (_Group.of(tuple(group), sources) for group in groups.values())
        memory = tuple(tensor.detach() for tensor, _ in members)
        return Contents(memory, read(_places(members)) if members else None, tuple(made))

    def hold(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether the values are what they were, of sources that still lie at the same addresses."""
        same = self.blocks is None or comparison((), (), (), (), self.blocks)(())
        return same and self.groups_hold(sources)

    def groups_hold(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether the values of the groups are."""
        return not self.groups or all(group.hold(sources) for group in self.groups)


def _sentinels(tensor: torch.Tensor) -> tuple[int, ...]:
    """Positions in the logical order of a tensor: of its extreme values, or spread ones if these are one."""
    count = tensor.numel()
    spread = {count // 4, 3 * count // 4}
    if tensor.dtype == torch.bool or tensor.is_complex():  # which have no order
        return tuple(sorted(spread))
    flat = tensor.detach().reshape(-1)
    if flat.dtype not in (torch.float32, torch.float64):  # of which some have no argmax
        flat = flat.to(torch.float32)
    # Masks write zeros where values are small, and zeros are what a product leaves.
    small = torch.where(flat == 0, torch.inf, flat.abs())
    extremes = {int(flat.argmax()), int(flat.argmin()), int(small.argmin())}
    return tuple(sorted(extremes if len(extremes) > 1 else extremes | spread))


def _places(members: Sequence[tuple[torch.Tensor, tuple[int, ...] | None]]) -> list[tuple[int, int]]:
    """Addresses and sizes in bytes of what is compared.

    Args:
        members: tensors, and which of their elements to compare; None for all of a contiguous one.
    """
    places: set[tuple[int, int]] = set()
    for tensor, positions in members:
        size, start = tensor.element_size(), tensor.data_ptr()
        if positions is None:
            places.add((start, tensor.numel() * size))
            continue
        span = 1 + _offset(tensor, tensor.numel() - 1)
        for position in positions:
            place = start + size * _offset(tensor, position)
            if span > tensor.numel():  # there are others' values in between
                places.add((place, size))
            else:
                first, last = max(place // _LINE * _LINE, start), start + size * span
                places.add((first, min(place // _LINE * _LINE + _LINE, last) - first))
    return sorted(places)  # neighbours are faster to read


def _offset(tensor: torch.Tensor, position: int) -> int:
    """How many elements of its storage lie between a tensor's first element and another.

    Args:
        tensor: with any strides.
        position: of the other in logical order.
    """
    offset = 0
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        position, index = divmod(position, size)
        offset += index * stride
    return offset


@dataclass(frozen=True)
class _Group:
    """Values of one dtype and device, read by torch.

    Attributes:
        members: positions among the sources, and which elements are read there; None for all.
        values: that they had, end to end.
    """

    members: tuple[tuple[int, torch.Tensor | None], ...]
    values: torch.Tensor

    @staticmethod
    def of(members: tuple[tuple[int, torch.Tensor | None], ...], sources: Sequence[torch.Tensor]) -> _Group:
        return _Group(members, _values(members, sources))

    def hold(self, sources: Sequence[torch.Tensor]) -> bool:
        return torch.equal(_values(self.members, sources), self.values)


def _values(
    members: Sequence[tuple[int, torch.Tensor | None]], sources: Sequence[torch.Tensor]
) -> torch.Tensor:
    parts = ((sources[at].detach().reshape(-1), which) for at, which in members)
    return torch.cat([part if which is None else part[which] for part, which in parts])
