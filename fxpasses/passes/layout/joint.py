"""The pass `layout` inside inductor, on the joint graph of forward and backward.

Inductor's own layout optimisation is one decision for a whole graph, so it is switched off, and its lowering
of convolutions then follows the strides in the graph's metadata, which the plan has set. Outputs, gradients
and inputs that are written to keep the strides of the traced graph: the plan restores them in the graph. It
does not restore results that are free (`fxpasses.passes.layout.boundary`): inductor gives them the strides
that they have in the graph when the passes are done.

Inductor's caches return what they hold without running any pass. The key of our pass covers its sources, the
option and the device profile; the plan is kept beside the cached artifact and read from there on a hit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fxpasses.devices.profile import (
    CONVOLUTION_FORWARD,
    CONVOLUTION_INPUT_GRAD,
    CONVOLUTION_WEIGHT_GRAD,
)
from fxpasses.devices.unsafe import OVERRUN, overruns
from fxpasses.graph.collector import collector_paused
from fxpasses.graph.context import GraphContext
from fxpasses.graph.levels import nested_graphs
from fxpasses.graph.metadata import tensor
from fxpasses.graph.modes import Modes
from fxpasses.graph.names import canonical
from fxpasses.graph.views import CONVOLUTIONS
from fxpasses.options import Options
from fxpasses.passes.layout.assign import Goal, device_of
from fxpasses.passes.layout.boundary import boundary_of, free_positions, joint_context
from fxpasses.passes.layout.convolutions import ConvolutionReading, read_convolution, weight_trains
from fxpasses.passes.layout.eager_strides import correct_weight_gradients
from fxpasses.passes.layout.labels import Kind, kind_of
from fxpasses.passes.layout.lines import Lines, read_line
from fxpasses.passes.layout.passes import (
    NAME,
    enough,
    plan_and_carry_out,
    unsafe_remark,
)
from fxpasses.passes.layout.sources import CostSource, cost_source
from fxpasses.report import sidecar
from fxpasses.report.data import Remark
from fxpasses.report.drawer import draw_graphs
from fxpasses.report.drawing import GraphDrawing
from fxpasses.report.layout_plan import LayoutPlan
from fxpasses.report.report import Report
from fxpasses.rewrite.graph_pass import Outcome
from fxpasses.torch_internals.aot_autograd import is_module_tensor
from fxpasses.torch_internals.inductor import inductor_setting, record_result_strides, with_joint_pass
from fxpasses.torch_internals.tensors import storage_key

_OWN_DECISIONS = ("layout_optimization", "freezing")
"""Settings of inductor by which a user takes the decision about layouts from us."""


@dataclass
class JointLayout:
    """The layout pass of one compilation.

    Attributes:
        goal: what was asked for.
        source: where the costs come from.
        graph_key: what names the graph among all that are compiled with these options.
        frees_results: whether results may have other strides than eager's.
        plans_lines: whether convolutions of one dimension are planned, too.
        inputs: names and sizes of the graph's inputs, before inductor gave them names of its own.
        parameters: the names of those that are parameters or buffers.
    """

    goal: Goal
    source: CostSource
    graph_key: str
    frees_results: bool = False
    plans_lines: bool = False
    inputs: tuple[tuple[str, str], ...] = ()
    parameters: frozenset[str] = frozenset()
    _patches: Mapping[str, Any] = field(default_factory=dict)
    _outcomes: list[Outcome] = field(default_factory=list)
    _graphs: list[GraphDrawing] = field(default_factory=list)

    def see(self, graph_module: GraphModule, inputs: Sequence[Any]) -> None:
        """Learns what the inputs of the graph that is handed on are called.

        Args:
            graph_module: the graph.
            inputs: its example inputs.
        """
        placeholders = graph_module.graph.find_nodes(op="placeholder")
        self.parameters = frozenset(canonical(node.name) for node in placeholders if is_module_tensor(node))
        self.inputs = tuple(
            (canonical(node.name), _sizes(given)) for node, given in zip(placeholders, inputs, strict=False)
        )

    def patches(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Inductor's settings with this pass among them."""
        self._patches = given
        return {**with_joint_pass(given, self._run, lambda: self._key), "layout_optimization": False}

    def completed(self, report: Report) -> Report:
        """The report with what this pass did, or with what it did when the artifact was made."""
        if self._outcomes:
            remarks = tuple(remark for outcome in self._outcomes for remark in outcome.remarks)
            plan = next((outcome.layout for outcome in self._outcomes if outcome.layout is not None), None)
            graphs = tuple(self._graphs)
            self._keep(remarks, plan, graphs)
        else:
            remarks, plan, graphs = self._kept()
        return replace(
            report,
            remarks=(*report.remarks, *remarks),
            layout=plan or report.layout,
            io=plan.boundary if plan and self.frees_results else report.io,
            graphs=(*report.graphs, *graphs),
        )

    def _run(self, graph: Graph) -> None:
        assert graph.owning_module is not None
        context = joint_context(graph)
        with collector_paused():
            correct_weight_gradients(context)
            before = draw_graphs([context], "joint-before")
            lines = Lines(context) if self.plans_lines else None
            if lines:
                context = joint_context(graph)
            names = _names_in(graph, self.inputs)
            boundary = boundary_of(context, self.parameters, names, frees=self.frees_results)
            positions = free_positions(graph, boundary.free)
            outcome = plan_and_carry_out(
                context, self.goal, self.source, names, boundary=boundary, for_inductor=True
            )
            if lines and not outcome.changed:
                lines.undo()
            record_result_strides(graph, positions)
            drawn = before and outcome.changed
            after = draw_graphs([context], "joint-after", inf) if drawn else ()
        self._outcomes.append(outcome)
        self._graphs += before
        for drawing in after:
            written = dict.fromkeys(drawing.names - before[0].names, "written")
            plan = outcome.layout
            drawing = drawing.with_statuses(written)
            self._graphs.append(drawing.with_copies_of(plan, before[0]) if plan else drawing)

    @functools.cached_property
    def _key(self) -> str:
        """What the plan depends on besides the graph."""
        measures = str(self.source.tuner is not None)
        settings = (str(self.frees_results), str(self.plans_lines))
        return sidecar.digest(sidecar.sources(), self.goal, self.source.key, measures, *settings)

    # The plan beside the artifact.

    @property
    def _name(self) -> str:
        return sidecar.digest(self._key, self.graph_key, str(sorted(self._patches)))

    def _keep(
        self, remarks: Sequence[Remark], plan: LayoutPlan | None, graphs: Sequence[GraphDrawing]
    ) -> None:
        data = {
            "remarks": [asdict(remark) for remark in remarks],
            "plan": plan.to_dict() if plan else None,
            "graphs": [drawing.to_dict() for drawing in graphs],
        }
        sidecar.save(self._name, data, self._patches)

    def _kept(self) -> tuple[tuple[Remark, ...], LayoutPlan | None, tuple[GraphDrawing, ...]]:
        try:
            data = sidecar.load(self._name)
            remarks = tuple(Remark(**fields) for fields in data["remarks"])
            graphs = tuple(GraphDrawing.from_dict(fields) for fields in data["graphs"])
            return remarks, LayoutPlan.from_dict(data["plan"]) if data["plan"] else None, graphs
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            message = "the graph came from inductor's cache, and the record of its layout plan is gone"
            return (Remark(NAME, "declined", "no-record", message, node="", stage="check"),), None, ()


def joint_layout(
    graph_module: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    *,
    graph_key: str = "",
    shared: bool = False,
) -> JointLayout | None:
    """The layout pass for a graph that goes to inductor; None where stock inductor is to decide.

    Args:
        graph_module: the rewritten graph.
        inputs: its example inputs.
        options: what the user chose.
        graph_key: what names the graph among all that are compiled.
        shared: whether results share memory, as `results_share_memory` tells.
    """
    if options.layout == "off" or options.inner != "inductor" or not _selected(options):
        return None
    devices = [given.device for given in inputs if isinstance(given, torch.Tensor)]
    reads = _wanted(graph_module)
    source = cost_source(devices[0], options, reads) if devices and reads else CostSource(None)
    goal: Goal = options.layout
    plans_lines = goal != "contiguous"
    if options.layout == "auto":
        # Stock inductor decides where too little was measured, and where the user told it how to.
        if _decided_by_user(options):
            return None
        if source.tuner is None and not (reads and enough(source.known, len(reads))):
            if not _must_not_be_stocks(graph_module, devices, shared=shared):
                return None
            # As stock inductor on a CPU, but for what it would get wrong.
            goal, plans_lines = "channels_last", False
    found = JointLayout(goal, source, graph_key, options.io == "any", plans_lines)
    found.see(graph_module, inputs)
    return found


def _decided_by_user(options: Options) -> bool:
    """Whether settings of inductor's own say what becomes of layouts."""
    return any(name in options.inductor for name in _OWN_DECISIONS) or bool(
        inductor_setting("freezing", options.inductor)
    )


def _must_not_be_stocks(graph_module: GraphModule, devices: Sequence[torch.device], *, shared: bool) -> bool:
    """Whether inductor's own layout optimisation would give wrong answers."""
    return (shared and devices[0].type == "cpu") or bool(_unsafe(graph_module))


def without_unsafe_kernels(
    graph_module: GraphModule, options: Options, *, shared: bool = False
) -> tuple[Remark, ...]:
    """Why inductor's layout optimisation is to be switched off where the user left the decision to it.

    Returns:
        A remark for every convolution that the optimisation would have computed wrongly, and one where
        results share memory; empty where there is none, where nobody has a say in it (another inner
        backend), or where the user asked for it by name.
    """
    if options.inner != "inductor" or "layout_optimization" in options.inductor:
        return ()
    remarks = [unsafe_remark(node, OVERRUN) for node in _unsafe(graph_module)]
    if shared:
        message = "results share memory, whose strides inductor's layout optimisation would change"
        remarks.append(Remark(NAME, "declined", "shared-results", message, node="", stage="check"))
    return tuple(remarks)


def results_share_memory(graph_module: GraphModule) -> bool:
    """Whether results of a graph from Dynamo that take a gradient are views of one tensor.

    AOTAutograd (2.11 to 2.15) then returns that tensor and takes the views again, outside the compiled code.
    Inductor's layout optimisation keeps the strides of results, and does not count it among them: the views
    fail, or are of other elements.
    """
    (output,) = graph_module.graph.find_nodes(op="output")
    found = [result for result in map(tensor, output.all_input_nodes) if result is not None]
    given = [tensor(node) for node in graph_module.graph.find_nodes(op="placeholder")]
    inputs = {storage_key(argument) for argument in given if argument is not None}
    keys = [storage_key(result) for result in found if result.requires_grad]
    made = [key for key in keys if key not in inputs]
    return len(set(made)) < len(made) and any(True for _ in _convolutions(graph_module))


def _unsafe(graph_module: GraphModule) -> list[Node]:
    """The convolutions whose weight's gradient must not be computed channels-last."""
    if not torch.is_grad_enabled():
        return []
    found = []
    for graph in _all_graphs(graph_module):
        context = GraphContext(graph, Modes(grad=True))
        for node, (sizes, dtype, _, activations) in _convolutions(graph):
            given = tensor(activations[0])
            if given is not None and overruns(sizes, dtype, given.device) and weight_trains(context, node):
                found.append(node)
    return found


def _wanted(graph_module: GraphModule) -> list[ConvolutionReading]:
    """The convolutions of a graph; with gradients on, those too."""
    gradients = (CONVOLUTION_INPUT_GRAD, CONVOLUTION_WEIGHT_GRAD) if torch.is_grad_enabled() else ()
    nodes = [node for graph in _all_graphs(graph_module) for node in graph.graph.nodes]
    found = (read_line(node) or read_convolution(node) for node in nodes if _may_be_planned(node))
    reads = [read for read in found if read is not None]
    return [read._replace(directions=(CONVOLUTION_FORWARD, *gradients)) for read in reads]


def _may_be_planned(node: Node) -> bool:
    return kind_of(node) is Kind.PREFERRING or node.target in CONVOLUTIONS


def _all_graphs(graph_module: GraphModule) -> list[GraphModule]:
    """A graph and those that its operators run, such as checkpointed ones."""
    return [graph_module, *(child for _, child, _ in nested_graphs(graph_module))]


def _convolutions(graph_module: GraphModule) -> Iterator[tuple[Node, ConvolutionReading]]:
    """Every convolution of one graph that can be read."""
    for node in graph_module.graph.nodes:
        read = read_convolution(node) if kind_of(node) is Kind.PREFERRING else None
        if read is not None:
            yield node, read


def foreseen(
    context: GraphContext,
    options: Options,
    report: Report,
    *,
    shared: bool = False,
    measures: bool = True,
) -> Report:
    """The report of a dry run, with the plan that the forward alone would get inside inductor.

    Args:
        context: the rewritten graph, which stays as it is; inductor would see its backward as well.
        options: what the user chose.
        report: what has happened so far.
        shared: whether results share memory, as `results_share_memory` tells.
        measures: whether compiling would measure what is not known; the dry run does not.
    """
    if options.inner != "inductor":
        return report
    by_user = options.layout == "auto" and _decided_by_user(options)
    if options.layout == "off" or by_user or not _selected(options):
        unsafe = without_unsafe_kernels(context.module, options, shared=shared)
        return replace(report, remarks=(*report.remarks, *unsafe))
    goal, reads, device = options.layout, _wanted(context.module), device_of(context)
    source = cost_source(device, replace(options, tune_seconds=0), reads)
    known = measures or (reads and enough(source.known, len(reads)))
    if goal == "auto" and not known and _must_not_be_stocks(context.module, [device], shared=shared):
        goal = "channels_last"
    names = {node.name: canonical(node.name) for node in context.graph.find_nodes(op="placeholder")}
    boundary = boundary_of(context, frees=options.io == "any")
    outcome = plan_and_carry_out(
        context, goal, source, names, boundary=boundary, dry_run=True, for_inductor=True
    )
    plan = outcome.layout
    wanted = bool(report.graphs) and plan is not None and plan.decision != "no-gain"
    drawn = draw_graphs([context], "planned", inf) if wanted else ()
    graphs = (*report.graphs, *(drawing.with_plan(plan) for drawing in drawn if plan is not None))
    io = plan.boundary if plan is not None and options.io == "any" else ()
    return replace(report, remarks=(*report.remarks, *outcome.remarks), layout=plan, io=io, graphs=graphs)


def _names_in(graph: Graph, inputs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """What AOTAutograd's inputs were called before, as far as their order and sizes tell."""
    placeholders = [
        node for node in graph.find_nodes(op="placeholder") if not node.name.startswith("tangents")
    ]
    return {
        node.name: name
        for node, (name, sizes) in zip(placeholders, inputs, strict=False)
        if _sizes(node.meta.get("val")) == sizes
    }


def _sizes(given: object) -> str:
    return str(tuple(given.shape)) if isinstance(given, torch.Tensor) else ""


def _selected(options: Options) -> bool:
    return NAME not in options.disable and (options.passes is None or NAME in options.passes)
