"""ONNX Runtime's profile: a list of events, the nodes of each run one after another.

A node has the name that it has in the ONNX graph, or the name of the value that it gives with `_nchwc` behind
where it was written anew for blocked memory, or `fused` before the name of the node that it begins with. What
was fused into a blocked convolution are the nodes between the value that it gives and those that others give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.layers.layer import Layer
from benchmarks.layers.onnx_graph import OnnxLayers
from benchmarks.layers.part import Part, ProfileError, other_kind

_TIME = "_kernel_time"
_BLOCKED = "_nchwc"
_LAYERS = (
    "Conv",
    "FusedConv",
    "NhwcFusedConv",
    "ConvTranspose",
    "Gemm",
    "FusedGemm",
    "MatMul",
    "FusedMatMul",
)


def runs_of(events: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The events of the nodes of each run.

    Raises:
        ProfileError: there is no run, or a node that no run has.
    """
    runs = sorted(
        (event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == "model_run"
    )
    nodes = sorted(
        (event for event in events if event.get("cat") == "Node" and event["name"].endswith(_TIME)),
        key=lambda event: event["ts"],
    )
    found = [[node for node in nodes if start <= node["ts"] <= stop] for start, stop in runs]
    if not runs or sum(map(len, found)) != len(nodes):
        raise ProfileError(f"{len(nodes)} nodes of ONNX Runtime's profile are not those of {len(runs)} runs")
    return found


def parts_of(run: Sequence[Mapping[str, Any]], graph: OnnxLayers, layers: Sequence[Layer]) -> list[Part]:
    """The parts of one run."""
    names = [event["name"].removesuffix(_TIME) for event in run]
    executed: set[str] = set()
    for name in names:
        executed.update([name.removesuffix(_BLOCKED)] if name.endswith(_BLOCKED) else graph.results_of(name))
    parts = []
    for name, event in zip(names, run, strict=True):
        operator, seconds = str(event["args"].get("op_name", "")), event["dur"] * 1e-6
        if operator not in _LAYERS:
            parts.append(Part(name, seconds, (), other_kind(operator)))
            continue
        if name.endswith(_BLOCKED):
            value = name.removesuffix(_BLOCKED)
            found = graph.behind(value, executed - {value})
        else:
            found = _named(name, graph)
        if found == ():
            parts.append(Part(name, seconds, (), other_kind(operator)))
            continue
        if found is not None and not (len(found) == 1 and _fits(event, layers[found[0]])):
            found = None
        blocked = ", blocked" * name.endswith(_BLOCKED)
        parts.append(Part(name, seconds, found, kernel=operator + blocked))
    return parts


def _named(name: str, graph: OnnxLayers) -> tuple[int, ...] | None:
    """The layer of a node by its name, to which fusions add words."""
    found = graph.of_node(name)
    return graph.of_node(name.removeprefix("fused ").partition("/")[0].strip()) if found is None else found


def _fits(event: Mapping[str, Any], layer: Layer) -> bool:
    """Whether the weight that the event tells of, if any, may be the layer's with channels added."""
    shapes = [tuple(shape) for given in event["args"].get("input_type_shape", []) for shape in given.values()]
    weights = [shape for shape in shapes[1:2] if len(shape) == len(layer.weight) > 2]
    return all(
        shape[2:] == layer.weight[2:]
        and all(a >= b for a, b in zip(shape[:2], layer.weight[:2], strict=True))
        for shape in weights
    )
