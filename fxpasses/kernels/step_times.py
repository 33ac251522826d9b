"""What each step of `fxpasses::sequence` takes, by kernels that were compiled to note it.

    with noted_steps() as steps:
        compiled(images)
    steps     [StepTime, ...]     every step of every call, in their order

Only such kernels read the clock (`cpp/step_times.h`). The convolutions of a chain are made in turns of a few
rows; of each there is the time that all threads together spent in it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fxpasses.kernels import library
from fxpasses.kernels.kernel import Kernel
from fxpasses.kernels.sequence import CHAIN, GATHER, MAX, MEAN, PRODUCT, SUM

_FLAG = "-DFXPASSES_STEP_TIMES"
_STAGES = 16
_ROOM = 2**17
_HEAD, _PART, _SOURCE, _WINDOW, _SIZES, _CONVOLUTION = 4, 3, 6, 8, 10, 16
"""Words of a step, of each image that it reads, of how it reads, of a window, of sizes, of a convolution."""

_BEHIND = {PRODUCT: _SOURCE, GATHER: _SOURCE, CHAIN: _SOURCE, MEAN: 0, SUM: 0, MAX: _WINDOW}


class _Step(ctypes.Structure):
    _fields_ = (
        ("words", ctypes.POINTER(ctypes.c_int64)),
        ("image_sizes", ctypes.c_int64 * 4),
        ("seconds", ctypes.c_double),
        ("stages", ctypes.c_double * _STAGES),
    )


@dataclass(frozen=True)
class StepTime:
    """One step that was done.

    Attributes:
        kind: of `fxpasses.kernels.sequence`.
        image: batch, height, width and channels of what it reads.
        sizes: of each of its convolutions the operator's argument `sizes`.
        kernels: which computes each of them.
        is_first: whether a call begins with it.
        seconds: that it took.
        stages: of a chain, the seconds that all threads together spent in each convolution; else empty.
    """

    kind: int
    image: tuple[int, int, int, int]
    sizes: tuple[tuple[int, ...], ...]
    kernels: tuple[Kernel, ...]
    is_first: bool
    seconds: float
    stages: tuple[float, ...] = ()


@dataclass(frozen=True)
class StepRead:
    """What the words of a step say; `StepTime` has the rest, and `length` is how many words they are."""

    kind: int
    sizes: tuple[tuple[int, ...], ...]
    kernels: tuple[Kernel, ...]
    length: int


def read_step(words: Sequence[int]) -> StepRead:
    """What words that begin with those of `Step.words` say.

    Raises:
        ValueError: there is no such kind of step or of kernel.
    """
    kind, images = words[0], words[2]
    if kind not in _BEHIND:
        raise ValueError(f"no step {kind}")
    end = _HEAD + _PART * images + _BEHIND[kind]
    count = 0
    if kind == CHAIN:
        count, end = words[end], end + 1
    elif kind == PRODUCT:
        count = 1
    starts = range(end, end + count * _CONVOLUTION, _CONVOLUTION)
    sizes = tuple(tuple(words[start + word] for word in range(_SIZES)) for start in starts)
    kernels = tuple(Kernel.from_code(words[start + _SIZES]) for start in starts)
    return StepRead(kind, sizes, kernels, end + count * _CONVOLUTION)


@contextlib.contextmanager
def noted_steps() -> Iterator[list[StepTime]]:
    """The block in which calls note what their steps take; the list is filled when it ends.

    At most 131072 steps are noted. One block may be active at a time, and the programs of its calls must live
    until it ends.

    Raises:
        RuntimeError: there are no kernels here, or they do not compile.
    """
    found: list[StepTime] = []
    with library.kernels_with(_FLAG) as kernels:
        note = kernels.fxpasses_note_steps
        note.restype, note.argtypes = ctypes.c_int64, (ctypes.POINTER(_Step), ctypes.c_int64)
        room = (_Step * _ROOM)()
        note(room, _ROOM)
        try:
            yield found
        finally:
            end = 0
            for step in room[: note(None, 0)]:
                read = read_step(step.words)
                start = ctypes.cast(step.words, ctypes.c_void_p).value or 0
                found.append(_timed(step, read, start != end))
                end = start + read.length * ctypes.sizeof(ctypes.c_int64)


def _timed(step: _Step, read: StepRead, is_first: bool) -> StepTime:
    stages = tuple(step.stages[: len(read.sizes)]) if read.kind == CHAIN else ()
    n, h, w, c = step.image_sizes
    return StepTime(read.kind, (n, h, w, c), read.sizes, read.kernels, is_first, step.seconds, stages)
