"""Whoever sees memory sees eager's: a layout ends before the operators that read strides, offsets or storage.

Inductor lays tensors out as convolutions like them and keeps eager's strides where it knows of a reader: a
result, a custom operator, `as_strided`. It looks at the operand alone. Behind a view that is not enough: what
lies in memory is the tensor that was viewed, and a copy of the view has other gaps and another offset.

    y = convolution(x)                            y = convolution(x)
    v = slice(y)                                  f = force_stride_order(y, eager's)    elided where it is so
    as_strided(v, size, stride)       becomes     as_strided(f, size, stride, offset of v)
    return v                                      return slice(f)

What computes on complex numbers and what draws random numbers goes by memory order, and inductor leaves it to
kernels that follow their operands: those read eager's strides too.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from fxpasses.graph.metadata import set_value, tensor, value
from fxpasses.graph.provenance import inherit
from fxpasses.graph.storage import base_of, is_same_pixel, is_view, viewed
from fxpasses.graph.strides import memory_order
from fxpasses.passes.layout import boundary
from fxpasses.report import sidecar
from fxpasses.torch_internals.inductor import (
    force_stride_order,
    force_strides,
    record_result_strides,
    with_joint_pass,
)
from fxpasses.torch_internals.operators import HigherOrderOperator, OpOverload, layout_tag, operator_name
from fxpasses.torch_internals.pytree import tree_leaves

aten = torch.ops.aten

_BY_STORAGE = (aten.as_strided.default, aten.as_strided_scatter.default, aten.resize.default)
"""Operators of ATen that read where in memory elements are, of which inductor knows."""

_INVERSE = (
    (aten.view_as_complex.default, aten.view_as_real.default),
    (aten.view_as_real.default, aten.view_as_complex.default),
)
"""Views of which the second undoes the first."""

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
"""What `aten.complex` makes of two real tensors."""

_OWN_NAMESPACES = ("aten", "prims", "inductor", "mkldnn", "onednn", "quantized", "fxpasses")
"""Those of operators that inductor or this package knows."""

_CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)


def patches(
    given: Mapping[str, Any], *, kept_weights: bool = False, free_results: bool = False
) -> dict[str, Any]:
    """Inductor's settings with the pass among those on the joint graph.

    Args:
        given: the settings so far.
        kept_weights: whether the graph reads kept weights, as `keep_eagers_memory` has it.
        free_results: whether results may have other strides than eager's, as far as `boundary` allows.
    """
    key = (__name__, sidecar.sources(), kept_weights, free_results)

    def run(graph: Graph) -> None:
        free = boundary.free_results(graph) if free_results else frozenset()
        positions = boundary.free_positions(graph, free)
        keep_eagers_memory(graph, kept_weights, free)
        record_result_strides(graph, positions)

    return with_joint_pass(given, run, lambda: key)


def keep_eagers_memory(graph: Graph, kept_weights: bool = False, free: Collection[Node] = ()) -> None:
    """Has every reader of memory in inductor's joint graph find eager's strides, offsets and storage.

    Args:
        graph: its metadata has the strides of the traced graph; it is changed in place.
        kept_weights: whether convolutions may read weights of another layout than eager's, or become kernels
            that write another. Inductor then finds other strides than eager's wherever it looks.
        free: results that may lie in memory as they come.
    """
    if kept_weights:
        read_kept_weights(graph)
    keeper = _Keeper(graph, kept_weights, free)
    for node in list(graph.nodes):
        keeper.visit(node)
    keeper.erase_replaced()


def read_kept_weights(graph: Graph) -> None:
    """Has convolutions in inductor's graph read kept weights as they lie, where they read a contiguous copy.

    The metadata of what follows stays eager's.
    """
    for copy in graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default):
        kept = copy.args[0]
        if not (isinstance(kept, Node) and kept.op == "placeholder" and tensor(kept) is not None):
            continue
        readers = list(copy.users)
        convolution = torch.ops.aten.convolution.default
        if all(reader.target is convolution and reader.args[1] is copy for reader in readers):
            for reader in readers:
                reader.replace_input_with(copy, kept)
            graph.erase_node(copy)


class _Keeper:
    def __init__(self, graph: Graph, everywhere: bool, free: Collection[Node]) -> None:
        """Args:
        graph: to be changed.
        everywhere: whether operands that are no views are settled too.
        free: results that are not.
        """
        self._free = frozenset(free)
        self._graph = graph
        self._everywhere = everywhere
        self._movable: set[Node] = set()
        self._gradients: set[Node] = set()
        self._settled: dict[Node, Node] = {}
        self._replayed: dict[Node, Node] = {}

    def visit(self, node: Node) -> None:
        """Settles what a node reads, if it reads memory; the graph is visited in program order."""
        if node.op == "placeholder" and node.name.startswith("tangents"):
            self._gradients.add(node)
        read = node.all_input_nodes
        if node.op != "output" and not self._gradients.isdisjoint(read):
            self._gradients.add(node)
        if node.target in _CONVOLUTIONS or not self._movable.isdisjoint(read):
            self._movable.add(node)
        if node.op == "output":
            # Gradients are left as they are: autograd gives a parameter's the strides of the parameter.
            left = self._gradients | self._free
            self._settle(node, [operand for operand in read if operand not in left])
        elif node.target is aten.as_strided.default and is_view(node.args[0]):
            self._stride_base(node)
        elif _reads_memory(node):
            self._settle(node, read)
        elif _follows_memory(node):
            self._settle(node, read, bare=True)
            if node.target is torch.ops.prims.convert_element_type.default and node in self._movable:
                self._make_complex(node)

    def erase_replaced(self) -> None:
        """Erases the views that nobody reads any more."""
        views = {*self._replayed, *self._replayed.values()}
        for node in reversed(list(self._graph.nodes)):
            if not node.users and node in views:
                self._graph.erase_node(node)

    def _settle(self, reader: Node, operands: list[Node], *, bare: bool = False) -> None:
        """Has a reader find its operands in eager's memory: views of others, or (`bare`) all of them."""
        for operand in operands:
            base = base_of(operand)
            if base in self._movable and (bare or self._everywhere or base is not operand):
                reader.replace_input_with(operand, self._replay(operand))

    def _make_complex(self, node: Node) -> None:
        """Writes a conversion to complex numbers as an operator that follows its operand in memory.

        Inductor would convert into a contiguous tensor. The operator keeps the width of its operand, so that
        other conversions are left as they are.
        """
        (real, *_), found, made_of = node.all_input_nodes, tensor(node.args[0]), tensor(node)
        if found is None or made_of is None or made_of.dtype != _COMPLEX.get(found.dtype):
            return
        with self._graph.inserting_before(node):
            options: dict[str, Any] = {"dtype": found.dtype, "device": found.device, "pin_memory": False}
            zero = self._graph.call_function(aten.full.default, ([], 0), options)
            made = self._graph.call_function(aten.complex.default, (real, zero))
        set_value(zero, found.new_empty(()))
        inherit(made, (node,), "eagers_memory")
        node.replace_all_uses_with(made)
        self._graph.erase_node(node)
        self._movable.add(made)

    def _stride_base(self, node: Node) -> None:
        """Writes `as_strided` over a view as one over the tensor that is viewed."""
        operand = node.args[0]
        assert isinstance(operand, Node)
        base = base_of(operand)
        seen, held = tensor(operand), tensor(base)
        if seen is None or held is None or seen.dtype != held.dtype:
            self._settle(node, [operand])
            return
        _, size, stride, *rest = node.args
        offset = rest[0] if rest else node.kwargs.get("storage_offset")
        offset = seen.storage_offset() if offset is None else offset
        if isinstance(offset, (int, Node)):
            node.args, node.kwargs = (self._settle_base(base), size, stride, offset), {}
        else:
            self._settle(node, [operand])

    def _replay(self, node: Node) -> Node:
        """The same view of the tensor in eager's memory."""
        if not is_view(node):
            return self._settle_base(node)
        if node not in self._replayed:
            above = viewed(node)
            twin = self._replay(above)
            if twin is above:
                return node
            if (twin.target, node.target) in _INVERSE:
                # What inductor makes complex it copies contiguous first.
                return viewed(twin)
            twins = {above: twin}
            with self._graph.inserting_after(max(node, twin)):
                self._replayed[node] = self._graph.node_copy(
                    node, lambda operand: twins.get(operand, operand)
                )
        return self._replayed[node]

    def _settle_base(self, node: Node) -> Node:
        """A tensor that is no view, in the memory order of the traced graph."""
        found = tensor(node)
        if node not in self._movable or found is None or found.dtype.is_complex or found.dim() < 2:
            return node
        order = memory_order(found)
        if order is None:
            return node
        if node not in self._settled:
            static = all(type(stride) is int for stride in found.stride())
            force = force_stride_order() if static else force_strides()
            with self._graph.inserting_after(node):
                settled = self._graph.call_function(force, (node, []))
            with self._graph.inserting_before(settled):
                strides = self._strides(node, found, order)
            settled.args = (node, strides)
            set_value(settled, found)
            self._settled[node] = settled
        return self._settled[node]

    def _strides(self, node: Node, found: torch.Tensor, order: Sequence[int]) -> list[int | Node]:
        """A tensor's strides; where they are symbols, computed in the graph from its sizes."""
        if all(type(stride) is int for stride in found.stride()):
            return list(found.stride())
        strides: list[int | Node] = [1] * found.dim()
        reach: int | Node = 1
        *outer, innermost = order
        for axis, inside in zip(reversed(outer), [innermost, *reversed(outer)], strict=False):
            size: int | torch.SymInt | Node = found.shape[inside]
            if not isinstance(size, int):
                symbol = self._graph.call_function(aten.sym_size.int, (node, inside))
                set_value(symbol, size)
                size = symbol
            reach = strides[axis] = self._product(reach, size)
        return strides

    def _product(self, first: int | Node, second: int | Node) -> int | Node:
        if first == 1 or second == 1:
            return second if first == 1 else first
        if isinstance(first, int) and isinstance(second, int):
            return first * second
        product = self._graph.call_function(operator.mul, (first, second))
        values = [value(factor) if isinstance(factor, Node) else factor for factor in (first, second)]
        set_value(product, values[0] * values[1])
        return product


def _reads_memory(node: Node) -> bool:
    """Whether an operator may look at the strides, the offset or the storage of what it reads."""
    target = node.target
    if isinstance(target, HigherOrderOperator):
        return True
    if not isinstance(target, OpOverload):
        return False
    if target in _BY_STORAGE:
        return not is_same_pixel(node)
    namespace = operator_name(target).partition("::")[0]
    return namespace not in _OWN_NAMESPACES and layout_tag(target) != "flexible_layout"


def _follows_memory(node: Node) -> bool:
    """Whether an operator of ATen gives other numbers, or other strides, for another order in memory."""
    target = node.target
    if target is aten.view.dtype:
        return True  # elements of another width want a dense last axis
    if not isinstance(target, OpOverload) or is_view(node):
        return False
    if torch.Tag.nondeterministic_seeded in target.tags:
        return True
    operands = [tensor(operand) for operand in node.all_input_nodes]
    results = [leaf for leaf in tree_leaves(value(node)) if isinstance(leaf, torch.Tensor)]
    return any(found is not None and found.dtype.is_complex for found in (*operands, *results))
