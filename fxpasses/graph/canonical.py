"""Canonical calls: one reading for every spelling of an operator.

`x + y`, `torch.add(x, y)`, `x.add(y)`, `aten.add.Tensor(x, y)` are all `Call("aten::add", {self: x, other: y,
alpha: 1})`; `nn.SiLU()(x)` and `F.silu(x)` are `Call("aten::silu", {self: x})`. Every argument is there, by
the schema's name, defaults filled in, so that two calls that differ in any argument differ as values. An
operator that nobody described is known by the function that it is, with its arguments as they were given.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from fxpasses.graph import modules
from fxpasses.graph.decline import Decline
from fxpasses.graph.metadata import value
from fxpasses.graph.operands import ModuleTensor
from fxpasses.graph.schema import signature_of_function, signature_of_overload
from fxpasses.torch_internals.operators import (
    FUNCTIONS_IN_C,
    OpOverload,
    OpOverloadPacket,
    aten_packet,
    packet_overloads,
)

COMMUTATIVE = frozenset(
    f"aten::{name}"
    for name in (
        "add", "mul", "maximum", "minimum", "eq", "ne", "logical_and", "logical_or", "logical_xor",
        "bitwise_and", "bitwise_or", "bitwise_xor",
    )
)  # fmt: skip
"""Operators whose `self` and `other` may be exchanged; `add` only where alpha is 1."""

_PYTHON_OPERATORS: dict[Callable[..., Any], str] = {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.truediv: "div",
    operator.floordiv: "floor_divide",
    operator.mod: "remainder",
    operator.matmul: "matmul",
    operator.pow: "pow",
    operator.neg: "neg",
    operator.invert: "bitwise_not",
    operator.and_: "bitwise_and",
    operator.or_: "bitwise_or",
    operator.xor: "bitwise_xor",
    operator.eq: "eq",
    operator.ne: "ne",
    operator.lt: "lt",
    operator.le: "le",
    operator.gt: "gt",
    operator.ge: "ge",
}


@dataclass(frozen=True)
class Call:
    """An operator and all of its arguments.

    Attributes:
        operator: the operator's name, such as ``"aten::add"``, or the function where it has no name.
        arguments: every argument by name (by position where there are no names): nodes, tensors of modules,
            constants, and nests of them.
    """

    operator: object
    arguments: Mapping[str, Any]


def operator_of(node: Node) -> object:
    """The operator that a node calls, without a look at its arguments; None for a node that calls nothing."""
    if node.op == "call_function":
        return _operator_of_function(node.target)
    if node.op == "call_method":
        return _operator_of_method(str(node.target))
    if node.op == "call_module":
        expanded = _expanded(modules.module_of(node))
        return None if expanded is None else operator_of(expanded)
    return None


def read_call(node: Node) -> Call | Decline:
    """The canonical call of a node that calls something."""
    if node.op == "call_module":
        return _read_module(node)
    name = operator_of(node)
    if name == "aten::sub" and node.args and not _is_tensor(node.args[0]):
        # 1 - x is written as an operator of its own by every tracer but symbolic_trace. Core ATen has
        # rsub(x, 1, alpha=2) as sub(1, x, alpha=2).
        given = {**dict(zip(("self", "other", "alpha"), node.args, strict=False)), **node.kwargs}
        return Call(
            "aten::rsub",
            {"self": given["other"], "other": given["self"], "alpha": given.get("alpha", 1)},
        )
    args = node.args
    if name in COMMUTATIVE and len(args) == 2 and not _is_tensor(args[0]) and not node.kwargs:
        args = (args[1], args[0])
    arguments = _arguments(node, args)
    if arguments is None:
        return Decline("unsupported-arguments", "the arguments of {} cannot be read", node, (node.name,))
    return Call(name, arguments)


@functools.cache
def default_arguments(operator_name: object) -> Mapping[str, Any]:
    """The defaults of an operator's arguments, where it is one of ATen and its overloads agree on them."""
    packet = aten_packet(operator_name.removeprefix("aten::")) if isinstance(operator_name, str) else None
    found: dict[str, list[Any]] = {}
    for overload in _overloads(packet) if packet is not None else ():
        for name, default in _renamed(dict(signature_of_overload(overload).defaults)).items():
            found.setdefault(name, []).append(default)
    return {name: each[0] for name, each in found.items() if all(other == each[0] for other in each)}


# Operators -------------------------------------------------------------------------------------------------


@functools.cache
def _operator_of_function(target: Any) -> object:
    if isinstance(target, OpOverload):
        return str(target._schema.name)
    if target in _PYTHON_OPERATORS:
        return f"aten::{_PYTHON_OPERATORS[target]}"
    if _is_torch_function(target) and aten_packet(target.__name__) is not None:
        return f"aten::{target.__name__}"
    return target


@functools.cache
def _operator_of_method(name: str) -> str:
    return f"aten::{name}" if aten_packet(name) is not None else f"method::{name}"


def _is_torch_function(target: Any) -> bool:
    name = getattr(target, "__name__", "")
    places = (torch, nn.functional, FUNCTIONS_IN_C, torch.special, torch.linalg)
    return any(getattr(place, name, None) is target for place in places)


# Arguments -------------------------------------------------------------------------------------------------

_NOT_THE_OPERATOR_S = ("_stacklevel",)


def _arguments(node: Node, args: tuple[Any, ...]) -> dict[str, Any] | None:
    target = node.target
    if isinstance(target, OpOverload):
        return _of_overload(target, args, node.kwargs)
    name = operator_of(node)
    packet = aten_packet(name.removeprefix("aten::")) if isinstance(name, str) else None
    if packet is None or target is operator.getitem:
        positional = {str(position): argument for position, argument in enumerate(args)}
        return {**positional, **node.kwargs}
    if node.op == "call_function" and hasattr(target, "__code__"):
        return _of_python_function(target, packet, node)  # type: ignore[arg-type]
    return _of_packet(packet, args, node.kwargs) or _of_packet(packet, _packed(args), node.kwargs)


def _of_overload(
    overload: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    signature, layout = signature_of_overload(overload), _layout(overload)
    if not kwargs and len(args) <= layout.positional:
        # The common case, made quick: nothing by keyword, and every other argument has a default.
        if len(args) < layout.least:
            return None
        bound = dict(zip(layout.names, args, strict=False))
        if len(args) < len(layout.names):
            bound = {**layout.defaults, **bound}
    else:
        found = signature.bind(args, kwargs)
        if isinstance(found, str):
            return None
        bound = _renamed(found)
    for name in layout.lists:
        if type(bound[name]) is int:
            bound[name] = [bound[name]]
    return bound


@dataclass(frozen=True)
class _Layout:
    """What binding positional arguments needs, worked out once per overload.

    Attributes:
        names: the parameters, `input` as `self`.
        positional: how many may be positional.
        least: how many have no default.
        defaults: of those that have one.
        lists: which of them are lists of numbers.
    """

    names: tuple[str, ...]
    positional: int
    least: int
    defaults: dict[str, Any]
    lists: tuple[str, ...]


@functools.cache
def _layout(overload: OpOverload) -> _Layout:
    signature = signature_of_overload(overload)
    renamed = {name: "self" if name == "input" else name for name in signature.names}
    kinds = _types(overload)
    return _Layout(
        names=tuple(renamed.values()),
        positional=len(signature.names) - len(signature.keyword_only),
        least=len(signature.names) - len(signature.defaults),
        defaults={renamed[name]: default for name, default in signature.defaults.items()},
        lists=tuple(renamed[name] for name, kind in kinds.items() if "List[int]" in kind),
    )


def _packed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`x.view(2, 3)` as `x.view([2, 3])`."""
    return (args[0], list(args[1:])) if args else args


def _of_packet(
    packet: OpOverloadPacket, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The arguments under the first overload whose types they have."""
    for overload in _overloads(packet):
        bound = signature_of_overload(overload).bind(args, kwargs)
        if isinstance(bound, str):
            continue
        if all(_fits(kind, bound[name]) for name, kind in _types(overload).items()):
            return _renamed(_listed(bound, overload))
    return None


def _of_python_function(
    target: Callable[..., Any], packet: OpOverloadPacket, node: Node
) -> dict[str, Any] | None:
    """The arguments of a function of `torch.nn.functional`, with what its operator has besides."""
    bound = signature_of_function(target).bind(node.args, node.kwargs)
    if isinstance(bound, str) or bound.pop("inplace", False) is not False:
        return None
    arguments = _renamed({key: argument for key, argument in bound.items() if key not in _NOT_THE_OPERATOR_S})
    for overload in _overloads(packet):
        signature = signature_of_overload(overload)
        names = {"self" if name == "input" else name for name in signature.names}
        if arguments.keys() <= names:
            return {**_renamed(dict(signature.defaults)), **arguments}
    return arguments


def _renamed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Python's `input` and the schema's `self` are one."""
    return {"self" if name == "input" else name: argument for name, argument in arguments.items()}


def _listed(bound: dict[str, Any], overload: OpOverload) -> dict[str, Any]:
    """A single number where a list is meant becomes a list: `mean(x, -1)` is `mean(x, [-1])`."""
    kinds = _types(overload)
    return {
        name: [argument] if "List[int]" in kinds[name] and type(argument) is int else argument
        for name, argument in bound.items()
    }


_FIRST = ("Tensor", "List[Tensor]")
"""What an overload may take first. Others are for numbers alone."""


@functools.cache
def _overloads(packet: OpOverloadPacket) -> tuple[OpOverload, ...]:
    return tuple(
        overload
        for overload in packet_overloads(packet)
        if "out" not in overload._overloadname and next(iter(_types(overload).values()), "") in _FIRST
    )


@functools.cache
def _types(overload: OpOverload) -> dict[str, str]:
    return {argument.name: str(argument.real_type) for argument in overload._schema.arguments}


def _fits(kind: str, given: object) -> bool:
    """Whether a value may be given where a schema wants a type."""
    if kind.startswith("Optional["):
        return given is None or _fits(kind.removeprefix("Optional[").removesuffix("]"), given)
    if kind.startswith("List["):
        inner = kind.removeprefix("List[").removesuffix("]")
        if isinstance(given, (list, tuple)):
            return all(_fits(inner, element) for element in given)
        return inner == "int" and type(given) is int
    held = value(given) if isinstance(given, Node) else given
    if isinstance(given, ModuleTensor):
        return kind == "Tensor"
    if held is None and isinstance(given, Node):
        return True
    return isinstance(held, _PYTHON_TYPES.get(kind, ())) and not (kind == "int" and held is True)


_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "Tensor": (torch.Tensor,),
    "number": (int, float, complex, torch.SymInt, torch.SymFloat),
    "int": (int, torch.SymInt),
    "SymInt": (int, torch.SymInt),
    "float": (int, float, torch.SymFloat),
    "bool": (bool, torch.SymBool),
    "str": (str,),
    "ScalarType": (torch.dtype,),
    "Device": (torch.device, str),
    "Layout": (torch.layout,),
    "MemoryFormat": (torch.memory_format,),
}


def _is_tensor(given: object) -> bool:
    if isinstance(given, Node):
        return value(given) is None or isinstance(value(given), torch.Tensor)
    return isinstance(given, ModuleTensor)


# Modules ---------------------------------------------------------------------------------------------------


_EXPANDED: weakref.WeakKeyDictionary[nn.Module, Node | None] = weakref.WeakKeyDictionary()


def _expanded(module: nn.Module | None) -> Node | None:
    """The one call that a leaf module's `forward` makes; None where it makes none, or several."""
    if module is None or not type(module).__module__.startswith("torch.nn.modules"):
        return None
    if module not in _EXPANDED:
        _EXPANDED[module] = _only_call(module)
    return _EXPANDED[module]


def _only_call(module: nn.Module) -> Node | None:
    try:
        graph = torch.fx.Tracer().trace(module)
    except Exception:
        return None
    calls = [node for node in graph.nodes if node.op.startswith("call")]
    if len(calls) != 1 or calls[0].op == "call_module":
        return None
    returned = graph.find_nodes(op="output")[0].args[0]
    return calls[0] if returned is calls[0] else None


def _read_module(node: Node) -> Call | Decline:
    module = modules.module_of(node)
    # The mode may have changed since the module was first seen, and with it what it calls.
    expanded = None if module is None else _only_call(module)
    if module is None or expanded is None:
        return Decline("unknown-module", "{} may compute more than one operator", node, (node.target,))
    found = modules.read(node, frozenset({type(module)}))
    if found is None or isinstance(found, Decline):
        return found or Decline("unknown-module", "{} cannot be read", node, (node.target,))
    _, given = found
    call = read_call(expanded)
    if isinstance(call, Decline):
        return Decline(call.code, call.template, node, call.details)

    def outside(inner: object) -> object:
        if isinstance(inner, (list, tuple)):
            return [outside(element) for element in inner]
        if not isinstance(inner, Node):
            return inner
        if inner.op == "placeholder":
            return given[str(inner.target)]
        return ModuleTensor(f"{node.target}.{inner.target}", _attribute(module, str(inner.target)))

    return Call(call.operator, {name: outside(argument) for name, argument in call.arguments.items()})


def _attribute(module: nn.Module, path: str) -> torch.Tensor:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    assert isinstance(found, torch.Tensor)
    return found
