"""OpenVINO's profile: nodes by name; of each the compiled model lists the nodes that were fused into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.layers.onnx_graph import OnnxLayers
from benchmarks.layers.part import Part, other_kind

_LAYERS = (
    "Convolution",
    "GroupConvolution",
    "Deconvolution",
    "GroupDeconvolution",
    "FullyConnected",
    "MatMul",
)


class Executed(NamedTuple):
    """A node that was run: its name, its type, its kernel, and the seconds that it took."""

    name: str
    kind: str
    kernel: str
    seconds: float


def parts_of(
    nodes: Sequence[Executed], originals: Mapping[str, Sequence[str]], graph: OnnxLayers
) -> list[Part]:
    """The parts of one call.

    Args:
        nodes: that were run, in order.
        originals: the names of the ONNX nodes in each.
        graph: which of these are layers.
    """
    parts = []
    for name, kind, kernel, seconds in nodes:
        inside = [graph.of_node(each) for each in originals.get(name, ())]
        found = tuple(position for each in inside for position in each or ())
        is_certain = bool(inside) and None not in inside
        if found or (kind in _LAYERS and not is_certain):
            parts.append(Part(name, seconds, found if is_certain else None, kernel=kernel))
        else:
            parts.append(Part(name, seconds, (), other_kind(kind)))
    return parts
