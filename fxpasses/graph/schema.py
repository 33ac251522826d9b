"""Arguments by name: every spelling of a call, bound to its operator's schema, defaults filled in.

An operator is called as `torch.conv2d(x, w, None, 2)`, as `torch.conv2d(x, weight=w, stride=2)`, as
`aten.conv2d.padding(x, w, None, [2, 2], 'same')`: a rule must not care, and must not guess. What cannot be
bound (an argument that the schema does not know) is refused with a reason.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from fxpasses.graph.decline import Decline
from fxpasses.torch_internals.operators import LINEAR_FUNCTION, OpOverload, OpOverloadPacket, packet_overloads

aten = torch.ops.aten


@dataclass(frozen=True)
class Signature:
    """The parameters of one overload: names in order, which are keyword-only, and the defaults."""

    names: tuple[str, ...]
    keyword_only: frozenset[str]
    defaults: Mapping[str, Any]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | str:
        """The arguments by name with defaults filled in, or what does not fit."""
        positional = [name for name in self.names if name not in self.keyword_only]
        if len(args) > len(positional):
            return f"{len(args)} positional arguments, of at most {len(positional)}"
        bound = dict(zip(positional, args, strict=False))
        for name, given in kwargs.items():
            # Python's spelling of an operator's first argument is `input`, the schema's is `self`.
            known = "self" if name == "input" and "input" not in self.names else name
            if known not in self.names:
                return f"an unknown argument {name!r}"
            if known in bound:
                return f"two values for {name!r}"
            bound[known] = given
        for name in self.names:
            if name not in bound:
                if name not in self.defaults:
                    return f"no value for {name!r}"
                bound[name] = self.defaults[name]
        return bound


@functools.cache
def signature_of_overload(overload: OpOverload) -> Signature:
    """The signature of an ATen overload, from its schema."""
    arguments = overload._schema.arguments
    return Signature(
        tuple(argument.name for argument in arguments),
        frozenset(argument.name for argument in arguments if argument.kwarg_only),
        {argument.name: argument.default_value for argument in arguments if argument.has_default_value()},
    )


@functools.cache
def signature_of_function(function: Callable[..., Any]) -> Signature:
    """The signature of a function written in Python."""
    parameters = inspect.signature(function).parameters.values()
    return Signature(
        tuple(parameter.name for parameter in parameters),
        frozenset(
            parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        ),
        {
            parameter.name: parameter.default
            for parameter in parameters
            if parameter.default is not inspect.Parameter.empty
        },
    )


_PACKETS: dict[Callable[..., Any], OpOverloadPacket] = {
    torch.conv1d: aten.conv1d,
    torch.conv2d: aten.conv2d,
    torch.conv3d: aten.conv3d,
    torch.conv_transpose1d: aten.conv_transpose1d,
    torch.conv_transpose2d: aten.conv_transpose2d,
    torch.conv_transpose3d: aten.conv_transpose3d,
    torch.convolution: aten.convolution,
    LINEAR_FUNCTION: aten.linear,
    torch.mm: aten.mm,
    torch.matmul: aten.matmul,
    operator.matmul: aten.matmul,
    torch.addmm: aten.addmm,
    torch.add: aten.add,
    operator.add: aten.add,
    torch.batch_norm: aten.batch_norm,
    torch.native_batch_norm: aten.native_batch_norm,
    torch.instance_norm: aten.instance_norm,
    F.avg_pool2d: aten.avg_pool2d,
}
"""Functions of torch that are built in, and the operator whose schema describes them."""

_FUNCTIONS = (F.batch_norm, F.instance_norm)
"""Functions of torch that are written in Python and stay whole in a graph."""

_METHODS: dict[str, OpOverloadPacket] = {
    "matmul": aten.matmul,
    "__matmul__": aten.matmul,
    "mm": aten.mm,
    "addmm": aten.addmm,
    "add": aten.add,
    "__add__": aten.add,
}


def bind(node: Node) -> dict[str, Any] | Decline:
    """The node's arguments by name, whatever the spelling; a refusal names what does not fit."""
    problem = "an operator without a known signature"
    for signature in _signatures(node):
        bound = signature.bind(node.args, node.kwargs)
        if isinstance(bound, dict):
            return bound
        problem = bound
    return Decline("unsupported-arguments", "{} was called with {}", node, (node.name, problem))


def _signatures(node: Node) -> list[Signature]:
    target = node.target
    if node.op == "call_method":
        return _packet_signatures(_METHODS[str(target)]) if target in _METHODS else []
    if node.op != "call_function" or isinstance(target, str):
        return []
    if isinstance(target, OpOverload):
        return [signature_of_overload(target)]
    if target in _PACKETS:
        return _packet_signatures(_PACKETS[target])
    return [signature_of_function(target)] if target in _FUNCTIONS else []


@functools.cache
def _packet_signatures(packet: OpOverloadPacket) -> list[Signature]:
    return [
        signature_of_overload(overload)
        for overload in packet_overloads(packet)
        if "out" not in overload._overloadname and not overload._overloadname.endswith("_")
    ]


def with_arguments(node: Node, changed: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The node's own arguments with some replaced by name, in the node's own spelling.

    An argument stays where it stood, positional or keyword; one that was left to its default is appended
    where it is the next positional one, and given by keyword otherwise.
    """
    signature = next(
        candidate
        for candidate in _signatures(node)
        if isinstance(candidate.bind(node.args, node.kwargs), dict)
    )
    args, kwargs = list(node.args), dict(node.kwargs)
    for name in sorted(changed, key=signature.names.index):
        position = signature.names.index(name)
        spelled = "input" if name == "self" and "input" in kwargs else name
        if spelled in kwargs:
            kwargs[spelled] = changed[name]
        elif position < len(args):
            args[position] = changed[name]
        elif position == len(args) and name not in signature.keyword_only:
            args.append(changed[name])
        else:
            kwargs[name] = changed[name]
    return tuple(args), kwargs
