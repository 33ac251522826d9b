"""Building our kernels: C++ by topic, put together as one text and compiled for one vector length.

    cpp/interface.cpp, with each #include "topic.h" in its place once  ->  one text  ->  one library

A library is found in the package, where the wheel was built with a compiler at hand (`wheel`), else in the
user's cache, where it is compiled when it is first needed. A name says what a library was made of, so a
change of any file, flag or compiler gives another. This module imports nothing of torch, nor of the package:
the wheel is built where neither is.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

_CPP = Path(__file__).parent / "cpp"
_INCLUDE = re.compile(r'#include "(.+)"')

KERNELS = "interface.cpp"
"""The file of the kernels, which knows nothing of torch."""

OPERATOR = "operator.cpp"
"""The file that makes operators of them."""

PREBUILT = Path(__file__).parent / "prebuilt"
"""Where the package holds libraries that were compiled when it was built."""

_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp"),
    # Sums are rounded as they are written: fma is asked for where it is meant.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
VECTOR_FLAGS = {
    "AVX2": ("-mavx2", "-mfma", "-mno-avx512f"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
}
"""What compiles the kernels for the vectors that torch and inductor use (`ATEN_CPU_CAPABILITY`)."""


def source(main: str) -> str:
    """The C++ of a file with all that it includes; the compiler's messages name the files that it is from."""
    return "\n".join(_lines(main, set())) + "\n"


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


def prebuilt(vectors: str) -> Path:
    """Where the package has a library, if it has one.

    Args:
        vectors: a key of `VECTOR_FLAGS`.
    """
    return PREBUILT / _name(vectors)


def cached(vectors: str, folder: Path, compiler: str, flags: Sequence[str] = ()) -> Path:
    """Where a library lies in a cache once it was compiled.

    Args:
        vectors: a key of `VECTOR_FLAGS`.
        folder: of the cache.
        compiler: the command.
        flags: further arguments of the compiler.

    Raises:
        OSError, subprocess.SubprocessError: there is no such compiler.
    """
    told = subprocess.run([compiler, "--version"], capture_output=True, check=True, text=True).stdout
    return folder / _name(vectors, compiler, told, *flags)


def _name(vectors: str, *compiler: str) -> str:
    parts = (source(KERNELS), *_FLAGS, *VECTOR_FLAGS[vectors], *compiler)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return f"kernels-{vectors.lower()}-{digest}.so"


def compile_kernels(vectors: str, library: Path, compiler: str, flags: Sequence[str] = ()) -> None:
    """Compiles the kernels. The library appears whole or not at all, whoever else may be at it.

    Args:
        vectors: a key of `VECTOR_FLAGS`.
        library: the file to make.
        compiler: the command.
        flags: further arguments of the compiler.

    Raises:
        OSError: the file cannot be written, or there is no such compiler.
        subprocess.SubprocessError: the kernels do not compile.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    partial = library.with_name(f"{library.name}.{os.getpid()}.partial")
    every = (*_FLAGS, *VECTOR_FLAGS[vectors], *flags)
    command: Sequence[str] = [compiler, *every, "-x", "c++", "-", "-o", str(partial)]
    try:
        subprocess.run(command, input=source(KERNELS), capture_output=True, check=True, text=True)
        partial.replace(library)
    finally:
        partial.unlink(missing_ok=True)
