"""C++ that is compiled when it is first needed, by inductor's cache, and two functions written in it.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch

_SAME_MEMORY = """
#include <cstdint>
#include <cstring>
extern "C" int same_memory(
    const char* const* blocks, const std::int64_t* sizes, std::int64_t count, const char* expected) {
  constexpr std::int64_t AHEAD = 24;  // blocks that are fetched while others are waited for
  for (std::int64_t i = 0; i < count; expected += sizes[i], ++i) {
    if (i + AHEAD < count) __builtin_prefetch(blocks[i + AHEAD]);
    if (std::memcmp(blocks[i], expected, sizes[i]) != 0) return 0;
  }
  return 1;
}
"""


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


@functools.cache
def same_memory_function() -> Callable[..., int] | None:
    """A C function that compares blocks of memory with what they held; None where it cannot be compiled.

    Its arguments: addresses and sizes in bytes of the blocks, how many, and what they held, end to end.
    """
    library = compile_cpp(_SAME_MEMORY)
    if library is None:
        return None
    function = library.same_memory
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return cast("Callable[..., int]", function)


_UNCHANGED = """
#include <Python.h>
#include <c10/core/TensorImpl.h>
#include <cstdint>
extern "C" int unchanged(
    std::int64_t offset, PyObject* arguments, const std::int64_t* positions, std::int64_t count,
    PyObject* sources, const std::int64_t* versions, const std::int64_t* addresses) {
  try {
    for (std::int64_t i = 0; i < count; ++i) {
      PyObject* given = PyTuple_GET_ITEM(arguments, positions[i]);
      if (given != PyTuple_GET_ITEM(sources, i)) return 0;
      const char* object = reinterpret_cast<const char*>(given);
      const auto* tensor = *reinterpret_cast<c10::TensorImpl* const*>(object + offset);
      if (tensor->version_counter().current_version() != versions[i]) return 0;
      if (reinterpret_cast<std::int64_t>(tensor->data()) != addresses[i]) return 0;
    }
  } catch (...) {  // a tensor without a version or without memory is not what it was
    return 0;
  }
  return 1;
}
"""


def _offset_of_tensor() -> int | None:
    """Where in the object of a Python tensor the address of its C++ tensor lies; None if that cannot be told.

    The header that knows it takes nine seconds to compile.
    """
    found: set[int] = set(range(1000))
    for tensor in (torch.empty(1), torch.nn.Parameter(torch.empty(2, 2)), torch.empty(0, dtype=torch.int64)):
        words = (
            ctypes.c_size_t * (type(tensor).__basicsize__ // ctypes.sizeof(ctypes.c_size_t))
        ).from_address(id(tensor))
        found &= {at for at, word in enumerate(words) if word == tensor._cdata}
    return found.pop() * ctypes.sizeof(ctypes.c_size_t) if len(found) == 1 else None


@functools.cache
def unchanged_function() -> Callable[..., int] | None:
    """A C function that tells whether tensors are what they were; None where it cannot be had.

    Its arguments: the tuple of a call's arguments; the positions there of the tensors and how many they are;
    the tuple of them as they were, their versions and the addresses of their memory. 300 tensors are compared
    in a few microseconds; by torch's Python methods it takes two hundred in a model's call, where none of the
    code is near.
    """
    offset = _offset_of_tensor()
    # The library that has c10's functions is loaded, but not for everyone to see.
    linked = ("-Wl,--no-as-needed", f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10")
    library = compile_cpp(_UNCHANGED, linked) if offset is not None else None
    if library is None:
        return None
    function = ctypes.PyDLL(library._name).unchanged  # holds the GIL, as it reads Python's objects
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [count, ctypes.py_object, pointer, count, ctypes.py_object, pointer, pointer]
    function.restype = ctypes.c_int
    return functools.partial(function, offset)
