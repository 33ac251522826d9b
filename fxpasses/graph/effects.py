"""Effects: which nodes write to which tensors, under every name that a tensor has.

Tensors that may share a storage form one alias class. Classes are joined by what is known, in this order:
the storages of fake tensors (Dynamo's are faithful), the alias annotations of operator schemas, and, for a
function that nobody described, the assumption that its result may be any of its arguments. A write is kept
by class in program order, so that "is this tensor written between these two nodes" is a binary search.
"""

from __future__ import annotations

import bisect
import functools
import inspect
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fxpasses.graph.levels import attribute
from fxpasses.graph.metadata import tensor, value
from fxpasses.torch_internals.operators import (
    FUNCTIONS_IN_C,
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    aten_packet,
    packet_overloads,
    writes_in_place,
)
from fxpasses.torch_internals.tensors import is_batched, storage_key

_INPLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in (
        "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul",
        "iand", "ior", "ixor", "ilshift", "irshift", "setitem", "delitem",
    )
)  # fmt: skip

_UNDECLARED_ALIASES = frozenset(
    {
        "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "rrelu", "native_dropout",
        "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "cartesian_prod", "conj_physical",
        "cumprod_backward", "data", "einsum", "flatten_dense_tensors", "lift", "meshgrid", "sum_to_size",
        "to_dense", "type_as", "unflatten_dense_tensors", "unsafe_chunk", "unsafe_split",
        "unsafe_split_with_sizes",
    }
)  # fmt: skip
"""Operators whose schemas promise a new tensor, and that may return their input or a view of it all the same.

Found by calling every ATen operator and comparing the storages of its result and its arguments (torch 2.13).
"""


class Effects:
    """Alias classes and writes of one graph."""

    def __init__(
        self, module: GraphModule, graph: Graph, held: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Args:
        module: what owns the graph.
        graph: the graph.
        held: what the inputs are that an exported program brings along, by name. Without it any two inputs
            may share storage.
        """
        self._module = module
        self._held = held or {}
        self._parent: dict[object, object] = {}
        self._graph = graph
        self._from_dynamo = any("example_value" in node.meta for node in graph.nodes)
        self._written_to = [
            (node, target)
            for node in graph.nodes
            if not (isinstance(node.target, OpOverload) and _only_reads(node.target))
            for target in self._written(node)
        ]

    @property
    def writes_anything(self) -> bool:
        """Whether any node writes to any tensor; where none does, nobody asks who shares storage."""
        return bool(self._written_to)

    @functools.cached_property
    def _joined(self) -> bool:
        """Joins the alias classes, when they are first needed."""
        for node in self._graph.nodes:
            self._join_storage(node)
            self._join_by_meaning(node)
        return True

    @functools.cached_property
    def _writes(self) -> dict[object, list[Node]]:
        """The writes to each alias class, in program order."""
        assert self._joined
        writes: dict[object, list[Node]] = defaultdict(list)
        for node, target in self._written_to:
            writes[self._find(target)].append(node)
        return writes

    def written_between(self, operands: Iterable[object], first: Node, last: Node) -> Node | None:
        """The first node strictly between two others that writes to any operand or to an alias of it.

        Args:
            operands: nodes, or tensors that belong to a module.
            first: the earlier node.
            last: the later node.
        """
        if not self.writes_anything:
            return None
        for operand in operands:
            writes = self._writes.get(self._find(self._key(operand)))
            if not writes:
                continue
            position = bisect.bisect_right(writes, first)
            if position < len(writes) and writes[position] < last:
                return writes[position]
        return None

    def is_written(self, operand: object) -> bool:
        """Whether any node writes to the operand or to an alias of it."""
        return bool(self.writers_of(operand))

    def writers_of(self, operand: object) -> list[Node]:
        """The nodes that write to the operand or to an alias of it, in program order."""
        if not self.writes_anything:
            return []
        return self._writes.get(self._find(self._key(operand)), [])

    def stand_in(self, new: Node, old: Node) -> None:
        """Has a node take the place of another, with all that shares storage with it or writes to it."""
        if self.writes_anything:
            assert self._joined
            self._join(new, old)
            self.__dict__.pop("_writes", None)

    def may_return_argument(self, node: Node) -> bool:
        """Whether the node's result may share storage with something that it reads."""
        found = tensor(node)
        if self._from_dynamo and found is not None:
            keys = {
                storage_key(operand) for operand in map(tensor, node.all_input_nodes) if operand is not None
            }
            return storage_key(found) in keys
        return self._may_return_argument(node)

    def may_alias(self, first: object, second: object) -> bool:
        """Whether two tensors (nodes, or tensors that belong to a module) may share storage."""
        assert self._joined
        return self._find(self._key(first)) == self._find(self._key(second))

    # Alias classes: a union-find over nodes and storages.

    @staticmethod
    def _key(operand: object) -> object:
        if isinstance(operand, torch.Tensor):
            return ("storage", storage_key(operand))
        return operand

    def _find(self, key: object) -> object:
        root = key
        while (above := self._parent.get(root, root)) != root:
            root = above
        while (above := self._parent.get(key, key)) != root:
            self._parent[key], key = root, above
        return root

    def _join(self, first: object, second: object) -> None:
        first, second = self._find(first), self._find(second)
        if first != second:
            self._parent[first] = second

    def _join_storage(self, node: Node) -> None:
        """A tensor joins those that share its storage; inputs of unknown origin may share with each other."""
        if node.op == "get_attr":
            found = attribute(self._module, str(node.target))
            if isinstance(found, torch.Tensor):
                self._join(node, self._key(found))
        if node.op == "placeholder" and not self._from_dynamo:
            held = self._held.get(node.name)
            self._join(node, "placeholders" if held is None else self._key(held))
        if node.op == "placeholder" and node.users and all(map(_is_fresh_copy, node.users)):
            return  # export's metadata has what is copied in the storage of the copy
        for leaf in _tensors(value(node)):
            if not is_batched(leaf) and (key := storage_key(leaf)) is not None:
                self._join(node, ("storage", key))

    def _join_by_meaning(self, node: Node) -> None:
        if node.op in ("placeholder", "get_attr", "output") or not node.all_input_nodes:
            return
        if self._may_return_argument(node):
            for argument in _returnable(node):
                if value(argument) is None or any(True for _ in _tensors(value(argument))):
                    self._join(node, argument)

    def _may_return_argument(self, node: Node) -> bool:
        if node.op == "call_module":
            return True
        if "dropout" in str(getattr(node.target, "__name__", node.target)):
            return True  # a fake one returns a new tensor even where a real one has nothing to do
        if self._from_dynamo and tensor(node) is not None:
            return False  # its fake storage has told already
        if node.op == "call_method":
            packet = aten_packet(str(node.target))
            return packet is None or _packet_aliases(packet)
        if isinstance(node.target, str):
            return True
        return _may_return_argument(node.target)

    # Writes.

    def _written(self, node: Node) -> list[object]:
        """What the node writes to: nodes, or the storages of a module's own tensors."""
        if node.op == "call_module":
            return self._written_by_module(node)
        if node.op not in ("call_function", "call_method"):
            return []
        tensors: list[object] = list(node.all_input_nodes)
        if "out" in node.kwargs:
            return [out for out in _flat(node.kwargs["out"]) if isinstance(out, Node)]
        if node.op == "call_method":
            name = str(node.target)
            mutates = (name.endswith("_") and not name.endswith("__")) or name in _INPLACE_METHODS
            known = mutates or hasattr(torch.Tensor, name)
            return tensors[:1] if mutates else ([] if known else list(tensors))
        return _written_by_call(node, tensors)

    def _written_by_module(self, node: Node) -> list[object]:
        module = attribute(self._module, str(node.target))
        if not isinstance(module, torch.nn.Module):
            return list(node.all_input_nodes)
        own = [self._key(buffer) for buffer in module.buffers()]
        if not type(module).__module__.startswith("torch.nn.modules"):
            return [*node.all_input_nodes, *own, *(self._key(parameter) for parameter in module.parameters())]
        written: list[object] = list(node.all_input_nodes) if getattr(module, "inplace", False) else []
        return written + own if module.training else written


def _is_fresh_copy(node: Node) -> bool:
    return node.target is torch.ops.aten.lift_fresh_copy.default


def _returnable(node: Node) -> Iterable[Node]:
    """What a node's result may share storage with: `fill_(x, number)` with x alone."""
    first = node.args[0] if node.args else None
    return [first] if writes_in_place(node.target) and isinstance(first, Node) else node.all_input_nodes


_INPLACE_METHODS = frozenset(
    {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__iand__", "__ior__"}
)


def _tensors(found: Any) -> Iterable[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, (tuple, list)):
        for part in found:
            yield from _tensors(part)


def _written_by_call(node: Node, tensors: list[object]) -> list[object]:
    target = node.target
    if isinstance(target, OpOverload):
        return _written_by_schema(node, target)
    if isinstance(target, OpOverloadPacket):
        # `torch.ops.library.operator(...)`: the overload is chosen at the call, so any may be meant.
        return [
            written for overload in packet_overloads(target) for written in _written_by_schema(node, overload)
        ]
    if isinstance(target, HigherOrderOperator):
        return _written_by_nested(node)
    if isinstance(target, str):
        return list(tensors)
    if target in _INPLACE_OPERATORS:
        return list(tensors[:1])
    if is_described(target):
        name = getattr(target, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):
            # `torch._foreach_mul_` takes a list of tensors, and writes to all of them.
            return (
                [operand for operand in _flat(node.args[0]) if isinstance(operand, Node)]
                if node.args
                else tensors
            )
        return _written_by_flag(node, target)
    return list(tensors)


@functools.cache
def _only_reads(target: OpOverload) -> bool:
    """Whether no call of an operator writes to anything; every node asks, so it is answered once."""
    return not target._schema.is_mutable and target._schema.name not in _TRAINING_FLAG


def _written_by_schema(node: Node, target: OpOverload) -> list[object]:
    written: list[object] = []
    for position, argument in enumerate(target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        written.extend(operand for operand in _flat(given) if isinstance(operand, Node))
    if target._schema.name in _TRAINING_FLAG and not written:
        flag, statistics = _TRAINING_FLAG[target._schema.name]
        training = node.args[flag] if flag < len(node.args) else node.kwargs.get("training", True)
        if training is not False:
            written.extend(statistic for statistic in node.args[statistics] if isinstance(statistic, Node))
    return written


_TRAINING_FLAG = {
    "aten::batch_norm": (5, slice(3, 5)),
    "aten::native_batch_norm": (5, slice(3, 5)),
    "aten::cudnn_batch_norm": (5, slice(3, 5)),
    "aten::miopen_batch_norm": (5, slice(3, 5)),
    "aten::_batch_norm_impl_index": (5, slice(3, 5)),
    "aten::instance_norm": (5, slice(3, 5)),
}
"""Operators that update running statistics without saying so: position of the flag, of the statistics."""


def _written_by_flag(node: Node, target: Callable[..., Any]) -> list[object]:
    """Writes that an argument switches on: `inplace=True`, `training=True` of a normalisation."""
    names = parameters_of(target)
    bound = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    written: list[object] = []
    if bound.get("inplace", False) is not False:
        written.append(bound.get("input", next(iter(node.all_input_nodes), None)))
    by_default = getattr(target, "__name__", "") == "instance_norm"
    flag = bound.get("use_input_stats", True) if by_default else bound.get("training", False)
    if "running_mean" in bound and flag is not False:
        written += [bound.get("running_mean"), bound.get("running_var")]
    return [operand for operand in written if isinstance(operand, Node)]


def _written_by_nested(node: Node) -> list[object]:
    """What an operator that runs graphs writes to: nothing where none of its graphs writes anything."""
    owner = node.graph.owning_module
    for argument in node.all_input_nodes:
        if argument.op != "get_attr" or owner is None:
            continue
        child = attribute(owner, str(argument.target))
        if isinstance(child, GraphModule) and Effects(child, child.graph).writes_anything:
            return list(node.all_input_nodes)
    takes_graphs = any(argument.op == "get_attr" for argument in node.all_input_nodes)
    return [] if takes_graphs else list(node.all_input_nodes)


def _flat(given: Any) -> Iterable[Any]:
    return given if isinstance(given, (tuple, list)) else (given,)


@functools.cache
def parameters_of(target: Callable[..., Any]) -> tuple[str, ...]:
    packet = aten_packet(getattr(target, "__name__", ""))
    try:
        return tuple(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        if packet is None:
            return ()
        schema = packet_overloads(packet)[0]._schema
        return tuple(argument.name for argument in schema.arguments)


@functools.cache
def is_described(target: Callable[..., Any]) -> bool:
    """Whether a function is torch's or Python's own, and so writes only what its name or flags say."""
    module = getattr(target, "__module__", None) or ""
    return module.split(".")[0] in ("torch", "_operator", "builtins", "math") or _is_builtin_of_torch(target)


def _is_builtin_of_torch(target: Callable[..., Any]) -> bool:
    name = getattr(target, "__name__", "")
    places = (torch, torch.nn.functional, FUNCTIONS_IN_C, torch.Tensor)
    return any(getattr(place, name, None) is target for place in places)


@functools.cache
def _may_return_argument(target: Any) -> bool:
    """Whether a function's result may share storage with an argument, as far as is known."""
    if isinstance(target, OpOverload):
        return _overload_aliases(target)
    if isinstance(target, OpOverloadPacket):
        return _packet_aliases(target)
    if isinstance(target, HigherOrderOperator):
        return True
    if target in _INPLACE_OPERATORS or target is operator.getitem:
        return True
    packet = aten_packet(getattr(target, "__name__", "")) if is_described(target) else None
    if packet is not None:
        return _packet_aliases(packet)
    if target is torch.nn.functional.multi_head_attention_forward:
        return False
    return getattr(target, "__module__", "") not in ("_operator", "math")


@functools.cache
def _packet_aliases(packet: Any) -> bool:
    return any(
        _overload_aliases(overload) for overload in packet_overloads(packet) if "out" not in str(overload)
    )


def _overload_aliases(overload: OpOverload) -> bool:
    name = overload._schema.name.removeprefix("aten::")
    annotated = any(returned.alias_info is not None for returned in overload._schema.returns)
    return annotated or name in _UNDECLARED_ALIASES
