"""Whether a tree of modules still is what code was compiled for, told by the versions of its dictionaries.

Each dictionary has a version tag, which CPython changes when something is put in or taken out. A module that
was found to be as expected is recorded: addresses and tags. As long as those are the same, and so is the
metadata of its tensors, so is the module. Otherwise all of it is compared again. Records hold no reference.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import sysconfig
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxpasses.backend.guards.expected import DiffersError, Expected
from fxpasses.torch_internals.comparison import compares_in_cpp, metadata_check
from fxpasses.torch_internals.cpp import compile_cpp
from fxpasses.torch_internals.guards import tensors_check

_log = logging.getLogger(__name__)

_TAG_OFFSET = 24
"""Bytes from the start of a dictionary to its version tag."""
_TABLE_OFFSET = 32
"""Bytes from there to the address of its table of names."""
_DICTIONARY, _TABLE, _HEAD, _LINE = 48, 512, 32, 64
"""Bytes of a dictionary, of a table at most, of an object on each side of its address, and of a line."""


class _Entry(ctypes.Structure):
    _fields_ = (
        ("module", ctypes.c_void_p),
        ("type", ctypes.c_void_p),
        ("dictionary", ctypes.c_void_p),
        ("tag", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class _Record:
    """What a module was found to be like, with the arguments of the compiled comparison."""

    module: weakref.ref[torch.nn.Module]
    arguments: tuple[Any, ...]
    alone: frozenset[int]


class Watch:
    """A check of modules: whether one is as expected.

    watch = Watch(expected, "L['self']", model)
    watch(model)      True, until something of it changes

    Attributes:
        has_alone: whether there are tensors in it that are to be other objects than all others.
    """

    def __init__(
        self, expected: Expected, name: str, root: torch.nn.Module, *, compiles: bool = False
    ) -> None:
        """Args:
            expected: what to compare with.
            name: of the module, for messages.
            root: a module that is as expected, whose tensors others are compared with.
            compiles: whether a faster comparison of tensors is worth seconds of compiling, once a machine.

        Raises:
            DiffersError: it is not.
            RuntimeError: versions do not tell here; `compiled` says it before.
        """
        unchanged = compiled()
        if unchanged is None:
            raise RuntimeError("dictionaries have no version tags that can be read")
        self._unchanged = unchanged
        self._expected, self._name = expected, name
        self._records: dict[int, _Record] = {}
        tensors = expected.visit(root, name, lambda module, names: None)
        self.has_alone = any(found.is_alone for found in tensors)
        self._same_tensors = _check_of(tuple(found.tensor for found in tensors), compiles)
        self._compare(root)

    def __call__(self, root: torch.nn.Module) -> bool:
        """Whether a module is as expected."""
        record = self._records.get(id(root))
        if (
            record is not None
            and record.module() is root
            and self._unchanged(*record.arguments, self._same_tensors) == 1
        ):
            return True
        try:
            self._compare(root)
        except DiffersError as difference:
            self._records.pop(id(root), None)
            _log.info("not the module that was compiled: %s", difference)
            return False
        return True

    def are_others(self, root: torch.nn.Module, *tensors: torch.Tensor) -> bool:
        """Whether tensors are none of those in a module that are to be other objects than all others.

        Args:
            root: a module that was just found to be as expected.
            tensors: other tensors of the call.
        """
        alone = self._records[id(root)].alone
        return not any(id(tensor) in alone for tensor in tensors)

    def _compare(self, root: torch.nn.Module) -> None:
        """Compares all of a module, and records it."""
        entries: list[_Entry] = []

        def visit(module: Any, names: dict[str, Any]) -> None:
            address = None if module is None else id(module)
            entries.append(_Entry(address, id(type(module)), id(names), _tag(names)))

        found = self._expected.visit(root, self._name, visit)
        tensors = [one.tensor for one in found]
        alone = [id(one.tensor) for one in found if one.is_alone]
        if len(set(alone)) < len(alone):
            raise DiffersError(f"two buffers of {self._name} are the same tensor")
        if tensors and not self._same_tensors(*tensors):
            raise DiffersError(f"a parameter or buffer of {self._name} has other metadata")
        self._records[id(root)] = _Record(
            weakref.ref(root, functools.partial(_forget, weakref.ref(self), id(root))),
            _arguments(entries, list(map(id, tensors)), _lines_of(entries)),
            frozenset(alone),
        )


def _check_of(tensors: tuple[torch.Tensor, ...], compiles: bool) -> Callable[..., bool]:
    is_plain = all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
    return metadata_check(tensors) if compiles and is_plain and compares_in_cpp() else tensors_check(tensors)


def _forget(watch: weakref.ref[Watch], address: int, module: object) -> None:
    found = watch()
    if found is not None and (record := found._records.get(address)) and record.module is module:
        del found._records[address]


def _lines_of(entries: Sequence[_Entry]) -> list[int]:
    """The lines of the caches with what is read of modules and dictionaries, here and by compiled code."""
    lines: set[int] = set()

    def add(start: int, size: int) -> None:
        lines.update(range(start // _LINE * _LINE, start + size, _LINE))

    for entry in entries:
        if entry.module:
            add(entry.module - _HEAD, 2 * _HEAD)
        add(entry.dictionary, _DICTIONARY)
        table = ctypes.c_size_t.from_address(entry.dictionary + _TABLE_OFFSET).value
        names = ctypes.cast(entry.dictionary, ctypes.py_object).value
        add(table, min(_TABLE, sys.getsizeof(names)))
    return sorted(lines)


def _arguments(entries: Sequence[_Entry], *addresses: Sequence[int]) -> tuple[Any, ...]:
    """Arrays as the compiled comparison takes them, each with its length."""
    arguments: list[Any] = [(_Entry * len(entries))(*entries), len(entries)]
    for given in addresses:
        arguments += (ctypes.c_void_p * len(given))(*given), len(given)
    return tuple(arguments)


def _tag(names: dict[str, Any]) -> int:
    return ctypes.c_uint64.from_address(id(names) + _TAG_OFFSET).value


@functools.cache
def compiled() -> Callable[..., int] | None:
    """The compiled comparison; None where it does not compile, or versions do not tell of changes."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return None
    library = compile_cpp((Path(__file__).parent / "unchanged.cpp").read_text(encoding="utf-8"))
    if library is None:
        return None
    # Unlike CDLL, it keeps the GIL.
    unchanged = ctypes.PyDLL(library._name).fxpasses_unchanged
    unchanged.restype = ctypes.c_int
    unchanged.argtypes = (
        *(ctypes.POINTER(_Entry), ctypes.c_int64),
        *(ctypes.POINTER(ctypes.c_void_p), ctypes.c_int64) * 2,
        ctypes.py_object,
    )
    return unchanged if _tells(unchanged) else None


def _tells(unchanged: Callable[..., int]) -> bool:
    """Whether each way to change a module changes its version, and reading it does not, in this CPython."""

    def is_unchanged(module: torch.nn.Module, entry: _Entry) -> bool:
        return unchanged(*_arguments([entry], [], []), None) == 1

    def entry_of(module: Any, names: dict[str, Any]) -> _Entry:
        return _Entry(None if module is None else id(module), id(type(module)), id(names), _tag(names))

    for change in _CHANGES:
        module: Any = _Probe()
        plain: dict[str, Any] = {"a": 1, "b": 2}
        module.plain = plain
        for _ in range(64):  # until the interpreter has specialised
            for of, names in ((module, module.__dict__), (None, plain)):
                entry = entry_of(of, names)
                _ = module.plain, plain["a"], getattr(module, "absent", None)
                if not is_unchanged(module, entry):
                    return False
            before = entry_of(module, module.__dict__), entry_of(None, plain)
            change(module, plain)
            if all(is_unchanged(module, entry) for entry in before):
                return False
    return True


class _Probe(torch.nn.Module):
    """What `_tells` changes."""


class _OtherProbe(_Probe):
    """What it is changed into."""


_count = iter(range(10**9))


def _set(module: Any, plain: dict[str, Any]) -> None:
    module.a = next(_count)


def _set_past_the_module(module: Any, plain: dict[str, Any]) -> None:
    object.__setattr__(module, "a", next(_count))


def _set_in_place(module: Any, plain: dict[str, Any]) -> None:
    module.__dict__["a"] = next(_count)


def _toggle_training(module: Any, plain: dict[str, Any]) -> None:
    module.train(not module.training)


def _delete(module: Any, plain: dict[str, Any]) -> None:
    module.b = next(_count)
    del module.b


def _exchange_dictionary(module: Any, plain: dict[str, Any]) -> None:
    module.__dict__ = dict(module.__dict__)


def _exchange_type(module: Any, plain: dict[str, Any]) -> None:
    module.__class__ = _Probe if type(module) is _OtherProbe else _OtherProbe


def _set_item(module: Any, plain: dict[str, Any]) -> None:
    plain["a"] = next(_count)


def _add_item(module: Any, plain: dict[str, Any]) -> None:
    plain[str(next(_count))] = None


def _pop_item(module: Any, plain: dict[str, Any]) -> None:
    plain[str(next(_count))] = None
    plain.popitem()


def _update_items(module: Any, plain: dict[str, Any]) -> None:
    plain.update(a=next(_count))


def _clear(module: Any, plain: dict[str, Any]) -> None:
    plain["a"] = 1
    plain.clear()
    plain["a"] = 2


_CHANGES: Sequence[Callable[[Any, dict[str, Any]], None]] = (
    *(_set, _set_past_the_module, _set_in_place, _toggle_training, _delete),
    *(_exchange_dictionary, _exchange_type),
    *(_set_item, _add_item, _pop_item, _update_items, _clear),
)
