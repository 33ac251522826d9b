"""C++ that is compiled when it is first needed, by inductor's cache.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import cast


def compile_cpp(source: str, flags: Sequence[str] = ()) -> ctypes.CDLL | None:
    """The library of a C++ source, from inductor's cache where it is there; None if it does not compile.

    Args:
        source: the text.
        flags: further arguments of the compiler, which are part of the cache's key.
    """
    from torch._inductor import config
    from torch._inductor.codecache import CppCodeCache

    try:
        # A library serves the whole process, and `cpp.simdlen` one compilation, whose flags would come last.
        with config.patch({"cpp.simdlen": None}):
            return cast(ctypes.CDLL, CppCodeCache.load(source, extra_flags=tuple(flags)))
    except Exception:  # a missing compiler is no error here: the caller has a slower way
        return None


def cpp_compiler() -> str:
    """The command of the compiler that inductor uses.

    Raises:
        RuntimeError: there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    return get_cpp_compiler()
