"""Baked weights: what depends on parameters and buffers alone is computed once, and stored in their place.

    conv(x, weight * scale(gamma, var), ...)  ->  conv(x, baked_conv_weight_bn, ...)

Views are baked too, such as the transposed weight of a linear layer. Left in the graph are

- what is larger than all that it is made of, such as a dequantised weight, unless all of that together adds
  no more than a twentieth to the program,
- views of what is stored anyhow, or that have gaps or overlap, such as an expanded token: they cost nothing,
- what the caller gets hold of: a result is a new tensor, or a view of a parameter, as it was.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxpasses.errors import FxpassesError
from fxpasses.graph.context import GraphContext
from fxpasses.graph.levels import called_by
from fxpasses.graph.metadata import tensor
from fxpasses.graph.operands import ModuleTensor
from fxpasses.graph.strides import are_dense
from fxpasses.passes.weights.stable import (
    bytes_of,
    prologue_of,
    read_outside,
    sources_of,
    stable_nodes,
)
from fxpasses.torch_internals.fake_tensors import FakeTensor, without_fake_tensors
from fxpasses.torch_internals.operators import HigherOrderOperator, OpOverload
from fxpasses.torch_internals.tensors import storage_key


@dataclass(frozen=True)
class Constant:
    """A tensor to be stored.

    Attributes:
        node: whose value it is.
        value: detached, dense, and with memory of its own.
        made_of: the sources that it was computed from, in the order of the graph.
    """

    node: Node
    value: torch.Tensor
    made_of: tuple[Node, ...]


def refuse_written(context: GraphContext, held: Mapping[str, torch.Tensor]) -> None:
    """Refuses a graph that writes to parameters or buffers.

    Args:
        context: the graph.
        held: the parameters and buffers, by the names that the user knows.

    Raises:
        FxpassesError: one is written to.
    """
    for name, found in held.items():
        for writer in context.writers_of(ModuleTensor(name, found)):
            if _is_known(context, writer):
                raise FxpassesError(
                    f"weights='baked' needs parameters and buffers that stay as they are, and {writer.name} "
                    f"writes to {name}. If the program was captured in training mode, call model.eval() "
                    "first; a model that keeps a state between calls cannot be baked: use weights='live'."
                )


def _is_known(context: GraphContext, writer: Node) -> bool:
    """Whether a node writes to what it is said to; of what nobody described only the worst is assumed."""
    if writer.op == "call_module":
        return type(called_by(context.module, writer)).__module__.startswith("torch.nn.modules")
    target = writer.target
    if isinstance(target, (OpOverload, HigherOrderOperator)):
        return isinstance(target, OpOverload)
    module = getattr(target, "__module__", None) or ""
    return writer.op == "call_method" or module.split(".")[0] in ("torch", "_operator", "builtins", "")


def constants_of(
    context: GraphContext, sources: Mapping[Node, torch.Tensor]
) -> tuple[list[Constant], list[Node]]:
    """What is to be stored, of a graph of which no gradient is recorded; the graph is not changed.

    Args:
        context: the graph.
        sources: its parameters and buffers, and their values.

    Returns:
        The constants, and all nodes that depend on the sources alone.

    Raises:
        FxpassesError: the values are not there, but only their metadata.
    """
    unwritten = [node for node in sources if not context.is_written(node)]
    stable = stable_nodes(context, unwritten, visible=_visible(context), ahead=True)
    made_of = sources_of(stable)
    choice = _Choice(context, stable, made_of)
    values: dict[Node, torch.Tensor] = {}
    while True:
        kept = choice.nodes()
        missing = [node for node in kept if node not in values]
        values.update(_computed(context, missing, sources))
        views = _views_of_stored(choice, kept, values, sources)
        if not views:
            break
        choice.stays.update(views)
    given = {storage_key(value) for value in sources.values()}
    ordered = {node: [source for source in sources if source in made_of[node]] for node in kept}
    constants = [Constant(node, _own(values[node], given), tuple(ordered[node])) for node in kept]
    return constants, list(stable)


def erase_unread(context: GraphContext, stable: Sequence[Node]) -> None:
    """Erases those of the nodes that nobody else needs, once the constants are read in their place."""
    needed: set[Node] = set()
    others = set(context.graph.nodes).difference(stable)
    pending = [operand for node in others for operand in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if node not in needed and node not in others:
            needed.add(node)
            pending.extend((*node.all_input_nodes, *context.writers_of(node)))
    for node in reversed(list(context.graph.nodes)):
        if node.op != "placeholder" and node not in needed and node not in others:
            context.graph.erase_node(node)
    context.graph.lint()
    context.module.recompile()


def _visible(context: GraphContext) -> set[Node]:
    """The nodes whose memory the caller may get: results, and what they may be views of."""
    (output,) = context.graph.find_nodes(op="output")
    seen: set[Node] = set()
    pending = list(output.all_input_nodes)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            if context.may_return_argument(node):
                pending.extend(node.all_input_nodes)
    return seen


_GROWTH = 20
"""The part of a program's bytes by which it may grow, as a divisor."""


class _Choice:
    """Which stable nodes to keep: those that are read, or what they are made of."""

    def __init__(
        self, context: GraphContext, stable: dict[Node, None], made_of: Mapping[Node, frozenset[Node]]
    ) -> None:
        self._context = context
        self._stable = stable
        self._made_of = made_of
        self._room = sum(bytes_of(tensor(node)) for node in stable if made_of[node] == {node}) // _GROWTH
        self.stays: set[Node] = {node for node in stable if tensor(node) is None}
        """The nodes that are left in the graph; at first those that give several tensors."""
        self.read: set[Node] = set()
        """The sources that the graph reads beside the kept nodes."""

    def nodes(self) -> list[Node]:
        """The nodes to keep, in program order."""
        kept: set[Node] = set()
        seen: set[Node] = set()
        self.read = set()
        growing: list[Node] = []
        room = self._room
        pending = read_outside(self._context, self._stable)
        while pending or growing:
            if not pending:
                # The smallest first: all those that fit are kept, before what the others are made of.
                node = min(growing, key=self._growth)
                growing.remove(node)
                if self._growth(node) <= room:
                    room -= self._growth(node)
                    kept.add(node)
                else:
                    pending.extend(node.all_input_nodes)
                continue
            node = pending.pop()
            if node in seen or not self._made_of[node]:
                continue
            seen.add(node)
            if node in self._made_of[node]:
                self.read.add(node)
            elif node in self.stays:
                pending.extend(node.all_input_nodes)
            elif self._growth(node) > 0:
                growing.append(node)
            else:
                kept.add(node)
        return [node for node in self._context.graph.nodes if node in kept]

    def _growth(self, node: Node) -> int:
        """By how many bytes a node is larger than all that it is made of."""
        sources = self._made_of[node]
        return bytes_of(tensor(node)) - sum(bytes_of(tensor(source)) for source in sources)

    def may_be_view(self, node: Node) -> bool:
        """Whether a node may share storage with something that it reads."""
        return self._context.may_return_argument(node)


def _computed(
    context: GraphContext, nodes: Sequence[Node], sources: Mapping[Node, torch.Tensor]
) -> dict[Node, torch.Tensor]:
    """The values of nodes."""
    prologue, read = prologue_of(context, nodes, tuple(sources))
    for node in read:
        if isinstance(sources[node], FakeTensor) or sources[node].is_meta:
            raise FxpassesError(
                f"weights='baked' computes with the parameters and buffers, and {node.name} has no values "
                f"({type(sources[node]).__name__} on {sources[node].device}). Load the weights before the "
                "program is captured."
            )
    devices = {sources[node].device.type for node in read}
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_fake_tensors())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        found: tuple[torch.Tensor, ...] = prologue(*(sources[node].detach() for node in read))
    return dict(zip(nodes, found, strict=True))


def _views_of_stored(
    choice: _Choice,
    kept: Sequence[Node],
    values: Mapping[Node, torch.Tensor],
    sources: Mapping[Node, torch.Tensor],
) -> set[Node]:
    """The kept nodes that are better left as views: of one memory more than it holds, or with gaps."""
    sharing: dict[int | None, list[Node]] = defaultdict(list)
    for node in (*choice.read, *kept):
        sharing[storage_key(values[node] if node in values else sources[node])].append(node)
    views: set[Node] = set()
    for nodes in sharing.values():
        found = [values[node] if node in values else sources[node] for node in nodes]
        room = found[0].untyped_storage().nbytes()
        if sum(value.nbytes for value in found) > room and len(found) > 1:
            views.update(node for node in nodes if node in values)
    views.update(node for node in kept if not are_dense(tuple(values[node].shape), values[node].stride()))
    return {node for node in views if choice.may_be_view(node)}


def _own(value: torch.Tensor, given: set[int | None]) -> torch.Tensor:
    """A value detached, in the same strides, with memory that nothing else reads."""
    with without_fake_tensors(), torch.inference_mode(False), torch.no_grad():
        found = value.detach().resolve_conj().resolve_neg()
        shared = storage_key(found) in given or found.untyped_storage().nbytes() > found.nbytes
        return found.clone() if shared or found.is_inference() else found
