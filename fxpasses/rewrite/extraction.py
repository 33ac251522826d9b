"""Taking an application out of its graph: what one rewrite replaced and what it wrote instead.

Both graphs take the same inputs: the nodes that either of them reads from the rest of the graph, and every
parameter or buffer, lifted to an input. So they can be run on made-up values, compared, and saved as a test
(`fxpasses.report.repro`) without the model that they came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.levels import attribute
from fxpasses.graph.locations import location_of
from fxpasses.graph.metadata import value
from fxpasses.graph.operands import ModuleTensor, identity
from fxpasses.graph.views import BatchNorm, is_batch_norm, read_batch_norm
from fxpasses.report.application import Application, TensorSpec
from fxpasses.rewrite.rule import Match
from fxpasses.torch_internals.pytree import tree_map_only
from fxpasses.torch_internals.sizes import scalar_hint, size_hint


def extract(rule: str, match: Match, replacements: Sequence[Node], inserted: Sequence[Node]) -> Application:
    """The application of a rule whose replacement is inserted and not yet connected."""
    lifter = _Lifter(match.context)
    matched = set(match.nodes)
    before = _slice(match.results, matched)
    after = _slice(replacements, matched | set(inserted))
    for node in before:
        lifter.note_variance(node)
    for outputs, nodes in ((match.results, before), (replacements, after)):
        lifter.collect(outputs, nodes)
    return Application(
        rule=rule,
        node=match.result.name,
        location=location_of(match.result),
        before=lifter.build(match.results, before),
        after=lifter.build(replacements, after),
        inputs=lifter.inputs(),
        modes=match.context.modes(match.result),
    )


def _slice(outputs: Iterable[Node], inside: set[Node]) -> list[Node]:
    """The nodes of a set that outputs depend on, in program order."""
    pending = [output for output in outputs if output in inside]
    found: set[Node] = set()
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(operand for operand in node.all_input_nodes if operand in inside)
    return sorted(found)


@dataclass
class _Lifter:
    """Turns what a slice reads into inputs, the same ones for both slices."""

    context: GraphContext
    _inputs: dict[object, tuple[str, Any]] = field(default_factory=dict)
    _variances: set[object] = field(default_factory=set)

    def note_variance(self, node: Node) -> None:
        """Remembers which operand a normalisation takes the square root of."""
        norm = read_batch_norm(node) if is_batch_norm(node) else None
        if isinstance(norm, BatchNorm) and norm.running_var is not None:
            operand = norm.running_var
            key = self._attribute_key(operand) if isinstance(operand, Node) else identity(operand)
            self._variances.add(key)

    def collect(self, outputs: Sequence[Node], nodes: list[Node]) -> None:
        """Enters what a slice reads from outside."""
        inside = set(nodes)
        for node in nodes:
            for operand in node.all_input_nodes:
                if operand not in inside or operand.op == "get_attr":
                    self._enter(operand)
            for _, held in _module_tensors(node):
                self._enter_tensor("p_" + held.path.replace(".", "_"), held.tensor)
        for output in outputs:
            if output not in inside or output.op == "get_attr":
                self._enter(output)

    def _attribute_key(self, node: Node) -> object:
        """A parameter is known by the tensor that it is, whichever node reads it."""
        found = attribute(self.context.module, str(node.target)) if node.op == "get_attr" else None
        return found if found is not None else node

    def _enter(self, node: Node) -> None:
        key = self._attribute_key(node)
        if isinstance(key, nn.Module) or key in self._inputs:
            return
        if isinstance(key, torch.Tensor):
            self._enter_tensor(node.name, key)
            return
        positive = key in self._variances
        grad = self.context.requires_grad(node)
        held = tree_map_only(torch.Tensor, lambda tensor: _spec(tensor, grad, positive), value(node))
        self._inputs[key] = (node.name, tree_map_only(_SYMBOLIC, scalar_hint, held))

    def _enter_tensor(self, name: str, tensor: torch.Tensor) -> None:
        if tensor not in self._inputs:
            spec = _spec(tensor, tensor.requires_grad, tensor in self._variances)
            taken = {known for known, _ in self._inputs.values()}
            while name in taken:
                name += "_"
            self._inputs[tensor] = (name, spec)

    def inputs(self) -> tuple[tuple[str, Any], ...]:
        return tuple(self._inputs.values())

    def build(self, outputs: Sequence[Node], nodes: list[Node]) -> GraphModule:
        """A slice as a module of its own."""
        graph, root = Graph(), nn.Module()
        placeholders = {key: graph.placeholder(name) for key, (name, _) in self._inputs.items()}
        known: dict[Node, Node] = {}

        def operand(node: Node) -> Node:
            if node in known:
                return known[node]
            key = self._attribute_key(node)
            if isinstance(key, nn.Module):
                name = f"graph_{len(root._modules)}"
                root.add_module(name, key)
                known[node] = graph.get_attr(name)
                return known[node]
            return placeholders[key]

        for node in nodes:
            if node.op == "call_module":
                known[node] = self._call_module(node, graph, root, placeholders, operand)
            elif node.op != "get_attr":
                known[node] = graph.node_copy(node, operand)
        results = [operand(output) for output in outputs]
        graph.output(results[0] if len(results) == 1 else tuple(results))
        return GraphModule(root, graph)

    @staticmethod
    def _call_module(
        node: Node, graph: Graph, root: nn.Module, placeholders: dict[object, Node], operand: Any
    ) -> Node:
        """A call of a leaf module, as a call with its tensors given."""
        owner = node.graph.owning_module
        module = attribute(owner, str(node.target)) if owner is not None else None
        assert isinstance(module, nn.Module)
        name = f"module_{len(root._modules)}"
        root.add_module(name, module)
        tensors = {name: placeholders[held.tensor] for name, held in _module_tensors(node)}
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), operand)
        call = (graph.get_attr(name), tensors, args, kwargs)
        return graph.call_function(torch.func.functional_call, call)


_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _module_tensors(node: Node) -> list[tuple[str, ModuleTensor]]:
    """The parameters and buffers of the module that a node calls, by their names in it."""
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        return []
    module = attribute(owner, str(node.target))
    assert isinstance(module, nn.Module)
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    return [(name, ModuleTensor(f"{node.target}.{name}", tensor)) for name, tensor in named]


def _spec(tensor: torch.Tensor, requires_grad: bool, positive: bool) -> TensorSpec:
    return TensorSpec(
        shape=tuple(size_hint(size) for size in tensor.shape),
        stride=tuple(size_hint(stride) for stride in tensor.stride()),
        dtype=tensor.dtype,
        device=str(tensor.device),
        requires_grad=requires_grad and tensor.is_floating_point(),
        positive=positive,
    )
