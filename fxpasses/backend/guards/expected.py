"""What compiled code expects of a tree of modules, read off Dynamo's guards: one condition for many.

    L['self']._modules['bn1'].training == True      →   Expected(type ResNet)
    L['self']._modules['bn1']._buffers['mean'] ...        "_modules": Expected(type dict)
                                                            "bn1": Expected(type BatchNorm2d)
                                                              "training": True, "_buffers": ...

Only what is found by looking names up in dictionaries is taken, and only what stays as it is as long as its
name stands for the same object: modules and their types, numbers, texts, tuples of those, what a dictionary
holds and lacks, and tensors, whose metadata is compared. All other guards stay Dynamo's.
"""

from __future__ import annotations

import ast
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch

from fxpasses.torch_internals.guards import Guard, kind_of

_STEP = re.compile(r"\.([A-Za-z_]\w*)|\[('[^'\\]*')\]")
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)
_OF_VALUES = ("CONSTANT_MATCH", "EQUALS_MATCH", "BOOL_MATCH", "NONE_MATCH", "SEQUENCE_LENGTH")
_DICTIONARIES = (dict, OrderedDict)

Ask = Callable[[Guard, torch.Tensor], "bool | None"]
"""Whether a tensor's guard also asks that no other is the same object; None if that cannot be told."""


class Found(NamedTuple):
    """A tensor in a tree of modules.

    Attributes:
        tensor: it.
        is_alone: whether it is to be another object than all others.
    """

    tensor: torch.Tensor
    is_alone: bool


class DiffersError(Exception):
    """A tree of modules is not what is expected; the message says where."""


@dataclass
class Expected:
    """What is expected of a module or of a dictionary.

    Attributes:
        type: it is exactly of that type.
        children: of the modules and dictionaries in it, by the names of a module's attributes or by keys.
        values: of constants in it.
        tensors: of tensors in it, whether each is to be another object than all others.
        absent: names that are not in it.
        keys: all of a dictionary's, in order; None where it may have others.
    """

    type: type
    children: dict[str, Expected] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, bool] = field(default_factory=dict)
    absent: dict[str, None] = field(default_factory=dict)
    keys: tuple[str, ...] | None = None

    def visit(self, found: Any, where: str, visit: Callable[[Any, dict[str, Any]], None]) -> list[Found]:
        """Compares a module or dictionary and all that is in it.

        Args:
            found: what is there.
            where: its name, for messages.
            visit: called with each module (None for a plain dictionary) and its dictionary, those that hold
                others first.

        Returns:
            The tensors, which are still to be compared.

        Raises:
            DiffersError: it is not as expected.
        """
        if type(found) is not self.type:
            raise DiffersError(f"{where} is a {type(found).__name__}, and was a {self.type.__name__}")
        is_module = isinstance(found, torch.nn.Module)
        names = vars(found) if is_module else cast(dict[str, Any], found)
        visit(found if is_module else None, names)
        if self.keys is not None and tuple(names) != self.keys:
            raise DiffersError(f"{where} holds {list(names)}, and held {list(self.keys)}")
        if extra := names.keys() & self.absent:
            raise DiffersError(f"{where} has {sorted(extra)[0]!r}, and had not")
        for name, value in self.values.items():
            if not is_same(_in(names, name, where), value):
                raise DiffersError(f"{where}, {name!r} is {names[name]!r}, and was {value!r}")
        tensors = [Found(_tensor_in(names, name, where), alone) for name, alone in self.tensors.items()]
        for name, child in self.children.items():
            step = f".{name}" if is_module else f"[{name!r}]"
            tensors += child.visit(_in(names, name, where), where + step, visit)
        return tensors


def _in(names: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in names:
        raise DiffersError(f"{where} has no {name!r} any more")
    return names[name]


def _tensor_in(names: Mapping[str, Any], name: str, where: str) -> torch.Tensor:
    found = _in(names, name, where)
    if not isinstance(found, torch.Tensor):
        raise DiffersError(f"{where}, {name!r} is a {type(found).__name__}, and was a tensor")
    return found


def is_constant(value: object) -> bool:
    """Whether a value never changes and can be compared: a NaN equals nothing."""
    if isinstance(value, tuple) and type(value) in (tuple, torch.Size):
        return all(map(is_constant, value))
    return type(value) in _CONSTANTS and value == value


def is_same(found: Any, expected: Any) -> bool:
    """Whether two constants are of the same type and equal: 1 is not True."""
    if found is expected:
        return True
    if type(found) is not type(expected):
        return False
    if isinstance(expected, tuple):
        return len(found) == len(expected) and all(map(is_same, found, expected))
    return bool(found == expected) and repr(found) == repr(expected)  # 0.0 is not -0.0


def expect(
    root: torch.nn.Module, name: str, guards: Sequence[Guard], ask: Ask
) -> tuple[Expected, list[Guard]]:
    """What guards below a module expect of it, and those of them that it does not stand for.

    Args:
        root: the module.
        name: the expression that gives it, with which each guard's begins.
        guards: Dynamo's.
        ask: see `Ask`.
    """
    expected, left = Expected(type(root)), []
    for guard in guards:
        if not _add(expected, root, guard, _steps(guard.name.removeprefix(name)), ask):
            left.append(guard)
    return expected, left


def _steps(expression: str) -> list[tuple[bool, str]] | None:
    """Attributes (True) and keys (False) that an expression looks up in turn; None for any other."""
    steps, end = [], 0
    for found in _STEP.finditer(expression):
        if found.start() != end:
            return None
        steps.append((True, found[1]) if found[1] else (False, ast.literal_eval(found[2])))
        end = found.end()
    return steps if end == len(expression) else None


def _add(
    expected: Expected, root: torch.nn.Module, guard: Guard, steps: list[tuple[bool, str]] | None, ask: Ask
) -> bool:
    """Adds what a guard expects; False, and nothing is added, if that is not for `Expected`."""
    path = None if steps is None else _walk(root, steps)
    if path is None or steps is None:
        return False
    kind, attribute = kind_of(guard)
    *_, found = path
    is_child = isinstance(found, torch.nn.Module) or type(found) in _DICTIONARIES
    if is_child and not _concerns(kind, found, attribute):
        return False
    if not is_child and kind in _OF_VALUES and not is_constant(found):
        return False
    if not is_child and kind not in (*_OF_VALUES, "TENSOR_MATCH"):
        return False
    is_alone = ask(guard, found) if kind == "TENSOR_MATCH" and isinstance(found, torch.Tensor) else None
    if kind == "TENSOR_MATCH" and is_alone is None:
        return False
    for (_, name), value in zip(steps if is_child else steps[:-1], path[1:], strict=False):
        expected = expected.children.setdefault(name, Expected(type(value)))
    if kind == "TENSOR_MATCH":
        expected.tensors[steps[-1][1]] = bool(is_alone)
    elif not is_child:
        expected.values[steps[-1][1]] = found
    elif kind == "NOT_PRESENT_IN_GENERIC_DICT":
        expected.absent[attribute] = None
    elif kind != "TYPE_MATCH":
        expected.keys = tuple(found)
    return True


def _concerns(kind: str, found: Any, attribute: str | None) -> bool:
    """Whether a guard of a module or dictionary is one that `Expected` stands for."""
    if kind == "NOT_PRESENT_IN_GENERIC_DICT":
        return isinstance(found, torch.nn.Module) and attribute is not None and attribute not in vars(found)
    if kind == "TYPE_MATCH":
        return True
    # An ordered one may be put in another order, of which its version does not tell.
    is_plain = type(found) is dict and all(type(key) is str for key in found)
    return is_plain and kind in ("SEQUENCE_LENGTH", "DICT_KEYS_MATCH")


def _walk(root: torch.nn.Module, steps: Sequence[tuple[bool, str]]) -> list[Any] | None:
    """The objects on a path from a module; None if a step is more than looking a name up in a dictionary."""
    path: list[Any] = [root]
    for is_attribute, name in steps:
        found = path[-1]
        if is_attribute:
            if not isinstance(found, torch.nn.Module) or not _is_plain(type(found), name):
                return None
            found = found.__dict__
        elif type(found) not in _DICTIONARIES:
            return None
        if name not in found:
            return None
        path.append(found[name])
    return path


def _is_plain(of: type, name: str) -> bool:
    """Whether an attribute of a module comes from its `__dict__`, if it is there."""
    looks_up: object = of.__getattribute__
    return looks_up is object.__getattribute__ and not hasattr(type(getattr(of, name, None)), "__set__")
