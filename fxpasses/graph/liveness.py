"""Liveness: how many bytes of intermediate tensors a graph has alive at once."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from fxpasses.graph.metadata import value
from fxpasses.torch_internals.pytree import tree_leaves
from fxpasses.torch_internals.sizes import size_hint


@dataclass(frozen=True)
class LiveBytes:
    """What the intermediate tensors of a graph take, at the sizes it was traced with.

    Every result counts as memory of its own until its last reader has run, so this is what one kernel an
    operator would take: views count too, and a compiler that fuses operators takes less.

    Attributes:
        largest: bytes of the largest tensor.
        peak: bytes of all that are alive at once, at most.
    """

    largest: int
    peak: int

    @staticmethod
    def of(graph: Graph) -> LiveBytes:
        """Walks the graph once; a node without metadata counts nothing."""
        nodes = [node for node in graph.nodes if node.op in ("call_function", "call_method", "call_module")]
        dying: dict[Node, list[Node]] = defaultdict(list)
        position = {node: index for index, node in enumerate(graph.nodes)}
        for node in nodes:
            dying[max((node, *node.users), key=position.__getitem__)].append(node)
        parts = {node: _tensor_bytes(node) for node in nodes}
        sizes = {node: sum(results) for node, results in parts.items()}
        alive = peak = 0
        for node in graph.nodes:
            alive += sizes.get(node, 0)
            peak = max(peak, alive)
            alive -= sum(sizes[dead] for dead in dying[node])
        return LiveBytes(max(itertools.chain.from_iterable(parts.values()), default=0), peak)


def _tensor_bytes(node: Node) -> list[int]:
    found = [tensor for tensor in tree_leaves(value(node)) if isinstance(tensor, torch.Tensor)]
    return [tensor.element_size() * math.prod(map(size_hint, tensor.shape)) for tensor in found]
