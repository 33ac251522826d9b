"""Memory of CPU tensors between calls: what glibc gives back to the system must be faulted in again.

A compiled function frees all of its intermediate tensors in each call and allocates them in the next. glibc
gives large blocks back at once and the top of the heap beyond a threshold, so the next call pays one page
fault for every 4 KiB: about 1 µs each, which is 9 of resnet50's 42 ms (batch 1, 2 cores).

glibc adapts by itself: it keeps blocks as large as the largest that was ever freed, up to 32 MiB, and twice
as much at the top of the heap. `reuse` has it do so at once, as any program does that frees one tensor of
that size. `keep` turns giving back off, for this process and for good: memory stays at its peak.

`auto` keeps where reuse is not enough: in training, and where a graph's tensors exceed those limits. At batch
8 they do: densenet121 faulted in 38,000 pages a call and took 322 ms instead of 276.

Source: mallopt(3), M_MMAP_THRESHOLD ("dynamic mmap threshold"), M_TRIM_THRESHOLD, M_MMAP_MAX.
"""

from __future__ import annotations

import ctypes
import functools
import sys

import torch
from torch.fx import Graph

from fxpasses.graph.liveness import LiveBytes
from fxpasses.options import Memory

_LARGEST_REUSED = 32 * 2**20 - 2**16  # the block, with its header and alignment, must not exceed 32 MiB
_REUSED_AT_ONCE = 2 * 32 * 2**20  # what glibc keeps at the top of the heap
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER = 2**31 - 1


def exceeds_reuse(graph: Graph) -> bool:
    """Whether the graph's tensors are larger, or more at once, than what glibc keeps by itself."""
    live = LiveBytes.of(graph)
    return live.largest > _LARGEST_REUSED or live.peak > _REUSED_AT_ONCE


def arrange_memory(choice: Memory, *, much: bool = False) -> bool:
    """Has freed memory of CPU tensors used again, as chosen, for the whole process.

    A training step frees what it saved for the backward pass in one go, far more than glibc keeps by
    itself: mobilenetv2_100, batch 8, faulted in 80,000 pages a step and took 206 ms instead of 127.

    Args:
        choice: ``"reuse"``, ``"keep"`` (only more than ``"reuse"`` is ever added), ``"auto"``, or
            ``"system"`` to leave everything as it is.
        much: whether more is freed at once than glibc keeps by itself; decides for ``"auto"``.

    Returns:
        Whether it took effect; never where the C library is not glibc.
    """
    if choice == "system" or not _is_glibc():
        return False
    _reuse()
    keeps = choice == "keep" or (choice == "auto" and much)
    return _keep() if keeps else True


@functools.cache
def _reuse() -> None:
    # Freed at once, which raises the thresholds; never touched, so it costs no memory.
    torch.empty(_LARGEST_REUSED, dtype=torch.uint8, device="cpu")


@functools.cache
def _keep() -> bool:
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


@functools.cache
def _is_glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
