"""Operands that no cache holds: several sets of them, taken in turn.

A measurement that repeats one call finds everything in a cache. An operator of a model does not: the rest of
the network ran since its weights were read. So each call takes the next of

    1 + far / (bytes of the operands and the result of a call)

sets of operands, where `far` is twice the device's largest cache. A result stays alive until its set comes
again, so that the next one lies elsewhere. `fxpasses.kernels.choice` measures likewise.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_LEAST = 2**24  # half of what counts as far where the system does not say how large its caches are
_MOST_SETS = 2048
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def far(device: torch.device) -> int:
    """The bytes of other tensors after which one is in none of the device's caches any more."""
    if device.type == "cuda":
        return 2 * int(torch.cuda.get_device_properties(device).L2_cache_size)
    return 2 * max([_LEAST, *map(_bytes, _CACHES.glob("index*/size"))])


def free_memory(device: torch.device) -> int:
    """The bytes of the device's memory that are free; of a CPU's where the system does not say, many."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 2**40


def sets_needed(num_bytes: int, device: torch.device) -> int:
    """How many sets of operands it takes, so that each is in no cache when it comes again.

    There are never more than 2,048, which are too few for calls on some kilobytes: making more takes time.

    Args:
        num_bytes: that one call reads and writes.
        device: where it runs.
    """
    return min(_MOST_SETS, 1 + far(device) // max(1, num_bytes))


def in_turn(kernels: Mapping[str, Sequence[Callable[[], object]]]) -> dict[str, Callable[[], object]]:
    """One callable for each name, which calls the name's next kernel.

    The names share one turn: after a call on one set of operands, whichever name's it was, calls on all other
    sets follow before that set's next one.

    Args:
        kernels: by name, one for each set of operands, in the order of the sets.
    """
    count = max(map(len, kernels.values()), default=1)
    if count == 1:
        return {name: of_name[0] for name, of_name in kernels.items()}
    turn, results = itertools.cycle(range(count)), deque[object](maxlen=count)

    def next_of(of_name: Sequence[Callable[[], object]]) -> Callable[[], None]:
        return lambda: results.append(of_name[next(turn)]())

    return {name: next_of(of_name) for name, of_name in kernels.items()}


def evict(device: torch.device) -> None:
    """Writes so much memory that nothing else is left in the device's caches."""
    torch.empty(far(device), dtype=torch.uint8, device=device).zero_()


def _bytes(path: Path) -> int:
    """The size of a cache, as the kernel writes it: ``32768K``."""
    found = re.fullmatch(r"(\d+)([KMG]?)", path.read_text(encoding="ascii").strip())
    return int(found[1]) * _UNITS.get(found[2], 1) if found else 0
