"""Entering operators in a network: as labelled, exact or part of a tuple, with what they read and make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch.fx import Node

from fxpasses.graph.context import Executor, GraphContext
from fxpasses.graph.frames import Frame, agree, plain
from fxpasses.graph.layouts import C, L, order_of
from fxpasses.graph.metadata import tensor, value
from fxpasses.graph.storage import may_write
from fxpasses.passes.layout.costs import CostModel
from fxpasses.passes.layout.framing import common_frame
from fxpasses.passes.layout.labels import Kind, is_generated, kind_of
from fxpasses.passes.layout.measurable import operator_of
from fxpasses.passes.layout.network import Network, Priced, Role, Tensor, fitting
from fxpasses.passes.layout.prices import price_copies, price_reading
from fxpasses.passes.layout.problem import FIXED_C, FIXED_L
from fxpasses.torch_internals.pytree import tree_leaves


class Entries:
    """What was entered of a graph, and how.

    Attributes:
        network: the graph as a problem, as far as it was read.
    """

    def __init__(self, context: GraphContext, costs: CostModel, executor: Executor) -> None:
        self.network = Network(generates=costs.generates)
        self._context = context
        self._costs = costs
        self._fused = executor == "fused"
        self._is_compiled_here = self._fused and not costs.generates
        # Over a graph that is run as it is: what a compiler gets has its gradients in it.
        self._autograd_follows = not self._fused and context.initial_modes.grad
        self._nodes = (next(iter(context.graph.nodes)), context.graph.output_node())
        self._has_writes = any(map(may_write, context.graph.nodes))
        self._borrowed: set[Node] = set()
        # What is taken for images since nobody says what its dimensions are.
        self._guessed: set[Node] = set()

    def _labelled_at_a_price(
        self, node: Node, operands: list[Node], dtype: torch.dtype, frame: Frame | None = None
    ) -> bool:
        """Enters an operator that moves data, with what that costs in either layout."""
        if not self._labelled(node, operands, frame):
            return False
        # What is measured is an operator on images, not on views of them.
        is_measured = self._plain_frames(operands)
        measurable = (
            partial(operator_of, node, dtype) if is_measured and not self.network.generates else tuple
        )
        price = partial(self._costs.operator, node, dtype, as_measured=is_measured)
        self._price(node, Priced(price, measurable))
        return True

    def _price(self, node: Node, priced: Priced) -> None:
        if node in self.network.variables:
            self.network.price(node, priced)

    def _labelled(self, node: Node, operands: list[Node], frame: Frame | None = None) -> bool:
        """Enters a labelled operator, or a free one where neither operands nor results have a label."""
        results = [leaf for leaf in tree_leaves(value(node)) if isinstance(leaf, torch.Tensor)]
        aside: set[Node] = set()
        movable = self._movable(node, operands)
        if operands and frame is None:
            found = self._common_frame(movable, results)
            if found is None:
                return False
            frame, aside = found
        if any(order_of(result, fitting(frame, result)) == "other" for result in results):
            return False
        if not operands and all(order_of(result, fitting(frame, result)) == "both" for result in results):
            self.network.roles[node] = Role.FREE
            return True
        variable = self.network.variable()
        self.network.roles[node] = Role.LABELLED
        self.network.variables[node] = variable
        kind = kind_of(node)
        if self._is_compiled_here and is_generated(node):
            self.network.flexible.add(node)
        left = [operand for operand in operands if operand not in movable]
        self.network.aside.update((node, operand) for operand in (*aside, *left))
        if left and frame is not None:
            tensors = [self.network.tensors[operand] for operand in left]
            self._price(node, Priced(partial(price_reading, tensors, frame, self._costs), tuple))
        for operand in [operand for operand in movable if operand not in aside]:
            self._use(operand, node, variable)
            if kind not in (Kind.PREFERRING, Kind.COSTED, Kind.REDUCING) and self._is_written(operand):
                self.network.unify(variable, self.network.tensors[operand].producer)
        self._make(node, variable, frame)
        if kind not in (Kind.PREFERRING, Kind.COSTED) and self._guessed.issuperset(operands):
            self._guessed.add(node)
        return True

    def _movable(self, node: Node, operands: list[Node]) -> list[Node]:
        """The operands that are wanted in the layout of an operator; the others are read as they lie.

        A loop that inductor writes reads what was made in a given layout for what copying it would cost.
        """
        if not self._is_compiled_here or kind_of(node) is not Kind.AGNOSTIC or not is_generated(node):
            return operands
        found = [operand for operand in operands if not self._is_given(operand)]
        return found or operands

    def _is_given(self, operand: Node) -> bool:
        """Whether an operator makes its result in one layout, whatever is wanted."""
        producer = self.network.find(self.network.tensors[operand].producer)
        return operand.op.startswith("call") and producer in (FIXED_C, FIXED_L)

    def _common_frame(
        self, operands: Sequence[Node], results: Sequence[torch.Tensor]
    ) -> tuple[Frame, set[Node]] | None:
        """The frame of an operator and what it reads aside of that, as `common_frame` has it."""
        frames = {self.network.frames[operand] for operand in operands}
        rank = max((result.dim() for result in results), default=0)
        if len(frames) == 1 and len(next(iter(frames))) >= rank:
            return frames.pop(), set()
        given = [(self.network.frames[operand], tensor(operand)) for operand in operands]
        found = common_frame([(frame, held) for frame, held in given if held is not None], rank)
        if found is None:
            return None
        frame, is_aside = found
        return frame, {operand for operand, aside in zip(operands, is_aside, strict=True) if aside}

    def _exact(self, node: Node) -> None:
        self.network.roles[node] = Role.EXACT
        for operand in node.all_input_nodes:
            if operand in self.network.variables and tensor(operand) is None:
                self._keep_as_traced(operand)
            elif operand not in self.network.tensors and self._is_written(operand):
                self._keep_origins_as_traced(operand)
        for operand in self._labelled_operands(node):
            if node.op == "output" and operand in self.network.free:
                continue
            held = self.network.tensors[operand]
            self._use(operand, node, fixed(held.original))
            if self._is_written(operand):
                self.network.unify(held.producer, fixed(held.original))
        self._make_as_traced(node)

    def _keep_origins_as_traced(self, written: Node) -> None:
        """Has what a written view may be of lie as traced, since a copy would be written to in its place."""
        pending, seen = [written], set[Node]()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            held = self.network.tensors.get(node)
            if held is not None:
                self.network.unify(held.producer, fixed(held.original))
            if self._context.may_return_argument(node):
                pending += node.all_input_nodes

    def _keep_as_traced(self, whole: Node) -> None:
        """Has an operator that gives a tuple work in the traced layout: who reads it whole gets no copies."""
        frame = self.network.frames.get(whole)
        leaves = [leaf for leaf in tree_leaves(value(whole)) if isinstance(leaf, torch.Tensor)]
        for order in [order_of(leaf, fitting(frame, leaf)) for leaf in leaves]:
            if order in (C, L):
                self.network.unify(self.network.variables[whole], fixed(order))

    def _make_as_traced(self, node: Node) -> None:
        found = tensor(node)
        order = order_of(found) if found is not None else "both"
        if order in (C, L):
            self._make(node, fixed(order), None)
            if node.op.startswith("call"):
                self._guessed.add(node)

    def _give(self, node: Node) -> None:
        """Results have the strides of the traced graph, but for those that may have others."""
        for operand in self._labelled_operands(node):
            if operand in self.network.boundary.free and self._plain_frames([operand]):
                self.network.free.add(operand)
        self._exact(node)

    def _project(self, node: Node) -> None:
        """An element of a tuple has the label that the tuple's maker works in."""
        (parent, *_) = node.all_input_nodes
        if self.network.roles.get(parent) is not Role.LABELLED:
            self._exact(node)
            return
        self.network.roles[node] = Role.LABELLED
        self.network.variables[node] = self.network.variables[parent]
        if parent in self.network.flexible:
            self.network.flexible.add(node)
        self._make(node, self.network.variables[parent], self.network.frames.get(parent))

    def _make(self, node: Node, producer: int, frame: Frame | None) -> None:
        found = tensor(node)
        if frame is not None and found is None:
            self.network.frames[node] = frame
        if found is None:
            return
        frame = fitting(frame, found)
        if frame is not None:
            self.network.frames[node] = frame
        order = order_of(found, frame)
        if order not in (C, L):
            return
        self.network.frames[node] = frame or plain(found.dim())
        held = Tensor(node, producer, order)
        price_copies(held, found, self._costs)
        self.network.tensors[node] = held

    def _use(self, operand: Node, user: Node, variable: int) -> None:
        self.network.tensors[operand].users.append((user, variable))

    def _labelled_operands(self, node: Node) -> list[Node]:
        return [operand for operand in node.all_input_nodes if operand in self.network.tensors]

    def _plain_frames(self, operands: Iterable[Node]) -> bool:
        """Whether all lie in memory as N, C, *spatial would."""
        for operand in operands:
            frame, found = self.network.frames[operand], tensor(operand)
            if found is None or len(frame) not in (4, 5):
                return False
            if not agree(frame, plain(len(frame)), found.shape):
                return False
        return True

    def _is_written(self, node: Node) -> bool:
        return self._has_writes and self._context.written_between([node], *self._nodes) is not None


def fixed(label: str) -> int:
    return FIXED_C if label == C else FIXED_L
