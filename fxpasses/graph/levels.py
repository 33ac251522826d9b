"""Capture levels: where a graph comes from, and so in which dialect a replacement is written.

================ ==================================== ==========================================
level            comes from                           a convolution is
================ ==================================== ==========================================
`TORCH`          Dynamo, `torch.fx.symbolic_trace`    `torch.conv2d`, or a call of `nn.Conv2d`
`PRE_DISPATCH`   `make_fx(pre_dispatch=True)`,        `aten.conv2d.default`
                 `torch.export`
`ATEN`           AOTAutograd, `run_decompositions()`  `aten.convolution.default`
================ ==================================== ==========================================
"""

from __future__ import annotations

import enum

import torch
from torch.fx import Graph, GraphModule, Node

from fxpasses.torch_internals.operators import HigherOrderOperator, OpOverload, is_composite


class Level(enum.Enum):
    """The capture level of a graph."""

    TORCH = "torch"
    PRE_DISPATCH = "pre_dispatch"
    ATEN = "aten"


def level_of(graph: Graph) -> Level:
    """The capture level of `graph`: the highest one that any of its nodes belongs to."""
    level = Level.ATEN
    seen: set[int] = set()  # functions, by identity: a graph repeats few of them thousands of times
    for node in graph.nodes:
        if id(node.target) in seen:
            continue
        if node.op in ("call_method", "call_module"):
            return Level.TORCH
        if node.op != "call_function" or isinstance(node.target, HigherOrderOperator):
            continue
        seen.add(id(node.target))
        if isinstance(node.target, OpOverload):
            if level is Level.ATEN and is_composite(node.target):
                level = Level.PRE_DISPATCH
        elif not _is_in_every_level(node.target):
            return Level.TORCH
    return level


def _is_in_every_level(function: object) -> bool:
    """Whether a function appears beside ATen operators too, as `getitem` and `torch.sym_sum` do."""
    module, name = getattr(function, "__module__", None), getattr(function, "__name__", "")
    return module in _IN_EVERY_LEVEL or (module == "torch" and name.startswith("sym_"))


_IN_EVERY_LEVEL = ("_operator", "math", "torch._C", "torch.amp.autocast_mode", "torch._functorch.predispatch")
"""Modules whose functions (getitem, arithmetic of sizes, mode switches) do."""


def nested_graphs(module: GraphModule) -> list[tuple[str, GraphModule, Node]]:
    """The graphs that operators of `module` run (checkpoint, cond, ...): attribute path, graph, reference.

    A graph is listed once, however many nodes refer to it.
    """
    found: dict[str, tuple[str, GraphModule, Node]] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        path = str(node.target)
        child = attribute(module, path)
        if isinstance(child, GraphModule) and path not in found:
            found[path] = (path, child, node)
    return list(found.values())


def called_by(module: GraphModule, node: Node) -> object:
    """What a node calls: a function, a method of tensors, or a module."""
    if node.op == "call_method":
        return getattr(torch.Tensor, str(node.target))
    return attribute(module, str(node.target)) if node.op == "call_module" else node.target


def attribute(module: GraphModule, path: str) -> object:
    """The attribute of `module` at a dotted path, or None when there is none."""
    value: object = module
    for name in path.split("."):
        value = getattr(value, name, None)
        if value is None:
            return None
    return value
