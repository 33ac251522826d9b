"""Layouts: in which order the dimensions of a 4-D or 5-D tensor lie in memory.

A tensor's label says so, whatever its strides are otherwise:

    C  contiguous      N C D H W
    L  channels_last   N D H W C

A tensor whose two orders coincide (one channel, or a single position) has no label: it suits everybody.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Literal

import torch

from fxpasses.torch_internals.sizes import size_hint

Label = Literal["contiguous", "channels_last"]
C: Label = "contiguous"
L: Label = "channels_last"
Order = Literal["contiguous", "channels_last", "both", "other"]
Frame = tuple[int, ...]
"""Which logical dimension (of N, C, *spatial) each dimension of a value stands for."""


def order_of(tensor: torch.Tensor, frame: Frame | None = None) -> Order:
    """In which order the dimensions lie in memory; dimensions of size 1 do not count.

    Symbolic sizes are read at their hints, without a guard.

    Args:
        tensor: of 4 or 5 dimensions; of any other number it has no order that counts (``"both"``).
        frame: which logical dimension each of its dimensions stands for; None for N, C, *spatial.
    """
    if tensor.layout is not torch.strided:
        return "both" if tensor.dim() not in (4, 5) else "other"
    return order_of_strides(tensor.shape, tensor.stride(), frame)


def order_of_strides(
    sizes: Sequence[int | torch.SymInt], strides: Sequence[int | torch.SymInt], frame: Frame | None = None
) -> Order:
    """`order_of` for a tensor of these sizes and strides."""
    if len(sizes) not in (4, 5):
        return "both"
    try:
        return _order(sizes, strides, frame)
    except TypeError:  # symbolic sizes have no hash
        return _order.__wrapped__(sizes, strides, frame)


@functools.lru_cache(maxsize=4096)
def _order(
    sizes: Sequence[int | torch.SymInt], strides: Sequence[int | torch.SymInt], frame: Frame | None
) -> Order:
    rank = len(sizes)
    logical = sorted(range(rank), key=frame.__getitem__) if frame else list(range(rank))
    kept = [d for d in logical if not is_one(sizes[d])]
    channels = logical[1]
    last = [d for d in kept if d != channels] + ([channels] if channels in kept else [])
    if _descends([size_hint(strides[d]) for d in kept]):
        return "both" if kept == last else C
    return L if kept != last and _descends([size_hint(strides[d]) for d in last]) else "other"


def is_one(size: int | torch.SymInt) -> bool:
    """Whether a size is 1 for certain; a symbolic one never is."""
    return isinstance(size, int) and size == 1


def memory_format(label: Label, rank: int) -> torch.memory_format:
    """What torch calls the label, for a tensor of `rank` dimensions (4 or 5)."""
    if label == C:
        return torch.contiguous_format
    return torch.channels_last if rank == 4 else torch.channels_last_3d


def to_channels_last(rank: int) -> Frame:
    """The permutation from N, C, *spatial to N, *spatial, C."""
    return (0, *range(2, rank), 1)


def composed(frame: Frame, dims: Sequence[int]) -> Frame:
    """The frame of a permuted view."""
    return tuple(frame[d % len(frame)] for d in dims)


def _descends(strides: Sequence[int]) -> bool:
    return 0 not in strides and all(map(operator.ge, strides, strides[1:]))
