"""Writes that nobody can tell from a new tensor give one: `relu(x, inplace=True)`, where x is read no more.

    y = conv(x);  y.relu_();  z = y + 1      ->      y = conv(x);  r = relu(y);  z = r + 1

A tensor that is written to keeps its precision, since a cast of it would be another tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.effects import is_described, parameters_of
from fxpasses.graph.levels import called_by
from fxpasses.graph.metadata import set_value, tensor
from fxpasses.graph.strides import same_layout
from fxpasses.torch_internals.operators import HigherOrderOperator, OpOverload, writes_in_place

_IN_PYTHON: dict[object, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def write_out_of_place(context: GraphContext) -> None:
    """Has operators give a new tensor in place of the one that they write to, where that is the same.

    The metadata of what may share storage with the written tensor is computed anew.
    """
    for node in list(context.graph.nodes):
        written = node.args[0] if node.args else None
        if not isinstance(written, Node) or node not in context.writers_of(written):
            continue
        form = _out_of_place(node)
        if form is None or not _is_last_reader(context, node, written):
            continue
        aliases = [other for other in context.graph.nodes if other > node and context.may_alias(other, node)]
        if _rewrite(context, node, written, form):
            refresh(context, aliases)
            context.forget_effects()


def _is_last_reader(context: GraphContext, node: Node, written: Node) -> bool:
    """Whether what a node writes to is read afterwards through the node's result alone."""
    for other in context.graph.nodes:
        if other is node or not context.may_alias(other, written):
            continue
        if other > node:
            break  # those behind it that share the storage are made of its result, as is checked below
        if other.op != "call_function" and other.op != "call_method":
            return False
        if any(user > node for user in other.users):
            return False
    return True


_Form = tuple[str, Any, tuple[Any, ...], dict[str, Any]]
"""Kind of node, target, arguments."""


def _out_of_place(node: Node) -> _Form | None:
    """The call that gives a new tensor."""
    target, kwargs = node.target, dict(node.kwargs)
    if node.op == "call_method":
        name = str(target).removesuffix("_")
        return ("call_method", name, node.args, kwargs) if hasattr(torch.Tensor, name) else None
    if target in _IN_PYTHON:
        return "call_function", _IN_PYTHON[target], node.args, kwargs
    if isinstance(target, OpOverload):
        packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
        found = getattr(packet, target._schema.overload_name or "default", None)
        known = writes_in_place(target) and found is not None
        return ("call_function", found, node.args, kwargs) if known else None
    if isinstance(target, (str, HigherOrderOperator)) or not is_described(target):
        return None
    if kwargs.get("inplace") is True:
        return "call_function", target, node.args, {**kwargs, "inplace": False}
    names = parameters_of(target)
    position = names.index("inplace") if "inplace" in names else len(node.args)
    if position < len(node.args) and node.args[position] is True:
        return "call_function", target, (*node.args[:position], False, *node.args[position + 1 :]), kwargs
    function = getattr(torch, target.__name__.removesuffix("_"), None)
    is_twin = target.__name__.endswith("_") and getattr(torch, target.__name__, None) is target
    return ("call_function", function, node.args, kwargs) if is_twin and function is not None else None


def _rewrite(context: GraphContext, node: Node, written: Node, form: _Form) -> bool:
    """Writes the call in the node's place, if its result is as the written tensor was; whether it did."""
    before = tensor(written)
    kind, target, args, kwargs = form
    function = getattr(torch.Tensor, target) if kind == "call_method" else target
    with context.modes(node).entered():
        result = context.evaluator.call(function, args, kwargs)
    if before is None or not isinstance(result, torch.Tensor):
        return False
    if result.dtype != before.dtype or not same_layout(result, before):
        return False
    node.op, node.target, node.args, node.kwargs = kind, target, args, kwargs
    set_value(node, result, like=node)
    return True


def refresh(context: GraphContext, nodes: list[Node]) -> None:
    """Computes the metadata of nodes anew, in their order."""
    for node in nodes:
        if node.op not in ("call_function", "call_method") or isinstance(node.target, HigherOrderOperator):
            continue
        function: Any = called_by(context.module, node)
        with context.modes(node).entered():
            set_value(node, context.evaluator.call(function, node.args, dict(node.kwargs)), like=node)
