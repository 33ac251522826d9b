"""Runs: members that can be done one after another, at once.

    a member, another node that reads it, a member that does not read that   one run, the other node behind
    a member, another node that reads it, a member that reads that           two runs

A node that writes to memory ends a run too.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from fxpasses.passes.weights.sequence_members import Member
from fxpasses.passes.weights.stride_order import readers_of
from fxpasses.torch_internals.inductor import image_order


@dataclass
class Run:
    """Members that can be done at once.

    Attributes:
        members: in program order.
        inside: their nodes.
        after: the nodes in between that are none and depend on them.
    """

    members: list[Member] = field(default_factory=list)
    inside: set[Node] = field(default_factory=set)
    after: dict[Node, None] = field(default_factory=dict)

    def admits(self, inputs: Sequence[Node]) -> bool:
        """Whether a member that reads these can be done with the run."""
        return not any(node in self.after for node in inputs)

    def depends(self, node: Node) -> bool:
        """Whether a node reads what the run gives, directly or not."""
        return any(operand in self.inside or operand in self.after for operand in node.all_input_nodes)


def runs_of(graph: Graph, members: dict[Node, Member], absorbed: set[Node]) -> list[Run]:
    """Members that can be done one after another without anything between them."""
    runs: list[Run] = []
    run = Run()
    for node in graph.nodes:
        if node in members:
            member = members[node]
            if not run.admits(member.inputs):
                runs.append(run)
                run = Run()
            run.members.append(member)
            run.inside.add(node)
        elif node in absorbed:
            continue
        elif node.op == "call_function" and _writes(node):
            runs.append(run)
            run = Run()
        elif node.op != "output" and run.depends(node):
            if node.target is image_order() and all(user in members for user in node.users):
                continue
            run.after[node] = None
    return [*runs, run]


def _writes(node: Node) -> bool:
    """Whether an operator writes to what it is given."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def outer_readers(run: Run) -> dict[Node, bool]:
    """For each member whether it is read outside the run, also behind what is computed while it is read."""
    absorbing = {
        node: member.node for member in run.members if member.read is not None for node in member.read.nodes
    }

    several = {member.node.args[0] for member in run.members if member.node.target is operator.getitem}

    def is_outer(user: Node) -> bool:
        while user in absorbing:
            user = absorbing[user]
        if user in several:  # an operator of several results, which members are
            return any(result not in run.inside for result in user.users)
        return user not in run.inside

    return {member.node: any(map(is_outer, readers_of(member.node))) for member in run.members}
