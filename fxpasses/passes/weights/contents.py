"""What tensors hold, compared with what they held: of statistics all values, of other tensors a few.

    running_var    0.9 1.1 0.8 0.7     every value: eager's batch norm writes them without a new version
    weight         . . o . O . o .     its largest and its smallest value, and some in between: its sentinels

A write that torch does not tell of, such as `weight.data.mul_(2)` or one through a numpy view, moves no
version. Where it writes a whole tensor, it changes the sentinels: a clamp, the largest or the smallest value;
a product, a sum or a copy, these and most others. A write to a few elements alone may miss them all.
"""

from __future__ import annotations

import ctypes
import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxpasses.torch_internals.cpp import same_memory_function

_SPREAD = 5
"""Sentinels of a tensor beside its largest and its smallest value."""


@dataclass(frozen=True)
class Contents:
    """What was read of the memory of tensors.

    Attributes:
        blocks: of those on the CPU.
        groups: of the others, by dtype and device.
    """

    blocks: _Blocks | None
    groups: tuple[_Group, ...]

    @staticmethod
    def of(sources: Sequence[torch.Tensor], *, everywhere: bool = False) -> Contents:
        """Reads them.

        Args:
            sources: of any dtypes and devices.
            everywhere: whether there are sentinels in tensors on other devices than the CPU, too. Each call
                of `hold` waits for the device then, and reads from each tensor.
        """
        compared = same_memory_function() is not None
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
        return Contents(_Blocks(members) if members else None, tuple(made))

    def hold(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether the values are what they were, of sources that still lie at the same addresses."""
        return (self.blocks is None or self.blocks.hold()) and all(
            group.hold(sources) for group in self.groups
        )


def _sentinels(tensor: torch.Tensor) -> tuple[int, ...]:
    """Positions in the logical order of a tensor: of its extreme values, and evenly spread ones."""
    count = tensor.numel()
    if count <= _SPREAD:
        return tuple(range(count))
    spread = {(2 * part + 1) * count // (2 * _SPREAD) for part in range(_SPREAD)}
    if tensor.dtype == torch.bool or tensor.is_complex():  # which have no order
        return tuple(sorted(spread))
    flat = tensor.detach().reshape(-1)
    return tuple(sorted({*spread, int(flat.argmax()), int(flat.argmin())}))


class _Blocks:
    """Values on the CPU: a thousand are compared in some ten microseconds by one call of a C function."""

    def __init__(self, members: Sequence[tuple[torch.Tensor, tuple[int, ...] | None]]) -> None:
        """Args:
        members: tensors, and which of their elements to compare; None for all of a contiguous one.
        """
        places: list[tuple[int, int]] = []
        for tensor, positions in members:
            size, start = tensor.element_size(), tensor.data_ptr()
            if positions is None:
                places.append((start, tensor.numel() * size))
            else:
                places += [(start + size * _offset(tensor, position), size) for position in positions]
        held = ctypes.create_string_buffer(b"".join(ctypes.string_at(*place) for place in places))
        addresses, sizes = (torch.tensor(numbers, dtype=torch.int64) for numbers in zip(*places, strict=True))
        # Stay alive as long as their addresses are used.
        self._memory = (addresses, sizes, held, *(tensor.detach() for tensor, _ in members))
        compare = same_memory_function()
        assert compare is not None
        self._compare = functools.partial(
            compare, addresses.data_ptr(), sizes.data_ptr(), len(places), ctypes.addressof(held)
        )

    def hold(self) -> bool:
        return bool(self._compare())


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
        return _Group(members, _read(members, sources))

    def hold(self, sources: Sequence[torch.Tensor]) -> bool:
        return torch.equal(_read(self.members, sources), self.values)


def _read(
    members: Sequence[tuple[int, torch.Tensor | None]], sources: Sequence[torch.Tensor]
) -> torch.Tensor:
    parts = ((sources[at].detach().reshape(-1), which) for at, which in members)
    return torch.cat([part if which is None else part[which] for part, which in parts])
