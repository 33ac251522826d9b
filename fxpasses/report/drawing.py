"""Drawings of a graph: what a page needs to draw it, as plain data that outlives the graph.

A compilation has a drawing of the traced graph, one of the rewritten graph and, where layouts were planned
on another graph (inductor's joint graph) or were not carried out, drawings of those. A graph of more than
`LARGEST` nodes is not recorded: no reader could use it, and its compilation would notice the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from fxpasses.report.layout_plan import LayoutPlan

LARGEST = 5_000
"""Of at most how many nodes, nested graphs included, a traced graph is drawn."""

Stage = Literal["before", "after", "planned", "joint-before", "joint-after"]

STAGES: dict[Stage, str] = {
    "before": "Before",
    "after": "After",
    "planned": "Planned layouts",
    "joint-before": "Joint graph before layouts",
    "joint-after": "Joint graph with layouts",
}
"""What a drawing shows, in words."""


class DrawnNode(NamedTuple):
    """A node.

    Attributes:
        name: its name in the graph.
        kind: fx's word for it: ``"placeholder"``, ``"call_function"``, ...
        operator: its operator's base name, the same at every level: ``"conv2d"``, ``"add"``.
        inputs: the positions of the nodes that it reads.
        value: dtype and sizes of its result: ``"float32[8, 64, 56, 56]"``.
        module: the qualified name of the module that it came from, where known.
        location: the user's source line, where known.
        label: the layout of its result: ``"contiguous"``, ``"channels_last"``, or empty where it has none.
        status: ``"applied"``, ``"declined"`` or ``"failed"`` at a rule's site, ``"replaced"`` and
            ``"written"`` for what a rewrite took out and put in, ``"copy"`` for a change of layout,
            ``"forcing"`` for an operator that causes one, or empty.
    """

    name: str
    kind: str
    operator: str
    inputs: tuple[int, ...]
    value: str = ""
    module: str = ""
    location: str = ""
    label: str = ""
    status: str = ""


class Copy(NamedTuple):
    """A tensor that changes its layout on the way to some of its readers: the cut edges.

    Attributes:
        tensor: the position of the node that makes it.
        readers: the positions of the nodes that read it in the other layout.
        seconds: the predicted cost of the copy; 0 where there is no prediction.
    """

    tensor: int
    readers: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class GraphDrawing:
    """One graph at one stage.

    Attributes:
        stage: when it was made, a key of `STAGES`.
        level: the capture level.
        nodes: in program order.
        copies: the cut edges.
        graph: the path of a nested graph; empty for the outermost one.
        compilation: which compilation of a merged report it belongs to, from 0.
    """

    stage: Stage
    level: str
    nodes: tuple[DrawnNode, ...]
    copies: tuple[Copy, ...] = ()
    graph: str = ""
    compilation: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The drawing as what JSON knows. Texts stand once, in a table; nodes hold their positions."""
        table: dict[str, int] = {}

        def row(node: DrawnNode) -> list[Any]:
            texts = (
                field if isinstance(field, tuple) else table.setdefault(field, len(table)) for field in node
            )
            return [list(field) if isinstance(field, tuple) else field for field in texts]

        nodes = [row(node) for node in self.nodes]
        return {
            "stage": self.stage,
            "level": self.level,
            "graph": self.graph,
            "compilation": self.compilation,
            "columns": DrawnNode._fields,
            "texts": list(table),
            "nodes": nodes,
            "copies": [[copy.tensor, list(copy.readers), copy.seconds] for copy in self.copies],
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> GraphDrawing:
        """The drawing that `to_dict` wrote, also after a trip through JSON.

        Raises:
            KeyError, TypeError, IndexError: the data is no drawing.
        """
        texts: Sequence[str] = data["texts"]

        def node(row: Sequence[Any]) -> DrawnNode:
            fields = (tuple(field) if isinstance(field, (list, tuple)) else texts[field] for field in row)
            return DrawnNode(**dict(zip(data["columns"], fields, strict=True)))

        return GraphDrawing(
            stage=data["stage"],
            level=data["level"],
            nodes=tuple(map(node, data["nodes"])),
            copies=tuple(Copy(tensor, tuple(to), seconds) for tensor, to, seconds in data["copies"]),
            graph=data["graph"],
            compilation=data["compilation"],
        )

    @property
    def names(self) -> frozenset[str]:
        """The names of its nodes."""
        return frozenset(node.name for node in self.nodes)

    def with_statuses(self, statuses: Mapping[str, str]) -> GraphDrawing:
        """The drawing with the status of some nodes, by name."""
        nodes = tuple(
            node._replace(status=statuses[node.name]) if node.name in statuses else node
            for node in self.nodes
        )
        return replace(self, nodes=nodes)

    def with_plan(self, plan: LayoutPlan) -> GraphDrawing:
        """The drawing with the labels and the cut edges of a plan over the same graph."""
        positions = {node.name: position for position, node in enumerate(self.nodes)}
        nodes = tuple(
            [_marked(node, plan)._replace(label=plan.labels.get(node.name, "")) for node in self.nodes]
        )
        copies = tuple(
            Copy(
                positions[edge.node],
                tuple(positions[name] for name in edge.readers if name in positions),
                edge.seconds,
            )
            for edge in plan.cut_edges
            if edge.node in positions
        )
        return replace(self, stage="planned", nodes=nodes, copies=copies)

    def with_copies_of(self, plan: LayoutPlan, traced: GraphDrawing) -> GraphDrawing:
        """The drawing of a graph in which a plan was carried out, with the copies that this put there.

        Args:
            plan: the plan.
            traced: the drawing of before.
        """
        seconds = {edge.node: edge.seconds for edge in plan.cut_edges}
        operators = {node.name: node.operator for node in traced.nodes}
        nodes, copies = [_marked(node, plan) for node in self.nodes], []
        for position, node in enumerate(self.nodes):
            if node.operator not in _COPYING or operators.get(node.name) == node.operator or not node.inputs:
                continue
            source = self.nodes[node.inputs[-1]]
            nodes[position] = node._replace(status="copy")
            if node.name in operators:  # the copy of an output has its name, and the output another one
                nodes[node.inputs[-1]] = source._replace(status="")
            cost = seconds.get(source.name, seconds.get(node.name, 0.0))
            copies.append(Copy(node.inputs[-1], (position,), cost))
        return replace(self, nodes=tuple(nodes), copies=tuple(copies))


def _marked(node: DrawnNode, plan: LayoutPlan) -> DrawnNode:
    """The node, marked where it forces copies and nothing else happened to it."""
    forces = node.name in plan.forcing and not node.status
    return node._replace(status="forcing") if forces else node


_COPYING = ("clone", "copy", "contiguous")
