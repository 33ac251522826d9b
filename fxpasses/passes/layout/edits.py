"""Edits: what is changed of a graph while a plan is carried out, so that all of it can be taken back.

    insert     a new node                         undo: erase it
    replace    what a node reads                  undo: replace it back
    recompute  the metadata of what it makes      undo: the traced value
    rename     an output's copy has its name      undo: the old one

Metadata follows every edit: strides are those that the operators' fake kernels really give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.levels import called_by
from fxpasses.graph.metadata import set_value, value
from fxpasses.graph.provenance import Origin

aten = torch.ops.aten

_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "seq_nr", "partitioner_tag")


class NotMaterialisedError(Exception):
    """Why a plan could not be carried out; the graph is as it was."""


class UnrestorableError(NotMaterialisedError):
    """Tensors whose traced strides cannot be restored once they lie in another layout.

    Attributes:
        nodes: what makes them, and each one's strides in words.
    """

    def __init__(self, nodes: Mapping[Node, str]) -> None:
        super().__init__(
            "; ".join(f"{strides} of {node} cannot be restored" for node, strides in nodes.items())
        )
        self.nodes = dict(nodes)


class Edits:
    """What was changed of the graph of `context`.

    Attributes:
        context: the graph.
        inserted: the new nodes, in the order in which they were made.
    """

    def __init__(self, context: GraphContext) -> None:
        self.context = context
        self.inserted: list[Node] = []
        self._traced: dict[Node, Any] = {}
        self._inputs: list[tuple[Node, Node, Node]] = []
        self._renamed: list[tuple[Node, str]] = []

    def undo(self) -> None:
        """Puts the graph back as it was."""
        for node, old, new in reversed(self._inputs):
            node.replace_input_with(new, old)
        for node, found in self._traced.items():
            set_value(node, found, like=node)
        for node in reversed(self.inserted):
            self.context.graph.erase_node(node)
        for old, name in self._renamed:
            old.name = name

    def is_recomputed(self, node: Node) -> bool:
        """Whether the metadata of a node is no longer the traced one."""
        return node in self._traced

    def traced(self, node: Node) -> torch.Tensor | None:
        """The tensor that a node made in the traced graph."""
        found = self._traced.get(node, value(node))
        return found if isinstance(found, torch.Tensor) else None

    def insert(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        before: Node,
        like: Node | None = None,
    ) -> Node:
        """A new node in front of `before`, whose metadata is like that of `like`, or of its first operand."""
        with self.context.graph.inserting_before(before):
            node = self.context.graph.call_function(target, args, kwargs)
        return self._inserted(node, target, like or args[0])

    def insert_again(self, node: Node, first: Node, before: Node) -> Node:
        """What a node calls, called for another first argument in front of `before`."""
        with self.context.graph.inserting_before(before):
            again = self.context.graph.create_node(
                node.op, node.target, (first, *node.args[1:]), dict(node.kwargs)
            )
        return self._inserted(again, _function(self.context, node), node)

    def _inserted(self, node: Node, function: Callable[..., Any], like: Node) -> Node:
        self.inserted.append(node)
        node.meta.update({key: like.meta[key] for key in _KEPT_META if key in like.meta})
        Origin("layout", like).tell(node)
        set_value(node, self.context.evaluator.call(function, node.args, dict(node.kwargs)), like=like)
        return node

    def replace(self, node: Node, old: Node, new: Node) -> bool:
        """Has a node read `new` in the place of `old`; whether that is a change."""
        if old is new:
            return False
        node.replace_input_with(old, new)
        self._inputs.append((node, old, new))
        return True

    def remember(self, node: Node) -> None:
        """Keeps the traced value of a node before it is set anew."""
        self._traced.setdefault(node, value(node))

    def recompute(self, node: Node) -> None:
        """The metadata of a node anew, from what it reads now."""
        self.remember(node)
        function, evaluator = _function(self.context, node), self.context.evaluator
        made = evaluator.laid_out_anew(function, node.args, node.kwargs, value(node))
        if made is None:
            made = evaluator.call(function, node.args, dict(node.kwargs))
        set_value(node, made, like=node)

    def lay_out(self, node: Node, order: Sequence[int]) -> None:
        """The metadata of a node as that of a dense tensor.

        Args:
            node: whose metadata it is.
            order: the dimensions from the outermost to the innermost.
        """
        self.remember(node)
        places, evaluator = [order.index(d) for d in range(len(order))], self.context.evaluator
        ordered = evaluator.call(aten.permute.default, (node, list(order)), {})
        dense = evaluator.call(aten.clone.default, (ordered,), {"memory_format": torch.contiguous_format})
        set_value(node, evaluator.call(aten.permute.default, (dense, places), {}), like=node)

    def hand_name_on(self, old: Node, new: Node) -> None:
        """An output keeps its name: an exported program's signature knows it by that."""
        if self.context.executor == "fused" or old.op == "placeholder":
            return
        name = old.name
        old._rename(f"{name}_before_copy")
        new.name = name
        self._renamed.append((old, name))


def _function(context: GraphContext, node: Node) -> Callable[..., Any]:
    found = called_by(context.module, node)
    if not callable(found):
        raise NotMaterialisedError(f"{node} calls {found!r}")
    return found
