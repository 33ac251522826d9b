"""The context of a graph: what a rule may ask about its nodes, computed once and kept true under rewriting.

Rewrites only insert pure nodes and delete pure nodes, so the writes, the alias classes and the modes of the
other nodes stay valid; a new node takes the modes of its insertion point.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.fx import Graph, GraphModule, Node

from fxpasses.graph.effects import Effects
from fxpasses.graph.levels import Level, attribute, level_of
from fxpasses.graph.metadata import FakeEvaluator, set_value, tensor
from fxpasses.graph.modes import Modes, modes_of
from fxpasses.graph.operands import ModuleTensor, Operand, identity
from fxpasses.graph.strides import same_layout

Executor = Literal["fused", "eager"]


@dataclass
class GraphContext:
    """One graph under optimisation.

    Attributes:
        module: the module that owns the graph.
        initial_modes: the state at the graph's start.
        executor: who will run the graph: ``"fused"`` for a compiler that fuses pointwise operators with
            their neighbours (inductor), ``"eager"`` for one kernel per operator.
        weights_cached: whether work on parameters alone is done once per parameter version.
        trainable: names of placeholders that require grad, where the metadata does not tell.
        held: the parameters and buffers that an exported program brings along, by placeholder. Without it any
            two placeholders may share storage.
        path: the path of a nested graph; empty for the outermost.
        parameters: names of placeholders that are parameters or buffers, where the graph does not tell.
        results: which outputs, by position, are results that a caller gets, and not gradients or new values
            of inputs; None for all.
    """

    module: GraphModule
    initial_modes: Modes
    executor: Executor = "fused"
    weights_cached: bool = False
    trainable: frozenset[str] = frozenset()
    held: Mapping[str, torch.Tensor] = field(default_factory=dict)
    path: str = ""
    parameters: frozenset[str] = frozenset()
    results: frozenset[int] | None = None
    _gradients: dict[Node, bool] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        """The graph itself."""
        return self.module.graph

    @functools.cached_property
    def level(self) -> Level:
        """The capture level of the graph."""
        return level_of(self.graph)

    @functools.cached_property
    def _modes(self) -> dict[Node, Modes]:
        return modes_of(self.graph, self.initial_modes)

    @functools.cached_property
    def _effects(self) -> Effects:
        return Effects(self.module, self.graph, self.held)

    @functools.cached_property
    def evaluator(self) -> FakeEvaluator:
        """What computes the metadata of new nodes."""
        return FakeEvaluator(self.module)

    def modes(self, node: Node) -> Modes:
        """The state in which the node runs."""
        return self._modes[node]

    def forget_effects(self) -> None:
        """Has writes and aliases read anew, for a pass that changes which there are."""
        self.__dict__.pop("_effects", None)

    def stand_in(self, new: Node, old: Node) -> None:
        """Has a node that a rewrite has inserted take the place of another.

        It is the same tensor to whoever reads it, so its metadata have the same storage, if it lies alike.
        """
        self._effects.stand_in(new, old)
        found, before = tensor(new), tensor(old)
        if found is not None and before is not None and same_layout(found, before):
            set_value(new, before, like=old)

    def adopt(self, node: Node, modes: Modes) -> None:
        """Enters a node that a rewrite has inserted."""
        self._modes[node] = modes

    def written_between(self, operands: Iterable[Operand | None], first: Node, last: Node) -> Node | None:
        """The first node strictly between two others that writes to an operand or to an alias of one."""
        return self._effects.written_between(
            (identity(operand) for operand in operands if operand is not None), first, last
        )

    def is_written(self, node: Node) -> bool:
        """Whether any node writes to the node's value or to an alias of it."""
        return self._effects.is_written(node)

    def writers_of(self, operand: Operand) -> list[Node]:
        """The nodes that write to an operand or to an alias of it, in program order."""
        return self._effects.writers_of(identity(operand))

    def may_return_argument(self, node: Node) -> bool:
        """Whether the node's result may share storage with something that it reads."""
        return self._effects.may_return_argument(node)

    def may_alias(self, first: Operand, second: Operand) -> bool:
        """Whether two operands may share storage."""
        return self._effects.may_alias(identity(first), identity(second))

    def requires_grad(self, operand: Operand | None) -> bool:
        """Whether a gradient may flow to the operand.

        Dynamo's and export's metadata tell; where a tracer left it out (make_fx does), a node requires
        grad when anything that it reads does.
        """
        if operand is None:
            return False
        if isinstance(operand, ModuleTensor):
            return operand.tensor.requires_grad
        return self._node_requires_grad(operand)

    def _node_requires_grad(self, start: Node) -> bool:
        pending = [start]
        while pending:
            node = pending[-1]
            if node in self._gradients:
                pending.pop()
                continue
            answer = self._local_answer(node)
            if answer is None:
                missing = [operand for operand in node.all_input_nodes if operand not in self._gradients]
                if missing:
                    pending.extend(missing)
                    continue
                answer = any(self._gradients[operand] for operand in node.all_input_nodes)
            self._gradients[node] = answer
            pending.pop()
        return self._gradients[start]

    def _local_answer(self, node: Node) -> bool | None:
        """What the node's own metadata says; None where its inputs decide."""
        found = tensor(node)
        if found is not None and found.requires_grad:
            return True
        if node.op == "placeholder":
            return node.name in self.trainable
        if node.op == "get_attr":
            held = attribute(self.module, str(node.target))
            return isinstance(held, torch.Tensor) and held.requires_grad
        if "example_value" in node.meta or not node.all_input_nodes:
            return False
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if not self.modes(node).grad or name.startswith("detach"):
            return False
        if found is not None and not (found.is_floating_point() or found.is_complex()):
            return False
        return None
