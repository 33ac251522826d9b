"""Causes: for whose sake a tensor is copied to the other layout.

    image ── copy ── conv2d ──┬── copy ── view        "inputs": it comes so; "aten.view": that operator forces
                              └── copy ── result      "results": they have eager's strides

A copy that several read counts for the first of them. What is neither forced nor at the graph's boundary is
copied because that is cheaper, as predicted: "costs". What does not follow its operands is copied: "repairs".
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from fxpasses.graph.names import base_name
from fxpasses.passes.layout.convolutions import is_weight_of
from fxpasses.passes.layout.network import Network, Role
from fxpasses.torch_internals.operators import OpOverload, operator_name

FORCES_STRIDES = ("inductor_force_stride_order", "force_strides")
"""The operators by which readers of memory get eager's strides, which views of it have too."""


@dataclass(frozen=True)
class Cause:
    """Why a tensor is copied.

    Attributes:
        name: one of those above, or ``"weights"``, ``"gradients"``, or the name of the operator that forces.
        forcing: the node of that operator; None where there is none.
    """

    name: str
    forcing: Node | None = None


REPAIR = Cause("repairs")


class Causes:
    """Why the tensors of a graph are copied."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._arguments = frozenset(network.boundary.inputs)
        self._backward: set[Node] = set()
        for node in network.roles:
            is_tangent = node.op == "placeholder" and node.name.startswith("tangents")
            if is_tangent or not self._backward.isdisjoint(node.all_input_nodes):
                self._backward.add(node)

    def of(self, made: Node, reader: Node) -> Cause:
        """Why a tensor is copied for a reader, the first of those that want it in another layout."""
        if made.op in ("placeholder", "get_attr"):
            if made in self._backward:
                return Cause("gradients")
            is_argument = made in self._arguments and not any(is_weight_of(made, user) for user in made.users)
            return Cause("inputs" if is_argument else "weights")
        while base_name(reader) in FORCES_STRIDES and reader.users:
            reader = next(iter(reader.users))
        if reader.op == "output":
            return Cause("gradients" if made in self._backward else "results")
        if self._network.roles.get(reader) is Role.FREE:
            return Cause(_operator_of(reader))  # a copy that the graph makes anyway
        forcing = next((node for node in (reader, made) if self._forces(node)), None)
        return Cause("costs") if forcing is None else Cause(_operator_of(forcing), forcing)

    def _forces(self, node: Node) -> bool:
        return self._network.roles.get(node) is Role.EXACT and node.op.startswith("call")


def _operator_of(node: Node) -> str:
    """An operator's name, without its overload."""
    if not isinstance(node.target, OpOverload):
        return base_name(node)
    return ".".join(operator_name(node.target).replace("::", ".").split(".")[:2])
