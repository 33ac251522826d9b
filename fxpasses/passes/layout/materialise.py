"""Carrying a plan out: copies are inserted, and every operator's metadata follows.

    input ── conv2d ── relu ── output              the traced graph, contiguous

    input ── clone ── conv2d ── relu ── clone ── output
               L        L        L        C        the plan, carried out: two copies, none in between

The graph is walked once in program order. A labelled operator gets each operand in its label; an exact one
gets each operand with the strides of the traced graph; outputs get those strides to the letter, unless they
are free (`fxpasses.passes.layout.boundary`). Whether a copy is needed is read off the strides that the
operators really give (their fake kernels tell), not off the plan: where an operator does not follow its
operands, its result is copied, and the graph stays right. A loop that inductor writes gives what its readers
want, so that only its metadata are set: inductor copies by itself where a kernel needs another order.
A copy is made before its first reader and shared by all of them, unless its source is written to in between.
Autograd gives the gradient of a copy the strides that the copy has. Where it will run over the graph, inputs
that require grad are read through a view whose gradient has the strides of the input.
Whatever goes wrong on the way, the graph is put back as it was.
"""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.frames import is_one, plain
from fxpasses.graph.layouts import Label, memory_format, order_in_memory, order_of
from fxpasses.graph.metadata import tensor, value
from fxpasses.graph.names import base_name
from fxpasses.graph.storage import is_part_of_tuple
from fxpasses.passes.layout.assign import Assignment, device_of
from fxpasses.passes.layout.causes import REPAIR, Cause, Causes
from fxpasses.passes.layout.copies import (
    COPIES,
    copy_of,
    is_overlapping,
    is_static,
    matrix_product,
    same,
    strided_copy,
    strides_agree,
    through_rows,
    view_as_traced,
)
from fxpasses.passes.layout.edits import Edits, NotMaterialisedError, UnrestorableError
from fxpasses.passes.layout.framing import VIEWS
from fxpasses.passes.layout.labels import FOLLOWING, INDEXING, Kind, kind_of
from fxpasses.passes.layout.lines import is_line
from fxpasses.passes.layout.network import Role, fitting
from fxpasses.passes.layout.settling import Settling
from fxpasses.torch_internals.fake_tensors import FakeTensor, without_fake_tensors
from fxpasses.torch_internals.pytree import tree_leaves
from fxpasses.torch_internals.tensors import suggest_memory_format


@dataclass(frozen=True)
class Carried:
    """What carrying out a plan did.

    Attributes:
        copies: how many copies were inserted.
        repairs: how many of them because an operator did not follow its operands.
        causes: how many there are for whose sake.
        forcing: how many of them each operator that forces causes, by its name.
    """

    copies: int
    repairs: int
    causes: Mapping[str, int]
    forcing: Mapping[str, int]


def materialise(context: GraphContext, assignment: Assignment) -> Carried:
    """Rewrites the graph of `context` so that its tensors have the plan's labels.

    Raises:
        UnrestorableError: tensors must keep the layout that they were traced with; the graph is as it was.
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
    copies = sum(node.target in COPIES for node in carrier.edits.inserted) - carrier.moved
    causes = carrier.causes
    forcing = Counter(cause.forcing.name for cause in causes.elements() if cause.forcing is not None)
    by_name = Counter(cause.name for cause in causes.elements())
    return Carried(copies, causes[REPAIR], by_name, forcing)


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


def _is_channels_last(found: torch.Tensor) -> bool:
    """Whether kernels take a tensor for channels-last: by strides of dimensions of size 1 if by no others."""
    order = order_of(found)
    if order == "both" and is_static(found):
        return suggest_memory_format(found) is memory_format("channels_last", found.dim())
    return order == "channels_last"


class _Carrier:
    def __init__(self, context: GraphContext, assignment: Assignment) -> None:
        self.assignment = assignment
        self.edits = Edits(context)
        self.causes: Counter[Cause] = Counter()
        self.moved = 0
        self.unrestorable: dict[Node, str] = {}
        self._context = context
        self._has_lines = any(map(is_line, context.graph.nodes))
        self._why = Causes(assignment.network)
        self._settling = Settling(context.graph)
        self._latest: dict[Node, Node] = {}
        self._copies: dict[tuple[Node, Label], Node] = {}
        self._replaced: list[Node] = []

    def run(self) -> None:
        if self._context.executor == "eager" and self._context.initial_modes.grad:
            self._restore_gradients()
        for node in list(self._context.graph.nodes):
            role = self.assignment.network.roles.get(node)
            if node.op == "output":
                self._restore_outputs(node)
            elif role is Role.LABELLED:
                self._label(node)
            elif role is not None and node.op.startswith("call"):
                self._keep(node, role)
        if self.assignment.network.generates:
            self._settling.settle_concatenations()

    def check(self) -> None:
        """Raises where strides are not restored, or an operator is read that another has replaced."""
        if self.unrestorable:
            raise UnrestorableError(self.unrestorable)
        for node in self._replaced:
            if node.users:
                raise NotMaterialisedError(f"{node} is still read by {', '.join(map(str, node.users))}")

    def erase_replaced(self) -> None:
        for node in self._replaced:
            self._context.graph.erase_node(node)

    def undo(self) -> None:
        """Puts the graph back as it was."""
        self.edits.undo()
        self._settling.undo()

    def _restore_gradients(self) -> None:
        """Has the inputs that require grad read through a view that restores the strides of the gradient."""
        placeholders = list(self._context.graph.find_nodes(op="placeholder"))
        for node in (*placeholders, *self._context.graph.find_nodes(op="get_attr")):
            found = tensor(node)
            if found is None or found.dim() not in (4, 5) or not self._context.requires_grad(node):
                continue
            if not self._context.is_written(node):
                before = (placeholders[-1] if node.op == "placeholder" else node).next
                label: Label = "channels_last" if _is_channels_last(found) else "contiguous"
                self._latest[node] = through_rows(self.edits, node, label, before)

    def _label(self, node: Node) -> None:
        label = self.assignment.label(node)
        changed = is_part_of_tuple(node)
        for operand in list(node.all_input_nodes):
            changed |= self.edits.replace(node, operand, self._in_label(operand, label, node))
            changed |= self.edits.is_recomputed(operand)
        if changed:
            self.edits.recompute(node)
        if node in self.assignment.network.anew and not self._lies(node, label):
            self._latest[node] = self._copy(node.all_input_nodes[0], label, node.next, node)
            self._replaced.append(node)
            self.moved += 1
            return
        if self.assignment.is_product(node):
            self._latest[node] = matrix_product(self.edits, node)
            self._replaced.append(node)
            return
        if self._gives(node, label) and not self._lies(node, label):
            self._lay_out(node, label)
        if not self._lies(node, label):
            self.causes[REPAIR] += 1
            self._latest[node] = self._copy(node, label, node.next)

    def _lies(self, node: Node, label: Label) -> bool:
        """Whether what an operator makes lies in memory as a label says, or has no label."""
        found, frame = tensor(node), self.assignment.network.frames.get(node)
        return found is None or order_of(found, fitting(frame, found)) in (label, "both")

    def _gives(self, node: Node, label: Label) -> bool:
        """Whether an operator is known to give a label, whatever torch's metadata say."""
        if node in self.assignment.network.flexible:
            return True
        is_eager_on_cpu = self._context.executor == "eager" and device_of(self._context).type == "cpu"
        return label == "channels_last" and base_name(node) in FOLLOWING and is_eager_on_cpu

    def _lay_out(self, node: Node, label: Label) -> None:
        found, frame = tensor(node), self.assignment.network.frames.get(node)
        assert found is not None, "what lies in no layout is a tensor"
        self.edits.lay_out(node, order_in_memory(fitting(frame, found) or plain(found.dim()), label))

    def _keep(self, node: Node, role: Role) -> None:
        changed = False
        for operand in list(node.all_input_nodes):
            latest = self._latest.get(operand, operand)
            wanted = self._restored(operand, node) if role is Role.EXACT else latest
            changed |= self.edits.replace(node, operand, wanted) or self.edits.is_recomputed(operand)
            indexes = self.assignment.network.generates and base_name(node) in INDEXING
            if indexes and self._settling.may_walk_channels_last(wanted):
                self._settling.settle(wanted)
        if changed and (is_part_of_tuple(node) or (role is Role.FREE and self._follows(node))):
            self.edits.recompute(node)

    def _follows(self, node: Node) -> bool:
        """Whether the strides of a result that has no label may follow those of what is read."""
        if kind_of(node) is Kind.EXPANDING:
            return True
        is_run = self._context.executor == "eager" and kind_of(node) is not Kind.MEASURING
        return is_run and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value(node)))

    def _counts_ones(self, found: torch.Tensor) -> bool:
        """Whether kernels are run that choose a layout by the strides of dimensions of size 1 alone."""
        is_eager = self._context.executor == "eager" and found.dim() in (4, 5) and is_static(found)
        return is_eager and any(map(is_one, found.shape)) and order_of(found) == "both"

    def _restore_outputs(self, node: Node) -> None:
        for operand in list(node.all_input_nodes):
            if operand.op in ("placeholder", "get_attr"):
                continue
            if self._is_given_as_planned(operand):
                given = self._latest.get(operand, operand)
            else:
                given = self._as_traced(operand, node)
            if self.edits.replace(node, operand, given):
                self.edits.hand_name_on(operand, given)

    def _as_traced(self, operand: Node, reader: Node) -> Node:
        """A result with its traced strides, to the letter."""
        restored = self._restored(operand, reader)
        before, after = self.edits.traced(operand), tensor(restored)
        if before is not None and after is not None and self._may_differ(operand, before, after):
            return view_as_traced(self.edits, restored, before, reader)
        return restored

    def _is_given_as_planned(self, operand: Node) -> bool:
        """Whether a result may have the plan's strides, and these are others than the traced ones."""
        if operand not in self.assignment.network.free:
            return False
        before, now = self.edits.traced(operand), tensor(self._latest.get(operand, operand))
        if before is None or now is None or strides_agree(before, now):
            return False
        return order_of(now) == self.assignment.made(self.assignment.network.tensors[operand])

    def _may_differ(self, operand: Node, before: torch.Tensor, after: torch.Tensor) -> bool:
        """Whether a result's strides may be others than the traced ones, dimensions of size 1 included.

        Those of a tensor without a label mean nothing on the way, and are not followed through the graph.
        """
        unfollowed = (
            (bool(self.edits.inserted) or self._has_lines)
            and operand.op.startswith("call")
            and before.dim() in (3 if self._has_lines else 4, 4, 5)
            and any(map(is_one, before.shape))
        )
        return unfollowed or not same(before.stride(), after.stride())

    # Operands.

    def _in_label(self, operand: Node, label: Label, reader: Node) -> Node:
        latest = self._latest.get(operand, operand)
        found, frame = tensor(latest), self.assignment.network.frames.get(operand)
        network = self.assignment.network
        if operand not in network.tensors or found is None or (reader, operand) in network.aside:
            return latest
        if order_of(found, frame) == label:
            return latest
        return self._shared_copy(operand, label, reader)

    def _restored(self, operand: Node, reader: Node) -> Node:
        """The operand with its traced strides; dimensions of size 1 do not count for a compiler."""
        latest = self._latest.get(operand, operand)
        before, now = self.edits.traced(operand), tensor(latest)
        if before is None or now is None:
            return latest
        if strides_agree(before, now):
            is_seen = reader.op != "output" and self._counts_ones(before) and is_static(now)
            is_other = is_seen and before.stride() != now.stride()
            return view_as_traced(self.edits, latest, before, reader) if is_other else latest
        held = self.assignment.network.tensors.get(operand)
        copy = latest if held is None else self._shared_copy(operand, held.original, reader)
        made = tensor(copy)
        if made is None or not strides_agree(before, made):
            is_copied = is_static(before) and not is_overlapping(before)
            seen = None if is_copied else self._viewed_again(operand, reader)
            if seen is not None:
                return seen
            try:
                copy = strided_copy(self.edits, latest, before, reader)
            except UnrestorableError as error:
                self.unrestorable[operand] = next(iter(error.nodes.values()))
                return copy
            self.causes[self._why.of(operand, reader)] += 1
        return copy

    def _viewed_again(self, view: Node, reader: Node) -> Node | None:
        """A view taken again of what it views, restored: an expanded one, or a slice of symbolic sizes."""
        source = view.args[0] if view.args else None
        is_element = view.target is operator.getitem and isinstance(source, Node) and tensor(source) is None
        maker = source if is_element else view
        if not isinstance(maker, Node) or kind_of(maker) not in VIEWS:
            return None
        above = maker.args[0] if maker.args else None
        if not isinstance(above, Node) or maker.op not in ("call_function", "call_method"):
            return None
        seen = self.edits.insert_again(maker, self._restored(above, reader), reader)
        if is_element:
            seen = self.edits.insert(operator.getitem, (seen, view.args[1]), {}, reader)
        before, made = self.edits.traced(view), tensor(seen)
        return seen if before is not None and made is not None and strides_agree(before, made) else None

    def _shared_copy(self, operand: Node, label: Label, reader: Node) -> Node:
        key = (operand, label)
        copy = self._copies.get(key)
        if copy is None or self._context.written_between([operand], copy.prev, reader) is not None:
            copy = self._copies[key] = self._copy(self._latest.get(operand, operand), label, reader, operand)
            self.causes[self._why.of(operand, reader)] += 1
        return copy

    def _copy(self, source: Node, label: Label, before: Node, named: Node | None = None) -> Node:
        """A copy of `source` in the frame of what it stands for."""
        return copy_of(self.edits, source, label, self.assignment.network.frames.get(named or source), before)
