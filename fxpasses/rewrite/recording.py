"""Recording: a plain torch function as a graph of any capture level, from fake inputs.

At the levels below torch, `make_fx` does it: before dispatch, or with mutations removed and composite
operators decomposed. At the torch level every call of a torch function is written down as it is spelled
(`x.mean(-1)` stays a method, `F.rms_norm` stays whole), while the fake tensors know their sizes, so that a
function may ask for `x.shape[-1]`, which no symbolic trace can answer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from fxpasses.errors import PatternError
from fxpasses.graph.levels import Level
from fxpasses.rewrite.builder import Builder
from fxpasses.torch_internals.fake_tensors import FakeTensorMode
from fxpasses.torch_internals.pytree import tree_leaves, tree_map, tree_map_only
from fxpasses.torch_internals.sizes import same_expression
from fxpasses.torch_internals.tracing import core_decompositions, enable_python_dispatcher

Function = Callable[..., Any]


def record(
    function: Function, given: Mapping[str, Any], level: Level, mode: FakeTensorMode, decomposed: bool = True
) -> Graph:
    """The graph of a function at a capture level.

    Args:
        function: takes the given arguments by name.
        given: fake tensors of `mode`, numbers and None, by parameter name.
        level: the level to write in.
        mode: the fake mode of the tensors.
        decomposed: at the aten level, whether core ATen is written, or only composite operators are gone.

    Returns:
        A graph with a placeholder for each tensor, under its parameter's name, and metadata on every node.
    """
    tensors = {name: _fresh(tensor) for name, tensor in given.items() if isinstance(tensor, torch.Tensor)}
    constants = {name: constant for name, constant in given.items() if name not in tensors}

    def called(*values: torch.Tensor) -> Any:
        return function(**dict(zip(tensors, values, strict=True)), **constants)

    with torch.no_grad(), mode:
        if level is Level.TORCH:
            return _Recorder(tensors, constants).run(called)
        graph = _make_fx(called, list(tensors.values()), level, decomposed)
    for name, node in zip(tensors, graph.find_nodes(op="placeholder"), strict=True):
        node.name = name
    return graph


def _fresh(given: torch.Tensor) -> torch.Tensor:
    """An object of its own, so that one tensor given twice is two inputs."""
    return given.detach().view_as(given)


def _make_fx(function: Function, values: list[torch.Tensor], level: Level, decomposed: bool) -> Graph:
    if level is Level.PRE_DISPATCH:
        with enable_python_dispatcher():
            return make_fx(function, pre_dispatch=True)(*values).graph
    # Composite operators may mutate what they have made: they are taken apart before mutations are removed.
    plain = make_fx(function)(*values)
    pure = torch.func.functionalize(plain, remove="mutations")
    return make_fx(pure, decomposition_table=core_decompositions() if decomposed else None)(*values).graph


def write(
    build: Builder,
    graph: Graph,
    operands: Mapping[str, Node],
    numbers: Sequence[tuple[Any, Any]] = (),
) -> tuple[Node, ...]:
    """Writes a recorded graph through a builder.

    Args:
        build: where to write.
        graph: what `record` gave.
        operands: a node for each placeholder, by name.
        numbers: symbolic numbers that the function was given, and the nodes that they belong to.
    """
    known: dict[Node, Node] = {}

    def placed(given: Any) -> Any:
        if isinstance(given, Node):
            return known[given]
        if not isinstance(given, (torch.SymFloat, torch.SymInt)):
            return given
        for number, node in numbers:
            if same_expression(number, given):
                return node
        raise PatternError(f"a replacement computes {given} from a symbolic number, which cannot be written.")

    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = operands[node.name]
        elif node.op == "output":
            returned = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            return tuple(known[result] for result in returned)
        elif node.op in ("call_function", "call_method"):
            args, kwargs = torch.fx.node.map_aggregate((node.args, dict(node.kwargs)), placed)
            known[node] = build.call(node.target, args, kwargs)
        else:
            raise PatternError("a replacement holds a tensor that it made; make it a parameter.")
    raise AssertionError("a graph has an output")


class _Recorder(TorchFunctionMode):
    """Writes down every torch function that is called on known tensors."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], constants: Mapping[str, Any]) -> None:
        super().__init__()
        self._numbers: list[tuple[Any, Node]] = []
        self._graph = Graph()
        self._known: dict[int, tuple[torch.Tensor, Node]] = {}
        self._inputs = list(tensors.values())
        for name, tensor in tensors.items():
            self._enter(tensor, self._graph.placeholder(name))
        for name, constant in constants.items():
            if isinstance(constant, _SYMBOLIC):
                self._numbers.append((constant, self._graph.placeholder(name)))

    def run(self, function: Function) -> Graph:
        with self:
            returned = function(*self._inputs)
        self._graph.output(tree_map(self._operand, returned))
        return self._graph

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            return result
        op, target, args, kwargs = _spelled(func, args, kwargs)
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):
            raise PatternError(f"{name} writes in place; a rule's functions must not.")
        args, kwargs = tree_map(self._operand, (tuple(args), dict(kwargs)))
        node = self._graph.create_node(op, target, args, kwargs)
        node.meta["val"] = result
        return self._entered(result, node)

    def _entered(self, result: Any, node: Node) -> Any:
        """The result, known by its node; parts of a tuple by nodes that take them out."""
        if isinstance(result, torch.Tensor):
            # An operator may return its argument; the two must stay apart.
            own = result.view_as(result) if id(result) in self._known else result
            self._enter(own, node)
            return own
        if not isinstance(result, (tuple, list)):
            raise PatternError(f"{node.target} gives a {type(result).__name__}, which cannot be recorded.")
        parts = []
        for index, element in enumerate(result):
            part = self._graph.call_function(operator.getitem, (node, index))
            part.meta["val"] = element
            parts.append(
                self._entered(element, part) if isinstance(element, (torch.Tensor, tuple, list)) else element
            )
        return type(result)(parts) if type(result) in (tuple, list) else type(result)(*parts)

    def _enter(self, tensor: torch.Tensor, node: Node) -> None:
        node.meta["val"] = tensor
        # The tensor is kept beside its node, since its id is the key.
        self._known[id(tensor)] = (tensor, node)

    def _operand(self, given: Any) -> Any:
        if isinstance(given, torch.Tensor):
            if id(given) not in self._known:
                raise PatternError("a rule's function uses a tensor from outside; make it a parameter.")
            return self._known[id(given)][1]
        return self._symbol(given) if isinstance(given, _SYMBOLIC) else given

    def _symbol(self, symbol: torch.SymInt | torch.SymFloat) -> Node:
        """The node of a symbolic number: one that was given, or a size of an input."""
        for number, known in self._numbers:
            if same_expression(number, symbol):
                return known
        for tensor in self._inputs:
            for axis, size in enumerate(tensor.shape):
                if _is_symbol(size) and same_expression(size, symbol):
                    node = self._graph.call_method("size", (self._known[id(tensor)][1], axis))
                    node.meta["val"] = size
                    return node
        raise PatternError(f"{symbol} is neither given nor the size of an operand, so it cannot be written.")


def _is_symbol(size: object) -> bool:
    return isinstance(size, torch.SymInt)


_SYMBOLIC = (torch.SymInt, torch.SymFloat)


_DUNDERS: dict[str, Callable[..., Any]] = {
    f"__{name}__": getattr(operator, attribute)
    for name, attribute in (
        ("add", "add"), ("sub", "sub"), ("mul", "mul"), ("truediv", "truediv"), ("matmul", "matmul"),
        ("pow", "pow"), ("neg", "neg"), ("invert", "invert"), ("and", "and_"), ("or", "or_"), ("xor", "xor"),
        ("eq", "eq"), ("ne", "ne"), ("lt", "lt"), ("le", "le"), ("gt", "gt"), ("ge", "ge"),
        ("getitem", "getitem"), ("floordiv", "floordiv"), ("mod", "mod"),
    )
}  # fmt: skip
_REFLECTED = {f"__r{name[2:]}": function for name, function in _DUNDERS.items()}


def _spelled(func: Any, args: Any, kwargs: Any) -> tuple[str, Any, Any, Any]:
    """A called function as a node spells it: method, function of Python's operator module, or itself."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__), {}
    if name in _DUNDERS and _is_method(func):
        return "call_function", _DUNDERS[name], args, kwargs
    if name in _REFLECTED and _is_method(func):
        return "call_function", _REFLECTED[name], (args[1], args[0]), kwargs
    if _is_method(func):
        return "call_method", name, args, kwargs
    return "call_function", func, args, kwargs


def _is_method(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    found = getattr(torch.Tensor, name, None)
    return found is func or (found is not None and "Tensor" in getattr(func, "__qualname__", ""))


def fake_of(given: Any, mode: FakeTensorMode) -> Any:
    """Real tensors in any nest as fake ones."""
    return tree_map_only(torch.Tensor, lambda tensor: mode.from_tensor(tensor, static_shapes=True), given)
