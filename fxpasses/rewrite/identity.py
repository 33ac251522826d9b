"""Identities: a key that changes when a rule may behave differently, and only then.

Caches of compiled graphs need one for every custom pass (`CustomGraphPass.uuid`), and a key that covers a
class's source alone serves stale artifacts. This one covers what a rule runs: the code of its methods and of
every function of the same package that they name, constants and defaults, values in closures, the fields of
the instance, and the options. Line numbers, comments and docstrings are no part of it. The code of fxpasses
itself counts as one, by the contents of its files. An object of a type that is not Python's own is known by
what pickle would keep of it; where that is nothing, each key is another one, so that nothing is found by it.
"""

from __future__ import annotations

import copyreg
import enum
import functools
import hashlib
import os
import types
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from fxpasses.torch_internals.operators import OpOverload, OpOverloadPacket


def fingerprint(*parts: object) -> str:
    """A key of values, functions, classes and instances; equal in every process."""
    digest = hashlib.sha256(_library().encode())
    try:
        texts = list(_Texts().all_of(parts))
    except RecursionError:  # something of a library's that leads to half of it
        texts = [uuid.uuid4().hex]
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()


@functools.cache
def _library() -> str:
    """A key of the source of fxpasses."""
    digest = hashlib.sha256()
    for path in sorted(_ROOT.rglob("*.py")):
        digest.update(str(path.relative_to(_ROOT)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


_ROOT = Path(__file__).resolve().parent.parent


_NAMED = (
    types.ModuleType, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType, types.MethodWrapperType,
    types.ClassMethodDescriptorType,
)  # fmt: skip
"""What is known by its name."""

_PLAIN = (
    str, bytes, int, float, complex, bool, type(None), type(...), torch.dtype, torch.device,
    torch.memory_format, torch.layout,
)  # fmt: skip


class _Texts:
    """The texts that identify a value; a value that is reached twice is named by when it was first."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, object]] = {}
        self._pending: list[object] = []

    def all_of(self, parts: tuple[object, ...]) -> Iterator[str]:
        """The texts of values, and of all the code that they lead to."""
        yield from self.of(parts)
        while self._pending:
            yield from self.of(self._pending.pop())

    def of(self, given: object) -> Iterator[str]:
        if isinstance(given, _PLAIN):
            yield f"{type(given).__name__}:{given!r}"
            return
        if id(given) in self._seen:
            yield f"seen:{self._seen[id(given)][0]}"
            return
        # The value is kept, since its id is the key.
        self._seen[id(given)] = (len(self._seen), given)
        yield from self._structured(given)

    def _structured(self, given: Any) -> Iterator[str]:
        if isinstance(given, (set, frozenset)):
            yield from sorted(fingerprint(member) for member in given)
        elif isinstance(given, (list, tuple)):
            yield f"{type(given).__name__}:{len(given)}"
            yield from self._all(given)
        elif isinstance(given, Mapping):
            yield f"mapping:{len(given)}"
            yield from self._all(part for item in sorted(given.items(), key=_order) for part in item)
        elif isinstance(given, torch.Tensor):
            yield from self._tensor(given)
        elif isinstance(given, enum.Enum):
            yield str(given)
        else:
            yield from self._code_or_object(given)

    def _code_or_object(self, given: Any) -> Iterator[str]:
        if isinstance(given, types.FunctionType):
            yield from self._function(given)
        elif isinstance(given, types.MethodType):
            yield from self._all((given.__func__, given.__self__))
        elif isinstance(given, types.CodeType):
            yield from self._code(given)
        elif isinstance(given, functools.partial):
            yield from self._all((given.func, given.args, given.keywords))
        elif isinstance(given, (property, staticmethod, classmethod, functools.cached_property)):
            names = ("fget", "func", "__func__")
            yield from self._all(getattr(given, name, None) for name in names)
        elif isinstance(given, type):
            yield from self._class(given)
        elif isinstance(given, (OpOverload, OpOverloadPacket)):
            yield f"operator:{given}"
        elif hasattr(given, "__wrapped__"):  # a function behind a cache
            yield from self._all((type(given), given.__wrapped__))
        elif isinstance(given, os.PathLike):
            yield f"path:{os.fspath(given)!r}"
        elif isinstance(given, _NAMED):
            yield f"{getattr(given, '__module__', '')}.{getattr(given, '__qualname__', given.__name__)}"
        elif hasattr(given, "__dict__") or is_dataclass(given):
            yield from self._instance(given)
        else:
            yield from self._reduced(given)

    def _reduced(self, given: object) -> Iterator[str]:
        """What pickle would keep: of arrays, compiled expressions, objects with slots."""
        yield f"{type(given).__module__}.{type(given).__qualname__}"
        reduce = copyreg.dispatch_table.get(type(given))
        try:
            reduced = reduce(given) if reduce is not None else given.__reduce_ex__(2)
        except TypeError:
            reduced = uuid.uuid4().hex
        if isinstance(reduced, str):
            yield reduced
            return
        # The first is the function that makes it again, whose code is a library's.
        yield getattr(reduced[0], "__qualname__", "")
        yield from self._all(list(part) if isinstance(part, Iterator) else part for part in reduced[1:])

    def _all(self, parts: Iterable[object]) -> Iterator[str]:
        for part in parts:
            yield from self.of(part)

    def _tensor(self, given: torch.Tensor) -> Iterator[str]:
        yield f"tensor:{tuple(given.shape)}:{given.dtype}:{given.device}"
        if given.device.type != "meta" and type(given) in (torch.Tensor, torch.nn.Parameter):
            values = given.detach().cpu().contiguous().view(-1).view(torch.uint8)
            yield hashlib.sha256(values.numpy().tobytes()).hexdigest()

    def _function(self, given: types.FunctionType) -> Iterator[str]:
        yield "function"
        yield from self._all((given.__code__, given.__defaults__, given.__kwdefaults__))
        for cell in given.__closure__ or ():
            try:
                yield from self.of(cell.cell_contents)
            except ValueError:  # a cell that is not filled yet
                yield "empty"
        package = (given.__module__ or "").partition(".")[0]
        for name in sorted(_names(given.__code__)):
            found = given.__globals__.get(name)
            yield name
            if isinstance(found, _PLAIN):
                yield from self.of(found)
            elif _belongs(found, package):
                # Code may lead far: later, not deeper.
                self._pending.append(found)

    def _code(self, given: types.CodeType) -> Iterator[str]:
        yield given.co_code.hex()
        yield from map(str, (given.co_names, given.co_varnames, given.co_freevars, given.co_argcount))
        documentation = given.co_consts[0] if given.co_consts else None
        for index, constant in enumerate(given.co_consts):
            if index or not isinstance(documentation, str):
                yield from self.of(constant)

    def _class(self, given: type) -> Iterator[str]:
        yield f"{given.__module__}.{given.__qualname__}"
        package = given.__module__.partition(".")[0]
        for base in given.__mro__:
            if package == "fxpasses" or base.__module__.partition(".")[0] != package:
                continue
            for name, member in sorted(vars(base).items()):
                if name not in _NOT_BEHAVIOUR:
                    yield name
                    yield from self.of(member)

    def _instance(self, given: Any) -> Iterator[str]:
        yield from self.of(type(given))
        held = (
            {field.name: getattr(given, field.name) for field in fields(given)} if is_dataclass(given) else {}
        )
        held = held or vars(given)
        yield from self.of({name: member for name, member in held.items() if not name.startswith("_")})


_NOT_BEHAVIOUR = frozenset(
    {
        "__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__abstractmethods__",
        "_abc_impl", "__firstlineno__", "__static_attributes__", "__parameters__", "__orig_bases__",
        "__dataclass_fields__",
    }
)  # fmt: skip


def _names(code: types.CodeType) -> set[str]:
    """Global names that a function may refer to, those of its inner functions included."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _belongs(found: object, package: str) -> bool:
    """Whether a global is the author's own code or data, not a library's."""
    if isinstance(found, (types.FunctionType, type)):
        return package != "fxpasses" and (found.__module__ or "").partition(".")[0] == package
    return isinstance(found, (list, tuple, dict, set, frozenset))


def _order(item: tuple[object, object]) -> str:
    return repr(item[0])
