"""Drawing graphs: from nodes to the plain data of `drawing`, with what happened at each of them.

    draw_graphs   before the passes, after them, and where layouts are planned or carried out
    draw_result   both drawings, with the rules' sites, what was replaced and what was written

It takes a few microseconds a node, adds no guard and is never an error: what cannot be drawn still compiles.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from math import inf

import torch
from torch.fx import Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.layouts import order_of_strides
from fxpasses.graph.locations import location_of, module_of
from fxpasses.graph.metadata import value
from fxpasses.graph.names import base_name
from fxpasses.report.data import Remark
from fxpasses.report.drawing import LARGEST, DrawnNode, GraphDrawing, Stage
from fxpasses.report.layout_plan import LayoutPlan

log = logging.getLogger("fxpasses")


def draw_graphs(
    contexts: Sequence[GraphContext], stage: Stage, largest: float | None = None
) -> tuple[GraphDrawing, ...]:
    """A drawing of each graph; none where they have more than `largest` (`LARGEST`) nodes."""
    if sum(len(context.graph.nodes) for context in contexts) > (LARGEST if largest is None else largest):
        return ()
    try:
        return tuple(_drawing(context, stage) for context in contexts)
    except Exception:  # a graph that cannot be drawn can still be compiled
        log.warning("the graph could not be drawn", exc_info=True)
        return ()


def draw_result(
    before: Sequence[GraphDrawing],
    contexts: Sequence[GraphContext],
    remarks: Sequence[Remark],
    plan: LayoutPlan | None,
) -> tuple[GraphDrawing, ...]:
    """The drawings of before and, where a rewrite was applied, of now; both say what happened where.

    Args:
        before: the drawings that were made first.
        contexts: the graphs as they are now.
        remarks: what happened.
        plan: the layout plan of the outermost graph, if one was carried out there.
    """
    if not before:
        return ()
    after: tuple[GraphDrawing, ...] = ()
    if any(remark.status == "applied" for remark in remarks):
        after = draw_graphs(contexts, "after", largest=inf)  # before was small enough
    statuses = [_statuses(drawing.graph, remarks) for drawing in before]
    if len(after) != len(before):
        return tuple(drawing.with_statuses(known) for drawing, known in zip(before, statuses, strict=True))
    old, new = [], []
    for was, now, known in zip(before, after, statuses, strict=True):
        old.append(was.with_statuses(dict.fromkeys(was.names - now.names, "replaced") | known))
        new.append(now.with_statuses(dict.fromkeys(now.names - was.names, "written") | known))
    if plan is not None and plan.decision == "applied":
        new[0] = new[0].with_copies_of(plan, before[0])
    return (*old, *new)


def _statuses(graph: str, remarks: Sequence[Remark]) -> dict[str, str]:
    """What happened at each node of a graph; of two things at one node, what changed more."""
    found: dict[str, str] = {}
    for remark in remarks:
        if remark.node and remark.graph == graph and found.get(remark.node) != "applied":
            found[remark.node] = remark.status
    return found


def _drawing(context: GraphContext, stage: Stage) -> GraphDrawing:
    nodes = list(context.graph.nodes)
    positions = {node: position for position, node in enumerate(nodes)}
    return GraphDrawing(
        stage=stage,
        level=context.level.value,
        nodes=tuple(_drawn(node, positions) for node in nodes),
        graph=context.path,
    )


def _drawn(node: Node, positions: dict[Node, int]) -> DrawnNode:
    described, label = _described(value(node))
    return DrawnNode(
        node.name,
        node.op,
        _function_name(node) if node.op == "call_function" else base_name(node),
        tuple([positions[operand] for operand in node.all_input_nodes]),
        described,
        _module(node),
        location_of(node),
        label,
    )


_MOST_NAMES = 4096
_names: dict[object, str] = {}


def _function_name(node: Node) -> str:
    """What `base_name` gives, which depends on the function alone."""
    name = _names.get(node.target)
    if name is None:
        if len(_names) > _MOST_NAMES:
            _names.clear()
        name = _names[node.target] = base_name(node)
    return name


def _module(node: Node) -> str:
    """The node's module; AOTAutograd's backward nodes know the one whose gradient they compute."""
    forward = node.meta.get("fwd_nn_module_stack")
    if not forward or node.meta.get("nn_module_stack"):
        return module_of(node)
    return f"backward.{module_of(node)}".rstrip(".")


def _described(held: object) -> tuple[str, str]:
    """A value in words, and its layout."""
    if isinstance(held, torch.Tensor):
        shape = held.shape
        if held.layout is not torch.strided:
            return _sizes(held.dtype, shape), ""
        key = (held.dtype, shape, held.stride())
        try:
            return _strided(*key)
        except TypeError:  # symbolic sizes have no hash
            return _strided.__wrapped__(*key)
    if isinstance(held, (tuple, list)):
        return f"({', '.join([_described(item)[0] for item in held])})", ""
    if isinstance(held, (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return str(held), ""
    return "", ""


@functools.lru_cache(maxsize=4096)
def _strided(dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...]) -> tuple[str, str]:
    found = order_of_strides(shape, stride)
    return _sizes(dtype, shape), found if found in ("contiguous", "channels_last") else ""


def _sizes(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"
