"""Results of a graph without a layout plan, with `io="any"`: kernels over kept weights choose their layout.

    packed convolution ── relu ── result      channels-last, as the kernel writes it; eager's is contiguous

Inductor computes all strides anew when the passes are done, and gives results those. The same is done here,
so that the report says which layout a result has. One that would come out in neither is put into eager's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fxpasses.graph.layouts import C, L, Label, order_of
from fxpasses.graph.metadata import tensor
from fxpasses.graph.names import canonical
from fxpasses.passes.layout.boundary import boundary_of, joint_context
from fxpasses.passes.weights.stride_order import in_order
from fxpasses.report import sidecar
from fxpasses.report.data import Remark
from fxpasses.report.layout_plan import BoundaryTensor
from fxpasses.report.report import Report
from fxpasses.torch_internals.aot_autograd import is_module_tensor
from fxpasses.torch_internals.fake_tensors import outputs_anew
from fxpasses.torch_internals.inductor import with_joint_pass
from fxpasses.torch_internals.pytree import tree_leaves

NAME = "io"


@dataclass
class GivenResults:
    """The pass of one compilation, after all others.

    Attributes:
        reads_kept_weights: whether the graph does, so that results may have other strides than eager's.
        graph_key: what names the graph among all that are compiled with these options.
        names: of the inputs, those of parameters and buffers left empty; known when the graph is handed on.
    """

    reads_kept_weights: bool
    graph_key: str
    names: Sequence[str] = ()
    _found: tuple[BoundaryTensor, ...] | None = None
    _patches: Mapping[str, Any] = field(default_factory=dict)

    def see(self, graph_module: GraphModule) -> None:
        """Learns the names of the inputs of the graph that is handed on."""
        placeholders = graph_module.graph.find_nodes(op="placeholder")
        self.names = ["" if is_module_tensor(node) else canonical(node.name) for node in placeholders]

    def patches(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Inductor's settings with this pass among them."""
        self._patches = given
        return with_joint_pass(given, self._run, lambda: self._key)

    def completed(self, report: Report) -> Report:
        """The report with what the graph takes and gives."""
        if self._found is not None:
            sidecar.save(self._name, [asdict(each) for each in self._found], self._patches)
        else:
            try:
                self._found = tuple(BoundaryTensor(**fields) for fields in sidecar.load(self._name))
            except (OSError, ValueError, TypeError):
                message = "the graph came from inductor's cache, and the record of its results is gone"
                gone = Remark(NAME, "declined", "no-record", message, node="", stage="check")
                return replace(report, remarks=(*report.remarks, gone))
        remarks = report.remarks
        if not self.reads_kept_weights and any(each.kind == "result" for each in self._found):
            message = "results have eager's strides: without a plan, layouts are inductor's"
            remarks = (*remarks, Remark(NAME, "declined", "no-plan", message, node="", stage="check"))
        return replace(report, io=self._found, remarks=remarks)

    @functools.cached_property
    def _key(self) -> str:
        return sidecar.digest(NAME, sidecar.sources(), str(self.reads_kept_weights))

    @property
    def _name(self) -> str:
        return sidecar.digest(self._key, self.graph_key, str(sorted(self._patches)))

    def _run(self, graph: Graph) -> None:
        context = joint_context(graph)
        placeholders = graph.find_nodes(op="placeholder")
        names = {
            node.name: name for node, name in zip(placeholders, self.names, strict=False) if name != node.name
        }
        boundary = boundary_of(context, ("",), names)
        found = []
        for node in boundary.inputs:
            came = _label_of(tensor(node))
            if came is not None and node.users:
                found.append(BoundaryTensor(names.get(node.name, node.name), "input", came, came))
        now = self._laid_out_now(graph)
        for node in boundary.results:
            eager = _label_of(tensor(node))
            if eager is None:
                continue
            label = now.get(node, eager)
            if label is None:
                ordered = in_order(graph, node, planar=eager == C)
                graph.output_node().prepend(ordered)
                graph.output_node().replace_input_with(node, ordered)
            found.append(BoundaryTensor(node.name, "result", label or eager, eager))
        self._found = tuple(found)

    def _laid_out_now(self, graph: Graph) -> dict[Node, Label | None]:
        """The layouts of results, as inductor will find them, where they may be others than eager's."""
        if not self.reads_kept_weights:
            return {}
        assert graph.owning_module is not None
        values = outputs_anew(graph.owning_module)
        given = tree_leaves(graph.output_node().args[0])
        return {
            node: _label_of(value)
            for node, value in zip(given, values, strict=True)
            if isinstance(node, Node) and isinstance(value, torch.Tensor)
        }


def _label_of(found: torch.Tensor | None) -> Label | None:
    """The layout of an image; None for what has neither."""
    order = order_of(found) if found is not None and found.dim() in (4, 5) else "other"
    return C if order == C else L if order == L else None
