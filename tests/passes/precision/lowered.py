"""What the tests of a lower precision share: a program and the graph that it became."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

import fxpasses
from fxpasses.graph.metadata import tensor

LOWER = {"precision": "bfloat16", "profit": "always", "inner": "eager"}
"""Whatever the CPU of the tests is fast in."""


class Lowered:
    """A program compiled without inductor, and the graphs that were handed on."""

    def __init__(self, model: Callable[..., Any], **options: Any) -> None:
        self.graphs: list[Graph] = []
        chosen = {**LOWER, "inner": self._keep, **options}
        dynamic = chosen.pop("dynamic", None)
        self._compiled = torch.compile(model, backend="fxpasses", options=chosen, dynamic=dynamic)

    def _keep(self, graph_module: GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(graph_module.graph)
        return graph_module.forward

    def __call__(self, *inputs: Any) -> Any:
        with torch.no_grad():
            return self._compiled(*inputs)

    @property
    def report(self) -> fxpasses.Report:
        report = fxpasses.last_report()
        assert report is not None
        return report

    @property
    def graph(self) -> Graph:
        return self.graphs[-1]

    def in_bfloat16(self) -> list[Node]:
        """The nodes of the graph that give bfloat16, in its order, without casts."""
        return [node for node in self.graph.nodes if gives(node, torch.bfloat16) and not is_cast(node)]

    def casts(self) -> list[tuple[Node, torch.dtype]]:
        """What is cast, and to what."""
        return [(node.args[0], node.args[1]) for node in self.graph.nodes if is_cast(node)]


def gives(node: Node, dtype: torch.dtype) -> bool:
    found = tensor(node)
    return found is not None and found.dtype == dtype and node.op.startswith("call")


def is_cast(node: Node) -> bool:
    return node.op == "call_method" and node.target == "to"


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())
