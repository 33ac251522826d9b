"""Graphs in tests: how often each operator is called, and a text that golden tests can be held to.

    fxpasses.testing.assert_op_counts(model, (x,), before={"batch_norm": 3}, after={"batch_norm": 0})
    fxpasses.testing.assert_graph(graph_module, '''
        %0 = input : f32[2, 3]
        %1 = neg(%0) : f32[2, 3]
        return %1
    ''')

The text is the same for the same graph in every supported version of torch: nodes and symbols of sizes are
numbered, operators have their base names, arguments their schema's names in the order of the alphabet, and
those that have their default are left out. What a tracer makes of a model may differ between versions, and
then so does the text.
"""

from __future__ import annotations

import difflib
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxpasses.errors import FxpassesError, unknown_name
from fxpasses.graph.canonical import default_arguments, read_call
from fxpasses.graph.decline import Decline
from fxpasses.graph.levels import attribute, nested_graphs
from fxpasses.graph.metadata import value
from fxpasses.graph.names import base_name
from fxpasses.graph.operands import ModuleTensor
from fxpasses.options import Options
from fxpasses.testing.captures import rewrite_at
from fxpasses.torch_internals.operators import aten_packet
from fxpasses.torch_internals.sizes import size_expression


def assert_op_counts(
    model: nn.Module,
    inputs: Sequence[Any],
    *,
    before: Mapping[str, int] | None = None,
    after: Mapping[str, int] | None = None,
    level: str = "torch",
    options: Options | Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> None:
    """Fails unless a model's graph calls operators so often before the passes, and so often after them.

    Args:
        model: a module in the mode that is to be tested.
        inputs: the arguments of one call.
        before: operator to number of calls before the passes, nested graphs included: ``"conv2d"``, ``"add"``
            (which `+`, `add_` and `aten.add.Tensor` are), ``"mylib.op"``. Others may be called at will.
        after: the same after them.
        level: where it is captured, one of `LEVELS`. Operators have the names of that level: ``"conv2d"``
            is ``"convolution"`` in core ATen.
        options: fields of `fxpasses.Options`, or `Options`.
        dynamic: whether sizes are symbols; None leaves it to torch.compile.

    Raises:
        AssertionError: a number differs; the message has all operators and the remarks.
        FxpassesError: a name that neither graph has and that is no operator of ATen.
    """
    found = rewrite_at(level, model, inputs, options, dynamic=dynamic)
    known = {*found.before, *found.after}
    lines = []
    for when, wanted, counts in (("before", before, found.before), ("after", after, found.after)):
        for name, count in (wanted or {}).items():
            if name not in known and aten_packet(name) is None:
                raise FxpassesError(unknown_name("operator", name, known))
            if counts[name] != count:
                lines.append(f"{name}: expected {count} calls {when} the passes, found {counts[name]}")
    if lines:
        remarks = [str(remark) for remark in found.report.remarks] or ["(no site was looked at)"]
        listed = [f"before: {_listed(found.before)}", f"after: {_listed(found.after)}"]
        raise AssertionError("\n".join([*lines, *listed, "remarks:", *remarks]))


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "nothing"


# Text ------------------------------------------------------------------------------------------------------


def graph_text(graph_module: GraphModule, *, strides: bool = False) -> str:
    """A graph as text, one line a node, nested graphs behind the one that runs them.

    Args:
        graph_module: the graph.
        strides: whether each tensor's strides are told, as ``f32[2, 3 | 3, 1]``.
    """
    return "\n".join(_Printer(strides).lines(graph_module))


def assert_graph(graph_module: GraphModule, expected: str, *, strides: bool = False) -> None:
    """Fails unless a graph's text is the expected one, indented as it may be; the message is a diff.

    Args:
        graph_module: the graph.
        expected: what `graph_text` gives.
        strides: whether strides are told.

    Raises:
        AssertionError: a line differs.
    """
    wanted = textwrap.dedent(expected).strip().splitlines()
    found = graph_text(graph_module, strides=strides).splitlines()
    if wanted != found:
        diff = difflib.unified_diff(wanted, found, "expected", "found", lineterm="")
        raise AssertionError("\n".join(diff))


class _Printer:
    """Prints graphs, and numbers the symbols of their sizes in the order in which they come."""

    def __init__(self, strides: bool) -> None:
        self._strides = strides
        self._symbols: dict[object, Any] = {}

    def lines(self, graph_module: GraphModule) -> list[str]:
        numbers = {node: f"%{at}" for at, node in enumerate(graph_module.graph.nodes)}
        lines = [self._line(graph_module, node, numbers) for node in graph_module.graph.nodes]
        for path, child, _ in nested_graphs(graph_module):
            lines += [f"graph {path}:", *(f"    {line}" for line in self.lines(child))]
        return lines

    def _line(self, owner: GraphModule, node: Node, numbers: Mapping[Node, str]) -> str:
        if node.op == "output":
            return f"return {self._argument(node.args[0], numbers)}"
        kind = self._kind(value(node))
        return f"{numbers[node]} = {self._call(owner, node, numbers)}{f' : {kind}' if kind else ''}"

    def _call(self, owner: GraphModule, node: Node, numbers: Mapping[Node, str]) -> str:
        if node.op == "placeholder":
            return "input"
        if node.op == "get_attr":
            is_graph = isinstance(attribute(owner, str(node.target)), GraphModule)
            return f"graph {node.target}" if is_graph else f"attribute {node.target}"
        call = read_call(node)
        if isinstance(call, Decline):
            given = {**{str(at): each for at, each in enumerate(node.args)}, **node.kwargs}
        else:
            left_out = default_arguments(call.operator)
            given = {
                name: each
                for name, each in call.arguments.items()
                if name not in left_out or not _is_default(each, left_out[name])
            }
        texts = sorted(((name, self._argument(each, numbers)) for name, each in given.items()), key=_in_order)
        if isinstance(call, Decline) and node.op == "call_module":
            texts.append(("module", str(node.target)))
        arguments = (text if _is_positional(name) else f"{name}={text}" for name, text in texts)
        return f"{base_name(node)}({', '.join(arguments)})"

    def _argument(self, given: object, numbers: Mapping[Node, str]) -> str:
        if isinstance(given, Node):
            return numbers[given]
        if isinstance(given, ModuleTensor):
            return given.path
        if isinstance(given, (tuple, list)):
            return f"[{', '.join(self._argument(each, numbers) for each in given)}]"
        if isinstance(given, dict):
            items = (f"{key}: {self._argument(each, numbers)}" for key, each in given.items())
            return f"{{{', '.join(items)}}}"
        if isinstance(given, slice):
            parts = (self._argument(each, numbers) for each in (given.start, given.stop, given.step))
            return f"slice({', '.join(parts)})"
        if isinstance(given, torch.SymInt):
            return self._size(given)
        if isinstance(given, (torch.dtype, torch.memory_format, torch.layout)):
            return _DTYPES.get(given, str(given).removeprefix("torch."))
        if callable(given):
            return str(getattr(given, "__qualname__", type(given).__qualname__))
        return repr(given) if isinstance(given, (str, int, float, complex, type(None))) else str(given)

    def _kind(self, held: object) -> str:
        """A value's dtype and sizes."""
        if isinstance(held, torch.Tensor):
            dtype = _DTYPES.get(held.dtype, str(held.dtype).removeprefix("torch."))
            sizes = ", ".join(map(self._size, held.shape))
            if self._strides:
                sizes += f" | {', '.join(map(self._size, held.stride()))}"
            return f"{dtype}[{sizes}]"
        if isinstance(held, torch.SymInt):
            return self._size(held)
        if isinstance(held, (tuple, list)):
            return f"({', '.join(self._kind(each) or '-' for each in held)})"
        return ""

    def _size(self, size: int | torch.SymInt) -> str:
        if isinstance(size, int):
            return str(size)
        import sympy

        expression = sympy.sympify(size_expression(size))
        for symbol in sorted(expression.free_symbols, key=str):
            self._symbols.setdefault(symbol, sympy.Symbol(f"s{len(self._symbols)}", positive=True))
        return str(expression.xreplace(self._symbols))


def _is_default(given: object, default: object) -> bool:
    """Whether an argument is its default, and of its type. Symbols are not compared, which would guard."""
    if isinstance(given, (list, tuple)) and isinstance(default, (list, tuple)):
        return len(given) == len(default) and all(map(_is_default, given, default))
    return type(given) is type(default) and isinstance(given, _CONSTANTS) and bool(given == default)


def _in_order(argument: tuple[str, str]) -> tuple[bool, int, str]:
    """What is given by position first, then by name."""
    name, _ = argument
    return (not _is_positional(name), int(name) if name.isdecimal() else -1, name)


def _is_positional(name: str) -> bool:
    return name == "self" or name.isdecimal()


_CONSTANTS = (str, int, float, complex, type(None), torch.dtype, torch.memory_format, torch.layout)

_DTYPES: dict[object, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
