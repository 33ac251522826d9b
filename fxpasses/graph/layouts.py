"""Layouts: in which order the dimensions of a 4-D or 5-D tensor lie in memory.

A tensor's label says so, whatever its strides are otherwise:

    C  contiguous      N C D H W
    L  channels_last   N D H W C

A tensor whose two orders coincide (one channel, or a single position) has no label: it suits everybody.
Of a view of such a tensor, its frame (see `frames`) tells which dimensions are channels.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Literal

import torch

from fxpasses.graph.frames import Frame, channels_last_order, contiguous_order, is_one, plain
from fxpasses.torch_internals.sizes import size_hint

Label = Literal["contiguous", "channels_last"]
C: Label = "contiguous"
L: Label = "channels_last"
Order = Literal["contiguous", "channels_last", "both", "other"]


def order_of(tensor: torch.Tensor, frame: Frame | None = None) -> Order:
    """In which order the dimensions lie in memory; dimensions of size 1 do not count.

    Symbolic sizes are read at their hints, without a guard.

    Args:
        tensor: of 4 or 5 dimensions; of any other number it has no order that counts (``"both"``) without
            a frame.
        frame: what its dimensions stand for; None for N, C, *spatial.
    """
    if tensor.layout is not torch.strided:
        return "both" if tensor.dim() not in (4, 5) else "other"
    return order_of_strides(tensor.shape, tensor.stride(), frame)


def order_of_strides(
    sizes: Sequence[int | torch.SymInt], strides: Sequence[int | torch.SymInt], frame: Frame | None = None
) -> Order:
    """`order_of` for a tensor of these sizes and strides."""
    if frame is None:
        if len(sizes) not in (4, 5):
            return "both"
        frame = plain(len(sizes))
    try:
        return _order(sizes, strides, frame)
    except TypeError:  # symbolic sizes have no hash
        return _order.__wrapped__(sizes, strides, frame)


@functools.lru_cache(maxsize=4096)
def _order(sizes: Sequence[int | torch.SymInt], strides: Sequence[int | torch.SymInt], frame: Frame) -> Order:
    first, last = (
        [d for d in order if not is_one(sizes[d])]
        for order in (contiguous_order(frame), channels_last_order(frame))
    )
    if _descends([size_hint(strides[d]) for d in first]):
        return "both" if first == last else C
    return L if first != last and _descends([size_hint(strides[d]) for d in last]) else "other"


def order_in_memory(frame: Frame, label: Label) -> tuple[int, ...]:
    """The dimensions from the outermost to the innermost, of a value with a label."""
    return contiguous_order(frame) if label == C else channels_last_order(frame)


def memory_format(label: Label, rank: int) -> torch.memory_format:
    """What torch calls the label, for a tensor of `rank` dimensions (4 or 5)."""
    if label == C:
        return torch.contiguous_format
    return torch.channels_last if rank == 4 else torch.channels_last_3d


def to_channels_last(rank: int) -> tuple[int, ...]:
    """The permutation from N, C, *spatial to N, *spatial, C."""
    return (0, *range(2, rank), 1)


def _descends(strides: Sequence[int]) -> bool:
    return 0 not in strides and all(map(operator.ge, strides, strides[1:]))
