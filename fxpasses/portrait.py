"""Taking pictures of graphs (`fxpasses.picture`): a few microseconds a node, no guard, and never an error."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.locations import location_of, module_of
from fxpasses.graph.metadata import value
from fxpasses.passes.layout.labels import operator_of, order_of
from fxpasses.picture import LARGEST, GraphPicture, PicturedNode, Stage

if TYPE_CHECKING:
    from fxpasses.passes.layout.plan import LayoutPlan
    from fxpasses.report import Remark

log = logging.getLogger("fxpasses")


def take_pictures(contexts: Sequence[GraphContext], stage: Stage) -> tuple[GraphPicture, ...]:
    """A picture of each graph; none where they are too large together."""
    if sum(len(each.graph.nodes) for each in contexts) > LARGEST:
        return ()
    try:
        return tuple(_picture(each, stage) for each in contexts)
    except Exception:  # a graph that cannot be drawn can still be compiled
        log.warning("the graph could not be drawn", exc_info=True)
        return ()


def finished(
    before: Sequence[GraphPicture],
    contexts: Sequence[GraphContext],
    remarks: Sequence[Remark],
    plan: LayoutPlan | None,
) -> tuple[GraphPicture, ...]:
    """The pictures of before and, where a rewrite was applied, of now; both say what happened where.

    Args:
        before: the pictures that were taken first.
        contexts: the graphs as they are now.
        remarks: what happened.
        plan: the layout plan of the outermost graph, if one was carried out there.
    """
    if not before:
        return ()
    after: tuple[GraphPicture, ...] = ()
    if any(each.status == "applied" for each in remarks):
        after = take_pictures(contexts, "after")
    statuses = [_statuses(each.graph, remarks) for each in before]
    if len(after) != len(before):
        return tuple(each.marked(known) for each, known in zip(before, statuses, strict=True))
    old, new = [], []
    for was, now, known in zip(before, after, statuses, strict=True):
        old.append(was.marked(dict.fromkeys(was.names - now.names, "replaced") | known))
        new.append(now.marked(dict.fromkeys(now.names - was.names, "written") | known))
    if plan is not None and plan.decision == "applied":
        new[0] = new[0].with_copies_of(plan, before[0].names)
    return (*old, *new)


def _statuses(graph: str, remarks: Sequence[Remark]) -> dict[str, str]:
    """What happened at each node of a graph; of two things at one node, what changed more."""
    found: dict[str, str] = {}
    for each in remarks:
        if each.node and each.graph == graph and found.get(each.node) != "applied":
            found[each.node] = each.status
    return found


def _picture(context: GraphContext, stage: Stage) -> GraphPicture:
    nodes = list(context.graph.nodes)
    positions = {node: position for position, node in enumerate(nodes)}
    return GraphPicture(
        stage=stage,
        level=context.level.value,
        nodes=tuple(_pictured(node, positions) for node in nodes),
        graph=context.path,
    )


def _pictured(node: Node, positions: dict[Node, int]) -> PicturedNode:
    held = value(node)
    return PicturedNode(
        name=node.name,
        kind=node.op,
        operator=operator_of(node),
        inputs=tuple([positions[each] for each in node.all_input_nodes]),
        value=_described(held),
        module=_module(node),
        location=location_of(node),
        label=_label(held) if isinstance(held, torch.Tensor) else "",
    )


def _module(node: Node) -> str:
    """The node's module; AOTAutograd's backward nodes know the one whose gradient they compute."""
    forward = node.meta.get("fwd_nn_module_stack")
    if not forward or node.meta.get("nn_module_stack"):
        return module_of(node)
    return f"backward.{module_of(node)}".rstrip(".")


def _described(held: object) -> str:
    if isinstance(held, torch.Tensor):
        sizes = ", ".join(map(str, held.shape))
        return f"{str(held.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(held, (tuple, list)):
        return f"({', '.join(map(_described, held))})"
    if isinstance(held, (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return str(held)
    return ""


def _label(held: torch.Tensor) -> str:
    if held.dim() not in (4, 5) or held.layout is not torch.strided:
        return ""
    shape, stride = held.shape, held.stride()
    static = all(type(each) is int for each in (*shape, *stride))
    found = _order(tuple(shape), stride) if static else order_of(held)
    return found if found in ("contiguous", "channels_last") else ""


@functools.lru_cache(maxsize=1024)
def _order(shape: tuple[int, ...], stride: tuple[int, ...]) -> str:
    return order_of(torch.empty_strided(shape, stride, device="meta"))
