"""Whether tensors are what they were, told by a function of C++: two hundred in some ten microseconds.

By torch's Python methods it takes two hundred microseconds within a model's call, where none of their code is
near.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from fxpasses.torch_internals.cpp import compile_cpp

_SOURCE = """
#include <Python.h>
#include <c10/core/TensorImpl.h>
#include <cstdint>
#include <cstring>
#include <vector>

using Numbers = std::vector<std::int64_t>;

// A digest is kept, since a copy would be as much again to read. Its lanes of 32 bits are multiplied by an
// odd number before the next word is added: another word alone makes another digest; several may cancel out
// with a chance of 2^-32 in each lane that they are in.
typedef std::uint32_t Lanes __attribute__((vector_size(64)));

struct Digest {
  constexpr static std::size_t LINE = sizeof(Lanes), VECTORS = 4, ROUND = VECTORS * LINE;
  Lanes lanes[VECTORS] = {};

  void line(std::size_t vector, const char* bytes, std::size_t size) {
    Lanes words = {};
    std::memcpy(&words, bytes, size);
    lanes[vector] = lanes[vector] * 0x9E3779B1u + words;
  }

  void add(const char* bytes, std::size_t size) {
    for (; size >= ROUND; size -= ROUND, bytes += ROUND)
      for (std::size_t i = 0; i < VECTORS; ++i) line(i, bytes + i * LINE, LINE);
    for (std::size_t i = 0; size >= LINE; size -= LINE, bytes += LINE) line(i++, bytes, LINE);
    if (size) line(VECTORS - 1, bytes, size);
  }

  bool operator==(const Digest& other) const { return !std::memcmp(lanes, other.lanes, sizeof lanes); }
};

struct Blocks {
  constexpr static std::size_t AHEAD = 24;  // blocks that are fetched while others are waited for
  std::vector<const char*> starts;
  Numbers sizes;
  Digest before;

  Digest read() const {
    Digest now;
    for (std::size_t i = 0; i < starts.size(); ++i) {
      if (i + AHEAD < starts.size()) __builtin_prefetch(starts[i + AHEAD]);
      now.add(starts[i], sizes[i]);
    }
    return now;
  }
};

static const c10::TensorImpl* in_object(PyObject* given, std::int64_t offset) {
  return *reinterpret_cast<const c10::TensorImpl* const*>(reinterpret_cast<const char*>(given) + offset);
}

struct Tensors {
  PyObject* sources;  // a tuple
  std::int64_t offset;
  Numbers positions, versions, addresses;
};

// Between calls a network takes the caches: all is asked for at once, before it is looked at in turn.
static void prefetch(const Tensors& tensors) {
  for (std::size_t i = 0; i < tensors.positions.size(); ++i) {
    const auto* tensor = in_object(PyTuple_GET_ITEM(tensors.sources, i), tensors.offset);
    if (tensor->has_storage()) __builtin_prefetch(tensor->unsafe_storage().unsafeGetStorageImpl());
    __builtin_prefetch(*reinterpret_cast<const void* const*>(&tensor->version_counter()));
  }
}

static bool same(const Tensors& tensors, PyObject* arguments) {
  prefetch(tensors);
  for (std::size_t i = 0; i < tensors.positions.size(); ++i) {
    PyObject* given = PyTuple_GET_ITEM(arguments, tensors.positions[i]);
    if (given != PyTuple_GET_ITEM(tensors.sources, i)) return false;
    const auto* tensor = in_object(given, tensors.offset);
    if (tensor->version_counter().current_version() != tensors.versions[i]) return false;
    if (reinterpret_cast<std::int64_t>(tensor->data()) != tensors.addresses[i]) return false;
  }
  return true;
}

template <typename T>
static T* in(PyObject* capsule) { return static_cast<T*>(PyCapsule_GetPointer(capsule, nullptr)); }

extern "C" PyObject* read_blocks(std::int64_t count, const char* const* starts, const std::int64_t* sizes) {
  auto* blocks = new Blocks{{starts, starts + count}, Numbers(sizes, sizes + count)};
  blocks->before = blocks->read();
  return PyCapsule_New(blocks, nullptr, [](PyObject* self) { delete in<Blocks>(self); });
}

struct Held {
  Tensors tensors;
  PyObject* blocks;
  ~Held() {
    Py_DECREF(tensors.sources);
    Py_DECREF(blocks);
  }
};

static PyObject* holds(PyObject* self, PyObject* arguments) {
  const auto* held = in<Held>(self);
  try {
    const auto& blocks = *in<Blocks>(held->blocks);
    return PyBool_FromLong(same(held->tensors, arguments) && blocks.read() == blocks.before);
  } catch (...) {  // a tensor without a version or without memory is not what it was
    return PyBool_FromLong(0);
  }
}

// What code is compiled for of tensors; sizes and strides of all lie in one row.
struct Metadata {
  struct Of {
    const void* type;
    std::uint64_t keys;
    caffe2::TypeMeta dtype;
    c10::Device device;
    bool requires_grad;
    std::int64_t dimensions;
  };
  std::int64_t offset;
  std::vector<Of> of;
  Numbers sizes;

  Metadata(std::int64_t offset, PyObject* tensors) : offset(offset) {
    for (std::int64_t i = 0; i < PyTuple_GET_SIZE(tensors); ++i) {
      PyObject* given = PyTuple_GET_ITEM(tensors, i);
      const auto* tensor = in_object(given, offset);
      of.push_back({Py_TYPE(given), tensor->key_set().raw_repr(), tensor->dtype(), tensor->device(),
                    tensor->requires_grad(), tensor->dim()});
      sizes.insert(sizes.end(), tensor->sizes().begin(), tensor->sizes().end());
      sizes.insert(sizes.end(), tensor->strides().begin(), tensor->strides().end());
    }
  }

  // Between calls a network takes the caches: all is asked for at once, before it is looked at in turn.
  void prefetch(PyObject* tensors) const {
    for (std::size_t i = 0; i < of.size(); ++i) __builtin_prefetch(PyTuple_GET_ITEM(tensors, i));
    for (std::size_t i = 0; i < of.size(); ++i) {
      const auto* start = reinterpret_cast<const char*>(in_object(PyTuple_GET_ITEM(tensors, i), offset));
      for (std::size_t at = 0; at < sizeof(c10::TensorImpl); at += 64) __builtin_prefetch(start + at);
    }
    for (std::size_t i = 0; i < of.size(); ++i)
      __builtin_prefetch(in_object(PyTuple_GET_ITEM(tensors, i), offset)->autograd_meta());
  }

  bool is_of(PyObject* tensors) const {
    if (PyTuple_GET_SIZE(tensors) != static_cast<std::int64_t>(of.size())) return false;
    prefetch(tensors);
    const std::int64_t* expected = sizes.data();
    for (std::size_t i = 0; i < of.size(); ++i) {
      PyObject* given = PyTuple_GET_ITEM(tensors, i);
      const auto& known = of[i];
      if (Py_TYPE(given) != known.type) return false;
      const auto* tensor = in_object(given, offset);
      if (tensor->key_set().raw_repr() != known.keys || tensor->dtype() != known.dtype ||
          tensor->device() != known.device || tensor->requires_grad() != known.requires_grad ||
          tensor->dim() != known.dimensions)
        return false;
      for (const auto& numbers : {tensor->sizes(), tensor->strides()})
        for (const auto number : numbers)
          if (number != *expected++) return false;
    }
    return true;
  }
};

static PyObject* alike(PyObject* self, PyObject* tensors) {
  try {
    return PyBool_FromLong(in<Metadata>(self)->is_of(tensors));
  } catch (...) {  // a tensor without sizes is not what it was
    return PyBool_FromLong(0);
  }
}

static PyMethodDef ALIKE = {"alike", alike, METH_VARARGS, "Whether tensors have the metadata of others."};

extern "C" PyObject* metadata_check(std::int64_t offset, PyObject* tensors) {
  PyObject* capsule = PyCapsule_New(new Metadata(offset, tensors), nullptr,
                                    [](PyObject* self) { delete in<Metadata>(self); });
  PyObject* function = PyCFunction_New(&ALIKE, capsule);
  Py_DECREF(capsule);
  return function;
}

static PyMethodDef METHOD = {"holds", holds, METH_O, "Whether a call's arguments are what they were."};

extern "C" PyObject* comparison(
    std::int64_t offset, PyObject* sources, const std::int64_t* positions, const std::int64_t* versions,
    const std::int64_t* addresses, PyObject* blocks) {
  const auto count = PyTuple_GET_SIZE(sources);
  const auto taken = [count](const std::int64_t* numbers) { return Numbers(numbers, numbers + count); };
  Py_INCREF(sources);
  Py_INCREF(blocks);
  auto* held = new Held{{sources, offset, taken(positions), taken(versions), taken(addresses)}, blocks};
  PyObject* capsule = PyCapsule_New(held, nullptr, [](PyObject* self) { delete in<Held>(self); });
  PyObject* function = PyCFunction_New(&METHOD, capsule);
  Py_DECREF(capsule);
  return function;
}
"""


@functools.cache
def _library() -> ctypes.PyDLL | None:
    """The compiled source, whose functions hold the GIL; None where it cannot be compiled."""
    # The library that has c10's functions is loaded, but not for everyone to see.
    linked = ("-Wl,--no-as-needed", f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10")
    compiled = compile_cpp(_SOURCE, linked)
    if compiled is None:
        return None
    library = ctypes.PyDLL(compiled._name)
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.read_blocks.argtypes = [number, pointer, pointer]
    library.comparison.argtypes = [number, ctypes.py_object, pointer, pointer, pointer, ctypes.py_object]
    library.metadata_check.argtypes = [number, ctypes.py_object]
    for function in (library.read_blocks, library.comparison, library.metadata_check):
        function.restype = ctypes.py_object
    return library


@functools.cache
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


def compares_in_cpp() -> bool:
    """Whether `read` and `comparison` can be had: a compiler is there, and torch's objects are as known."""
    return _library() is not None and _offset_of_tensor() is not None


def read(places: Sequence[tuple[int, int]]) -> object:
    """A digest of what blocks of memory hold now.

    Args:
        places: their addresses and their sizes in bytes.
    """
    library = _library()
    assert library is not None
    return library.read_blocks(
        len(places), _numbers(start for start, _ in places), _numbers(size for _, size in places)
    )


def comparison(
    sources: tuple[torch.Tensor, ...],
    positions: Sequence[int],
    versions: Sequence[int],
    addresses: Sequence[int],
    blocks: object,
) -> Callable[[tuple[Any, ...]], bool]:
    """A function of the tuple of a call's arguments: whether the tensors there are what they were.

    Args:
        sources: the tensors. The function keeps them alive.
        positions: where they are among the arguments.
        versions: their version counters.
        addresses: of their memory.
        blocks: what `read` gave of memory that is compared too, and that the caller keeps alive.
    """
    library = _library()
    assert library is not None
    lists = map(_numbers, (positions, versions, addresses))
    function = library.comparison(_offset_of_tensor(), sources, *lists, blocks)
    return cast("Callable[[tuple[Any, ...]], bool]", function)


def metadata_check(tensors: tuple[torch.Tensor, ...]) -> Callable[..., bool]:
    """A function of as many tensors: whether they have the same types and metadata, in this order.

    Dtypes, devices, sizes, strides, dispatch keys, and whether they require a gradient.

    Args:
        tensors: exactly of `torch.Tensor` or `torch.nn.Parameter`. They are not kept alive.
    """
    library = _library()
    assert library is not None
    return cast("Callable[..., bool]", library.metadata_check(_offset_of_tensor(), tensors))


def _numbers(numbers: Iterable[int]) -> ctypes.Array[ctypes.c_int64]:
    listed = tuple(numbers)
    return (ctypes.c_int64 * len(listed))(*listed)
