"""What to change at a site, in terms of the user's model: its modules and source lines.

The advice of a reason code is the same for all models. Here the node to blame, and what it reads, are named
as the drawing of the traced graph knows them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fxpasses.report.data import Remark
from fxpasses.report.drawing import DrawnNode, GraphDrawing
from fxpasses.report.text import short

_READ_ELSEWHERE = "multiple-users"
_RETURNED = (
    "the model also returns the result of {shared}: return that of {site} in its place, or that of a second "
    "call of {shared}"
)

_EDITS: Mapping[str, str] = {
    _READ_ELSEWHERE: (
        "{blamed} also reads the result of {shared}: have it read that of {site}, or of a second call of "
        "{shared}"
    ),
    "training-mode": "{site} is in training mode: call eval() on it, where its running statistics are meant",
    "no-producer": "{site} reads {read}: put the norm right after a convolution or linear layer",
    "saved-statistics": "{site}: read its result alone",
    "channel-axis": "{site} reads {read}, whose channels are on another axis: flatten around the two",
    "border": "{site} pads what the norm gives: call F.pad before the norm, or use padding=0",
    "mutation": "{blamed} writes in between: move it, or have it write to a clone",
    "order": "{blamed} is computed too late: compute it before",
}
"""By reason code; ``shared`` is what the site and the node to blame both read."""


def edit_here(drawings: Sequence[GraphDrawing], remark: Remark) -> str:
    """What to change at a site; empty where the code or the graph does not tell.

    Args:
        drawings: of the report; those of traced graphs count.
        remark: of a rule that declined there.
    """
    for drawing in drawings:
        nodes = {node.name: node for node in drawing.nodes}
        is_traced = drawing.stage == "before" and drawing.graph == remark.graph
        if is_traced and remark.node in nodes and remark.code in _EDITS:
            return _edit(drawing, remark, nodes[remark.node], nodes.get(remark.blamed))
    return ""


def _edit(drawing: GraphDrawing, remark: Remark, site: DrawnNode, blamed: DrawnNode | None) -> str:
    template, names = _EDITS[remark.code], {"site": called(site)}
    if site.inputs:
        names["read"] = called(drawing.nodes[site.inputs[0]])
    if blamed is not None and blamed is not site:
        names["blamed"] = called(blamed)
        shared = next((node for node in _before(drawing, site) if _reads(drawing, blamed, node)), None)
        if shared is not None:
            names["shared"] = called(shared)
        if remark.code == _READ_ELSEWHERE and blamed.kind == "output":
            template = _RETURNED
    try:
        return template.format(**names)
    except KeyError:
        return ""  # the graph has no such node


def called(node: DrawnNode) -> str:
    """What the user calls a node: its module, else its operator, and the source line."""
    name = node.module or f"`{node.operator or node.name}`"
    return f"{name} ({short(node.location)})" if node.location else name


def _before(drawing: GraphDrawing, site: DrawnNode) -> Iterator[DrawnNode]:
    """What a node reads, and what that reads, the nearest first."""
    pending, seen = list(site.inputs), set[int]()
    while pending:
        position = pending.pop(0)
        if position not in seen:
            seen.add(position)
            yield drawing.nodes[position]
            pending += drawing.nodes[position].inputs


def _reads(drawing: GraphDrawing, reader: DrawnNode, node: DrawnNode) -> bool:
    return any(drawing.nodes[position] is node for position in reader.inputs)
