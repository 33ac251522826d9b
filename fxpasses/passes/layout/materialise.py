"""Carrying a plan out: copies are inserted, and every operator's metadata follows.

The graph is walked once in program order. A labelled operator gets each operand in its label; an exact one
gets each operand with the strides of the traced graph; outputs get those strides to the letter. Whether a
copy is needed is read off the strides that the operators really give (their fake kernels tell), not off the
plan: where an operator does not follow its operands, its result is copied, and the graph stays right.
A copy is made before its first reader and shared by all of them, unless its source is written to in between.
Autograd gives the gradient of a copy the strides that the copy has. Where it will run over the graph, inputs
that require grad are read through a view whose gradient has the strides of the input.
Whatever goes wrong on the way, the graph is put back as it was.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.layouts import Frame, Label, is_one, memory_format, order_of, to_channels_last
from fxpasses.graph.levels import Level, called_by
from fxpasses.graph.metadata import set_value, tensor, value
from fxpasses.graph.names import base_name
from fxpasses.passes.layout.assign import Assignment
from fxpasses.passes.layout.labels import INDEXING, Kind, kind_of
from fxpasses.passes.layout.network import Role, product_operands
from fxpasses.torch_internals.fake_tensors import FakeTensor, without_fake_tensors
from fxpasses.torch_internals.inductor import REALIZE_TO_STRIDES
from fxpasses.torch_internals.sizes import size_expression

aten = torch.ops.aten

_COPIES = (torch.clone, aten.clone.default, aten.copy.default, aten.copy_.default)

_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "seq_nr", "partitioner_tag")


class NotMaterialisedError(Exception):
    """Why a plan could not be carried out; the graph is as it was."""


@dataclass(frozen=True)
class Carried:
    """What carrying out a plan did.

    Attributes:
        copies: how many copies were inserted.
        repairs: how many of them because an operator did not follow its operands.
    """

    copies: int
    repairs: int


def materialise(context: GraphContext, assignment: Assignment) -> Carried:
    """Rewrites the graph of `context` so that its tensors have the plan's labels.

    Raises:
        NotMaterialisedError: it cannot be done; the graph is as it was.
    """
    carrier = _Carrier(context, assignment)
    try:
        with _without_guards(context), without_fake_tensors():
            carrier.run()
            carrier.check()
    except Exception as error:
        carrier.undo()
        if isinstance(error, NotMaterialisedError):
            raise
        raise NotMaterialisedError(f"{type(error).__name__}: {error}") from error
    carrier.erase_replaced()
    return Carried(sum(node.target in _COPIES for node in carrier.inserted), carrier.repairs)


@contextlib.contextmanager
def _without_guards(context: GraphContext) -> Iterator[None]:
    """Comparing symbolic strides must not specialise the program."""
    for node in context.graph.find_nodes(op="placeholder"):
        found = tensor(node)
        environment = found.fake_mode.shape_env if isinstance(found, FakeTensor) else None
        if environment is not None:
            with environment.suppress_guards():
                yield
            return
    yield


@dataclass
class _Carrier:
    context: GraphContext
    assignment: Assignment
    inserted: list[Node] = field(default_factory=list)
    repairs: int = 0
    _latest: dict[Node, Node] = field(default_factory=dict)
    _copies: dict[tuple[Node, Label], Node] = field(default_factory=dict)
    _traced: dict[Node, Any] = field(default_factory=dict)
    _inputs: list[tuple[Node, Node, Node]] = field(default_factory=list)
    _renamed: list[tuple[Node, str]] = field(default_factory=list)
    _replaced: list[Node] = field(default_factory=list)
    _settled: list[Node] = field(default_factory=list)
    _contiguous: set[Node] = field(default_factory=set)

    def run(self) -> None:
        if self.context.executor == "eager" and self.context.initial_modes.grad:
            self._restore_gradients()
        for node in list(self.context.graph.nodes):
            role = self.assignment.network.roles.get(node)
            if node.op == "output":
                self._restore_outputs(node)
            elif role is Role.LABELLED:
                self._label(node)
            elif role is not None and node.op.startswith("call"):
                self._keep(node, role)
        if self.assignment.network.generates:
            self._settle_concatenations()

    def check(self) -> None:
        """Raises where a convolution is read that a matrix product has replaced."""
        for node in self._replaced:
            if node.users:
                raise NotMaterialisedError(f"{node} is still read by {', '.join(map(str, node.users))}")

    def erase_replaced(self) -> None:
        for node in self._replaced:
            self.context.graph.erase_node(node)

    def undo(self) -> None:
        for node, old, new in reversed(self._inputs):
            node.replace_input_with(new, old)
        for node, found in self._traced.items():
            set_value(node, found, like=node)
        for node in reversed(self.inserted):
            self.context.graph.erase_node(node)
        for old, name in self._renamed:
            old.name = name
        for node in self._settled:
            del node.meta[REALIZE_TO_STRIDES]

    def _settle_concatenations(self) -> None:
        """Has inductor concatenate channels-last what the plan wants so.

        It lays a concatenation out like the operands whose strides are settled by then, and contiguous where
        none are; then a kernel that gathers from one layout into the other is five times slower on a GPU. A
        convolution settles what it makes and what it reads. Where there is none, an operand that others read
        as well, which lies in memory of its own anyway, is settled.
        """
        for node in self.context.graph.nodes:
            found = tensor(node)
            if base_name(node) != "cat" or found is None or order_of(found) != "channels_last":
                continue
            operands = [each for each in node.all_input_nodes if tensor(each) is not None]
            if any(_is_settled(each, node) for each in operands):
                continue
            for each in operands:
                held = tensor(each)
                is_shared = each.op == "call_function" and len(each.users) > 1
                if is_shared and held is not None and order_of(held) == "channels_last":
                    self._settle(each)
                    break

    def _settle(self, node: Node) -> None:
        """Has inductor put a result into memory as its metadata says, and not compute it where it is read.

        What an operator that indexes reads would else lie as whatever it was computed from lies, whether
        there is a copy in between or not, and the kernel would walk the other layout.
        """
        found = tensor(node)
        computed = node.op == "call_function" and found is not None and found.dim() in (4, 5)
        if computed and REALIZE_TO_STRIDES not in node.meta:
            node.meta[REALIZE_TO_STRIDES] = True
            self._settled.append(node)

    def _restore_gradients(self) -> None:
        """Has the inputs that require grad read through a view that restores the strides of the gradient."""
        placeholders = list(self.context.graph.find_nodes(op="placeholder"))
        for node in (*placeholders, *self.context.graph.find_nodes(op="get_attr")):
            found = tensor(node)
            if found is None or found.dim() not in (4, 5) or not self.context.requires_grad(node):
                continue
            if not self.context.is_written(node):
                before = (placeholders[-1] if node.op == "placeholder" else node).next
                label: Label = "channels_last" if order_of(found) == "channels_last" else "contiguous"
                self._latest[node] = self._through_rows(node, label, before)

    def _through_rows(self, source: Node, label: Label, before: Node) -> Node:
        """The same tensor, seen as one row in between: a gradient of other strides cannot, and is copied."""
        found = tensor(source)
        assert found is not None
        there, back = list(to_channels_last(found.dim())), [0, found.dim() - 1, *range(1, found.dim() - 1)]
        if not (found if label == "contiguous" else found.permute(there)).is_contiguous():
            return source
        if label == "channels_last":
            source = self._insert(aten.permute.default, (source, there), {}, before)
        row = self._insert(aten.view.default, (source, [-1]), {}, before)
        made = tensor(source)
        assert made is not None
        if all(isinstance(each, int) for each in made.shape):
            same = self._insert(aten.view.default, (row, list(made.shape)), {}, before)
        else:
            same = self._insert(aten.view_as.default, (row, source), {}, before)
        return same if label == "contiguous" else self._insert(aten.permute.default, (same, back), {}, before)

    def _label(self, node: Node) -> None:
        label = self.assignment.label(node)
        changed = node.target is operator.getitem
        for operand in list(node.all_input_nodes):
            changed |= self._replace(node, operand, self._in_label(operand, label, node))
            changed |= operand in self._traced
        if changed:
            self._recompute(node)
        if self.assignment.is_product(node):
            self._multiply(node)
            return
        found, frame = tensor(node), self.assignment.network.frames.get(node)
        if found is not None and order_of(found, _fitting(frame, found)) not in (label, "both"):
            self.repairs += 1
            self._latest[node] = self._copy(node, label, node.next)

    def _multiply(self, node: Node) -> None:
        """A 1x1 convolution over channels-last tensors, as the matrix product of [N·H·W, C] and [C, K]."""
        operands, made = product_operands(node), tensor(node)
        if operands is None or made is None:
            raise NotMaterialisedError(f"{node} cannot be written as a matrix product")
        image, weight, bias = operands
        rank, (channels, features) = made.dim(), tensor(weight).shape[1::-1]  # type: ignore[union-attr]
        there, back = list(to_channels_last(rank)), [0, rank - 1, *range(1, rank - 1)]
        before = node.next
        rows = self._insert(aten.permute.default, (image, there), {}, before, node)
        rows = self._insert(aten.reshape.default, (rows, [-1, channels]), {}, before, node)
        matrix = self._insert(aten.reshape.default, (weight, [features, channels]), {}, before, node)
        matrix = self._insert(aten.permute.default, (matrix, [1, 0]), {}, before, node)
        if bias is None:
            product = self._insert(aten.mm.default, (rows, matrix), {}, before, node)
        else:
            product = self._insert(aten.addmm.default, (bias, rows, matrix), {}, before, node)
        sizes = [made.shape[d] for d in there]
        result = self._insert(aten.reshape.default, (product, sizes), {}, before, node)
        self._latest[node] = self._insert(aten.permute.default, (result, back), {}, before, node)
        self._replaced.append(node)

    def _keep(self, node: Node, role: Role) -> None:
        for operand in list(node.all_input_nodes):
            latest = self._latest.get(operand, operand)
            wanted = self._restored(operand, node) if role is Role.EXACT else latest
            self._replace(node, operand, wanted)
            indexes = self.assignment.network.generates and base_name(node) in INDEXING
            if indexes and self._may_walk_channels_last(wanted):
                self._settle(wanted)

    def _may_walk_channels_last(self, node: Node) -> bool:
        """Whether code that computes a result where it is read may read a channels-last tensor for it."""
        pending, seen = [node], set[Node]()
        while pending:
            each = pending.pop()
            if each in seen or each in self._contiguous:
                continue
            seen.add(each)
            found = tensor(each)
            if found is not None and order_of(found) == "channels_last":
                return True
            if each.op == "call_function" and kind_of(each) is not Kind.PREFERRING:
                pending += each.all_input_nodes
        self._contiguous |= seen
        return False

    def _restore_outputs(self, node: Node) -> None:
        for operand in list(node.all_input_nodes):
            if operand.op in ("placeholder", "get_attr"):
                continue
            restored = self._restored(operand, node)
            before, after = self._strides_traced(operand), tensor(restored)
            if before is not None and after is not None and self._may_differ(operand, before, after):
                restored = self._view_as_traced(restored, before, node)
            if self._replace(node, operand, restored):
                self._hand_name_on(operand, restored)

    def _may_differ(self, operand: Node, before: torch.Tensor, after: torch.Tensor) -> bool:
        """Whether a result's strides may be others than the traced ones, dimensions of size 1 included.

        Those of a tensor without a label mean nothing on the way, and are not followed through the graph.
        """
        unfollowed = (
            bool(self.inserted)
            and operand.op.startswith("call")
            and before.dim() in (4, 5)
            and any(map(is_one, before.shape))
        )
        return unfollowed or not _same(before.stride(), after.stride())

    def _hand_name_on(self, old: Node, new: Node) -> None:
        """An output keeps its name: an exported program's signature knows it by that."""
        if self.context.executor == "fused" or old.op == "placeholder":
            return
        name = old.name
        old._rename(f"{name}_before_copy")
        new.name = name
        self._renamed.append((old, name))

    # Operands.

    def _in_label(self, operand: Node, label: Label, reader: Node) -> Node:
        latest = self._latest.get(operand, operand)
        found, frame = tensor(latest), self.assignment.network.frames.get(operand)
        if operand not in self.assignment.network.tensors or found is None:
            return latest
        if order_of(found, frame) == label:
            return latest
        return self._shared_copy(operand, label, reader)

    def _restored(self, operand: Node, reader: Node) -> Node:
        """The operand with its traced strides; dimensions of size 1 do not count."""
        latest = self._latest.get(operand, operand)
        before, now = self._strides_traced(operand), tensor(latest)
        if before is None or now is None or _strides_agree(before, now):
            return latest
        held = self.assignment.network.tensors.get(operand)
        copy = latest if held is None else self._shared_copy(operand, held.original, reader)
        made = tensor(copy)
        if made is None or not _strides_agree(before, made):
            copy = self._strided_copy(latest, before, reader)
        return copy

    def _strides_traced(self, node: Node) -> torch.Tensor | None:
        found = self._traced.get(node, value(node))
        return found if isinstance(found, torch.Tensor) else None

    def _shared_copy(self, operand: Node, label: Label, reader: Node) -> Node:
        key = (operand, label)
        copy = self._copies.get(key)
        if copy is None or self.context.written_between([operand], copy.prev, reader) is not None:
            copy = self._copies[key] = self._copy(self._latest.get(operand, operand), label, reader, operand)
        return copy

    # Nodes.

    def _copy(self, source: Node, label: Label, before: Node, named: Node | None = None) -> Node:
        """A copy of `source` in the layout of `label`, put in front of `before`."""
        found = tensor(source)
        assert found is not None
        rank = found.dim()
        frame = self.assignment.network.frames.get(named or source, tuple(range(rank)))
        if frame == tuple(range(rank)):
            return self._clone(source, memory_format(label, rank), before)
        if label == "channels_last":
            return self._clone(source, torch.contiguous_format, before)
        there = [frame.index(d) for d in range(rank)]
        back = list(to_channels_last(rank))
        logical = self._insert(aten.permute.default, (source, there), {}, before)
        return self._insert(
            aten.permute.default, (self._clone(logical, torch.contiguous_format, before), back), {}, before
        )

    def _clone(self, source: Node, wanted: torch.memory_format, before: Node) -> Node:
        target = torch.clone if self.context.level is Level.TORCH else aten.clone.default
        return self._insert(target, (source,), {"memory_format": wanted}, before)

    def _strided_copy(self, source: Node, before: torch.Tensor, reader: Node) -> Node:
        """A copy with any strides, such as those of a slice."""
        sizes, strides = tuple(before.shape), tuple(before.stride())
        if not all(isinstance(each, int) for each in (*sizes, *strides)):
            raise NotMaterialisedError(f"the symbolic strides {strides} of {source} cannot be restored")
        options = {"dtype": before.dtype, "device": before.device}
        empty = self._insert(
            aten.empty_strided.default, (list(sizes), list(strides)), options, reader, source
        )
        # Autograd differentiates only the operator that writes.
        operator = aten.copy.default if self.context.executor == "fused" else aten.copy_.default
        copy = self._insert(operator, (empty, source), {}, reader, source)
        made = tensor(copy)
        if made is None or not _strides_agree(before, made):
            raise NotMaterialisedError(f"the strides {strides} of {source} cannot be restored")
        return copy

    def _view_as_traced(self, source: Node, before: torch.Tensor, reader: Node) -> Node:
        """The traced strides of dimensions of size 1, which mean nothing, for whoever compares them.

        A compiler may lay a tensor out in another order than metadata says and the operators allow, under
        which a view of given strides would be wrong; where no dimensions are left to be ordered it cannot.
        """
        is_static = all(isinstance(each, int) for each in (*before.shape, *before.stride()))
        if not is_static or (self.context.executor == "fused" and order_of(before) != "both"):
            self._remember(source)
            set_value(source, before, like=source)
            return source
        sizes, strides = list(before.shape), list(before.stride())
        return self._insert(aten.as_strided.default, (source, sizes, strides), {}, reader)

    def _insert(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        before: Node,
        like: Node | None = None,
    ) -> Node:
        source = like or args[0]
        with self.context.graph.inserting_before(before):
            node = self.context.graph.call_function(target, args, kwargs)
        self.inserted.append(node)
        node.meta.update({key: source.meta[key] for key in _KEPT_META if key in source.meta})
        set_value(node, self.context.evaluator.call(target, args, kwargs), like=source)
        return node

    def _replace(self, node: Node, old: Node, new: Node) -> bool:
        if old is new:
            return False
        node.replace_input_with(old, new)
        self._inputs.append((node, old, new))
        return True

    def _remember(self, node: Node) -> None:
        self._traced.setdefault(node, value(node))

    def _recompute(self, node: Node) -> None:
        self._remember(node)
        function, evaluator = _function(self.context, node), self.context.evaluator
        made = evaluator.laid_out_anew(function, node.args, node.kwargs, value(node))
        if made is None:
            made = evaluator.call(function, node.args, dict(node.kwargs))
        set_value(node, made, like=node)


def _is_settled(operand: Node, reader: Node) -> bool:
    """Whether inductor knows the strides of an operand for certain when it comes to the reader."""
    return (
        operand.op in ("placeholder", "get_attr")
        or REALIZE_TO_STRIDES in operand.meta
        or kind_of(operand) is Kind.PREFERRING
        or any(user < reader and kind_of(user) is Kind.PREFERRING for user in operand.users)
    )


def _function(context: GraphContext, node: Node) -> Callable[..., Any]:
    found = called_by(context.module, node)
    if not callable(found):
        raise NotMaterialisedError(f"{node} calls {found!r}")
    return found


def _fitting(frame: Frame | None, given: torch.Tensor) -> Frame | None:
    return frame if frame is not None and len(frame) == given.dim() else None


def _same(first: Any, second: Any) -> bool:
    pairs = zip(first, second, strict=True)
    return all(size_expression(a) == size_expression(b) for a, b in pairs)


def _strides_agree(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape lie in memory the same way."""
    if first.layout is not torch.strided or second.layout is not torch.strided:
        return first.layout == second.layout
    kept = [d for d, size in enumerate(first.shape) if not is_one(size)]
    return _same([first.stride(d) for d in kept], [second.stride(d) for d in kept])
