"""What is kept for the backward pass, read off the two graphs that the joint graph is split into.

    forward    x ── conv ── relu ──> result          relu is kept: the backward pass reads it
    backward   relu, gradient ── le, where ──>       what both graphs compute is computed again

Parameters, buffers and inputs live anyway, so neither they nor views of them count. Memory counts once,
however many views of it are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch.fx import Graph, GraphModule, Node

from fxpasses.graph.locations import location_of, module_of
from fxpasses.graph.metadata import tensor
from fxpasses.graph.names import base_name
from fxpasses.graph.provenance import provenance_of
from fxpasses.graph.storage import base_of
from fxpasses.report import sidecar
from fxpasses.report.report import Report
from fxpasses.report.saved import Fate, SavedTensor
from fxpasses.torch_internals.inductor import joint_key, with_partition_seen
from fxpasses.torch_internals.sizes import size_hint

_NAME = "saved_tensors"


def saved_tensors(forward: Graph, backward: Graph, results: int) -> list[SavedTensor]:
    """What the backward pass reads of the forward pass: what is kept, then what is computed again.

    Args:
        forward: the first part of a joint graph.
        backward: the second.
        results: how many of what the forward gives are results; the others are kept.
    """
    given: Any = forward.output_node().args[0]
    inputs = {node.name: node for node in backward.find_nodes(op="placeholder")}
    kept: list[SavedTensor] = []
    counted: set[Node] = set()
    for node in dict.fromkeys(given[results:]):
        base = base_of(node) if isinstance(node, Node) and tensor(node) is not None else None
        if base is None or base.op == "placeholder":
            continue
        size = 0 if base in counted else _bytes(base)
        counted.add(base)
        kept.append(_described(node, size, inputs.get(node.name), "kept"))
    return kept + _recomputed(forward, backward)


def _recomputed(forward: Graph, backward: Graph) -> list[SavedTensor]:
    """What the backward pass computes as the forward does, where its own work reads that."""
    names = {node.name for node in forward.nodes if node.op == "call_function"}
    again = {node for node in backward.nodes if node.op == "call_function" and node.name in names}
    return [
        _described(node, _bytes(node), node, "recomputed")
        for node in backward.nodes
        if node in again and tensor(node) is not None and not again.issuperset(node.users)
    ]


def _described(node: Node, size: int, read: Node | None, fate: Fate) -> SavedTensor:
    found = tensor(node)
    assert found is not None
    told = provenance_of(node)
    return SavedTensor(
        name=node.name,
        operator=base_name(node),
        shape="x".join(map(str, found.shape)) or "scalar",
        dtype=str(found.dtype).removeprefix("torch."),
        bytes=size,
        readers=tuple(dict.fromkeys(base_name(user) for user in read.users)) if read is not None else (),
        fate=fate,
        rule=told[-1].rule if told else "",
        module=module_of(node),
        location=location_of(node),
    )


def _bytes(node: Node) -> int:
    """The size of a tensor's memory, with symbolic sizes as they were traced."""
    found = tensor(node)
    if found is None or 0 in map(size_hint, found.shape):
        return 0
    steps = zip(map(size_hint, found.shape), map(size_hint, found.stride()), strict=True)
    return found.element_size() * (1 + sum((size - 1) * stride for size, stride in steps))


@dataclass
class SavedTensors:
    """What one compilation keeps, seen as inductor splits the joint graph.

    Attributes:
        graph_key: what names the graph among all that are compiled.
    """

    graph_key: str
    _patches: Mapping[str, Any] = field(default_factory=dict)
    _found: list[SavedTensor] | None = None

    def patches(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Inductor's settings with an observer of the split among them."""
        self._patches = given
        return with_partition_seen(given, self._see, (_NAME, sidecar.sources()))

    def completed(self, report: Report) -> Report:
        """The report with what is kept, or with what was when the artifact was made."""
        if self._found is not None:
            sidecar.save(self._name, [asdict(one) for one in self._found], self._patches)
            return replace(report, saved=tuple(self._found))
        try:
            found = tuple(map(SavedTensor.from_dict, sidecar.load(self._name)))
        except (OSError, ValueError, TypeError, KeyError):
            return report
        return replace(report, saved=found)

    @functools.cached_property
    def _name(self) -> str:
        passes = joint_key(self._patches)
        return sidecar.digest(_NAME, sidecar.sources(), passes, self.graph_key, str(sorted(self._patches)))

    def _see(self, forward: GraphModule, backward: GraphModule, results: int) -> None:
        self._found = [*(self._found or ()), *saved_tensors(forward.graph, backward.graph, results)]
