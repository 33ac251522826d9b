"""Which nodes of an exported ONNX graph compute which layers, by the names of their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.layers.layer import Layer

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass
class OnnxLayers:
    """The nodes of a graph by name and by result.

    Attributes:
        by_name: the positions of the layers that nodes compute, by the nodes' names.
        uncertain: names of nodes that may compute layers whose weights have other names.
    """

    by_name: dict[str, int] = field(default_factory=dict)
    uncertain: set[str] = field(default_factory=set)
    _producers: dict[str, Any] = field(default_factory=dict)
    _results: dict[str, list[str]] = field(default_factory=dict)

    @staticmethod
    def of(graph: Any, layers: Sequence[Layer]) -> OnnxLayers:
        """Those of an `onnx.GraphProto`."""
        found = OnnxLayers()
        sizes = {one.name: tuple(one.dims) for one in graph.initializer}
        positions = {layer.name: position for position, layer in enumerate(layers)}
        uses: Counter[str] = Counter()
        for node in graph.node:
            found._results[node.name] = list(node.output)
            found._producers.update((value, node) for value in node.output)
            if node.op_type not in _LAYERS:
                continue
            weight = node.input[1]
            uses[weight] += 1
            name = f"{weight}#{uses[weight]}" if uses[weight] > 1 else weight
            position = positions.get(name)
            given = sizes.get(weight, ())
            if position is not None and layers[position].weight in (given, given[::-1]):
                found.by_name[node.name] = position
            else:
                found.uncertain.add(node.name)
        if len(found.by_name) == len(layers):
            found.uncertain.clear()  # what is left are products of images
        return found

    def of_node(self, name: str) -> tuple[int, ...] | None:
        """The layer of the node of this name, or of the node that gives a value of this name.

        Returns:
            Nothing where that node is no layer; None where it may be one, or there is none of the name.
        """
        node = None if name in self._results else self._producers.get(name)
        name = name if node is None else node.name
        if name in self.by_name:
            return (self.by_name[name],)
        return None if name in self.uncertain or name not in self._results else ()

    def results_of(self, name: str) -> list[str]:
        """The values that the node of a name gives."""
        return self._results.get(name, [])

    def behind(self, value: str, executed: Collection[str]) -> tuple[int, ...] | None:
        """The layers of a kernel that gives a value and computes what leads to it from others.

        Args:
            value: that it gives.
            executed: the values that kernels give.

        Returns:
            None where a node on the way may be a layer and is not certain to be one.
        """
        found: set[int] = set()
        pending, seen = [value], {value}
        while pending:
            node = self._producers.get(pending.pop())
            if node is None:
                continue
            if node.name in self.uncertain:
                return None
            if node.name in self.by_name:
                found.add(self.by_name[node.name])
                continue
            before = [each for each in node.input if each not in executed and each not in seen]
            seen.update(before)
            pending += before
        return tuple(sorted(found))
