"""The library of our kernels: C++ by topic, put together and compiled when it is first needed.

    cpp/operators.cpp, with each #include "topic.h" in its place once  ->  one text  ->  one library

Inductor's cache of libraries has the text and the flags as its key, so that a change of any file compiles
anew. Loading the library makes the operators' implementations known to torch; `_define` declares them, with
what they give for fake tensors.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fxpasses.torch_internals.cpp import compile_cpp

_CPP = Path(__file__).parent / "cpp"
_MAIN = "operators.cpp"
_INCLUDE = re.compile(r'#include "(.+)"')

_VECTOR_FLAGS = {
    # The last one since inductor compiles for the CPU at hand, which may have more than is to be used.
    "AVX2": ("-mavx2", "-mfma", "-mno-avx512f"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
}
"""What compiles the kernels for the vectors that torch and inductor use (`ATEN_CPU_CAPABILITY`)."""

_CONVOLUTION_SCHEMA = (
    "(Tensor image, Tensor filters, Tensor? summand, int[] sizes, int kernel, int activation, float low,"
    " float high) -> Tensor"
)
_SEQUENCE_SCHEMA = "(Tensor[] inputs, Tensor[] constants, Tensor program, int[] shapes) -> Tensor[]"


@functools.cache
def vector_length() -> int:
    """How many floats a vector of the compiled kernels has; 0 where there are none (`missing`).

    Compiles them when it is called for the first time, and makes the operators known to torch.
    """
    flags = _VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability())
    if flags is None:
        return 0
    _define()
    library = compile_cpp(source(), flags)
    return int(library.vector_length()) if library is not None else 0


def missing() -> str:
    """Why there are no kernels; empty where there are."""
    if vector_length():
        return ""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in _VECTOR_FLAGS:
        return "they do not compile here"
    return f"they are for {' and '.join(_VECTOR_FLAGS)}, and torch runs with the vectors of {capability}"


def source() -> str:
    """The C++ of the library in one text; messages of the compiler name the files that it comes from."""
    return "\n".join(_lines(_MAIN, set())) + "\n"


def _lines(name: str, included: set[str]) -> Iterator[str]:
    included.add(name)
    yield f'#line 1 "{name}"'
    for number, line in enumerate((_CPP / name).read_text(encoding="utf-8").splitlines(), 1):
        include = _INCLUDE.fullmatch(line)
        if include is None:
            yield line if line != "#pragma once" else ""  # which is about files
        elif include[1] in included:
            yield ""
        else:
            yield from _lines(include[1], included)
            yield f'#line {number + 1} "{name}"'


@functools.cache
def _define() -> None:
    torch.library.define(
        "fxpasses::convolution", _CONVOLUTION_SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,)
    )
    torch.library.register_fake("fxpasses::convolution", _fake_convolution)
    torch.library.define("fxpasses::sequence", _SEQUENCE_SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))
    torch.library.register_fake("fxpasses::sequence", _fake_sequence)


def _fake_convolution(
    image: torch.Tensor,
    filters: torch.Tensor,
    summand: torch.Tensor | None,
    sizes: Sequence[int],
    kernel: int,
    activation: int,
    low: float,
    high: float,
) -> torch.Tensor:
    count, _, *space = image.shape
    filters_, _, *given = sizes
    if not space:
        return image.new_empty((count, filters_))
    extents = [
        (size + 2 * given[4 + at] - given[6 + at] * (given[at] - 1) - 1) // given[2 + at] + 1
        for at, size in enumerate(space)
    ]
    return torch.empty(
        (count, filters_, *extents),
        dtype=image.dtype,
        device=image.device,
        memory_format=torch.channels_last,
    )


def _fake_sequence(
    inputs: Sequence[torch.Tensor],
    constants: Sequence[torch.Tensor],
    program: torch.Tensor,
    shapes: Sequence[int],
) -> list[torch.Tensor]:
    del inputs, program
    like = constants[0]
    made = []
    for n, c, h, w in zip(*(shapes[at::4] for at in range(4)), strict=True):
        if h < 0:
            made.append(like.new_empty((n, c)))
        else:
            made.append(like.new_empty((n, h, w, c)).permute(0, 3, 1, 2))
    return made
