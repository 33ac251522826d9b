"""How far a lower precision is from float32, on the inputs of the first call.

The graph as Dynamo gave it is run beside the compiled one, where running it twice leaves no trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxpasses.comparison import relative_norm
from fxpasses.graph.context import GraphContext
from fxpasses.graph.modes import Modes, is_switch
from fxpasses.passes.precision.operators import draws_nothing, reads_sizes
from fxpasses.torch_internals.operators import is_deterministic


def why_not_twice(graph_module: GraphModule) -> str:
    """Why a graph cannot be run once more without a trace, in words; empty where it can."""
    context = GraphContext(graph_module, Modes(grad=False))
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "get_attr") and context.is_written(node):
            return f"the program writes to {node.name}"
        if node.op.startswith("call") and not _is_repeatable(node):
            return f"{node.name} may draw random numbers or leave a trace"
    return ""


def _is_repeatable(node: Node) -> bool:
    if node.op == "call_module":
        return False
    return is_deterministic(node) or is_switch(node.target) or reads_sizes(node) or draws_nothing(node)


def errors_of(
    graph_module: GraphModule, inputs: Sequence[Any], results: Sequence[Any]
) -> tuple[float, ...] | str:
    """For each floating-point result the norm of its difference from the graph's, relative to that one's.

    Args:
        graph_module: the graph in float32, which `why_not_twice` has nothing against.
        inputs: of a call.
        results: what the call gave.

    Returns:
        The errors, or why there are none, in words.
    """
    try:
        with torch.no_grad():
            expected = graph_module(*inputs)
        pairs = [
            (found, wanted)
            for found, wanted in zip(results, expected, strict=True)
            if isinstance(wanted, torch.Tensor) and wanted.is_floating_point()
        ]
        return tuple(_error(found.detach(), wanted) for found, wanted in pairs) or "no result is a float"
    except Exception as error:  # what only compares must not fail what was asked for
        return f"{type(error).__name__}: {error}"


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    if wanted.isfinite().all() and found.isfinite().all():
        return relative_norm(found, wanted)
    return 0.0 if torch.equal(found.nan_to_num(), wanted.nan_to_num()) else float("inf")
