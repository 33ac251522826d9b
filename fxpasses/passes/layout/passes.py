"""The pass `layout` over graphs that are run as they are: plan, then copies in the graph.

With ``layout="auto"`` a plan is carried out only where it wins by more than its prediction may be off, and,
where nothing may be measured while compiling, at least half of the graph's convolutions have been measured: a
roofline is good for a prediction, which is reported, but does not justify a change.
Graphs for inductor are planned later, on its joint graph, where forward and backward are seen together
(`inductor`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from torch.fx import Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.locations import location_of
from fxpasses.options import Options
from fxpasses.passes.layout.assign import Assignment, Goal, assign, device_of
from fxpasses.passes.layout.boundary import Boundary, boundary_of
from fxpasses.passes.layout.convolutions import read_convolution
from fxpasses.passes.layout.edits import NotMaterialisedError, UnrestorableError
from fxpasses.passes.layout.materialise import materialise
from fxpasses.passes.layout.network import UnplannableError
from fxpasses.passes.layout.sensitivity import nearest_flip, uncertainty
from fxpasses.passes.layout.sources import CostSource, cost_source
from fxpasses.passes.layout.stock import stock_plan
from fxpasses.report.data import Remark
from fxpasses.report.layout_plan import DECISIONS, LayoutPlan
from fxpasses.rewrite.graph_pass import GraphPass, Outcome

NAME = "layout"


def run(context: GraphContext, options: Options) -> Outcome:
    """Assigns memory layouts to the tensors of a graph that is run as it is."""
    if options.layout == "off" or (context.executor == "fused" and options.inner == "inductor"):
        return Outcome()
    found = map(read_convolution, context.graph.nodes)
    source = cost_source(device_of(context), options, [read for read in found if read is not None])
    boundary = boundary_of(context, frees=options.io == "any")
    return plan_and_carry_out(context, options.layout, source, boundary=boundary)


def plan_and_carry_out(
    context: GraphContext,
    goal: Goal,
    source: CostSource,
    names: Mapping[str, str] | None = None,
    *,
    boundary: Boundary | None = None,
    dry_run: bool = False,
    for_inductor: bool = False,
) -> Outcome:
    """Plans the layouts of one graph, and carries the plan out where it pays.

    Args:
        context: the graph; it is changed in place.
        goal: as in `assign`, as are `names`.
        source: where the costs come from.
        names: what the user calls the graph's inputs.
        boundary: which results the plan may lay out; None for none.
        dry_run: whether to leave the graph as it is, whatever pays.
        for_inductor: whether the plan is to be compared with what inductor would do by itself.
    """
    try:
        assignment = assign(context, goal, source.profile, names, source.tuner, boundary)
    except UnplannableError as error:
        return Outcome((remark("declined", "shared-storage", str(error), context),))
    if not assignment.plan.convolutions:
        return Outcome()
    if goal == "auto":
        assignment = weighed(context, assignment, source, for_inductor=for_inductor)
    plan = assignment.plan
    if plan.decision in ("no-profile", "not-measured"):
        return Outcome(layout=plan.not_carried_out(plan.decision))
    if plan.is_contiguous and not plan.cut_edges:
        if plan.decision == "as-stock":
            return Outcome((_done(plan, context),), layout=plan.not_carried_out("as-stock"))
        return Outcome(layout=plan.not_carried_out("no-gain"))
    if goal != "auto" and for_inductor:
        assignment = assignment.with_plan(stock=stock_plan(context, assignment)[0])
    if dry_run:
        plan = assignment.plan
        return Outcome((_done(plan, context), *_unsafe(context, assignment)), layout=plan)
    return _carry_out(context, assignment)


def weighed(
    context: GraphContext, assignment: Assignment, source: CostSource, *, for_inductor: bool
) -> Assignment:
    """The plan, or what would be done without it where it does not win for certain.

    Args:
        context: the graph, as yet unchanged.
        assignment: of least predicted cost.
        source: where its costs come from.
        for_inductor: whether stock inductor would choose the layouts; else they are as traced.
    """
    plan = assignment.plan
    if source.profile is None:
        return assignment.with_plan(decision="no-profile")
    if plan.tuning is None and not enough(plan.measured, len(plan.convolutions)):
        return assignment.with_plan(decision="not-measured")
    network, hints = assignment.network, assignment.hints
    stock = None
    if for_inductor:
        stock, otherwise = stock_plan(context, assignment)
    else:
        otherwise = network.traced_labels()
    found = assignment.with_plan(
        stock=stock,
        otherwise_seconds=assignment.problem.energy(otherwise),
        uncertainty=uncertainty(network, assignment.labels, otherwise, hints),
        nearest_flip=nearest_flip(network, assignment.problem, assignment.labels, hints),
    )
    if found.plan.gain > found.plan.uncertainty or otherwise == list(assignment.labels):
        return found
    return found.relabelled(otherwise).with_plan(decision="as-stock", foregone=found.plan.gain)


def enough(measured: int, convolutions: int) -> bool:
    """Whether so many measured convolutions, of so many, justify a change."""
    return 2 * measured >= convolutions


def _carry_out(context: GraphContext, assignment: Assignment) -> Outcome:
    kept: list[Remark] = []
    while True:
        plan = assignment.plan
        try:
            carried = materialise(context, assignment)
            break
        except UnrestorableError as error:
            nearest = assignment.keeping(error.nodes)
            kept += [_kept(node, strides, context) for node, strides in error.nodes.items()]
            if nearest is None:
                return Outcome(tuple(kept), layout=plan.not_carried_out("failed"))
            assignment = nearest
        except NotMaterialisedError as error:
            failed = remark("failed", "rewrite-error", str(error), context)
            return Outcome((failed,), layout=plan.not_carried_out("failed"))
    plan = replace(
        plan,
        copies=carried.copies,
        repairs=carried.repairs,
        causes=dict(carried.causes),
        forcing=dict(carried.forcing),
    )
    remarks = (_done(plan, context), *_unsafe(context, assignment), *dict.fromkeys(kept))
    return Outcome(remarks, changed=True, layout=plan)


def _kept(node: Node, strides: str, context: GraphContext) -> Remark:
    """The remark of a tensor that somebody needs with its traced strides, which no copy has."""
    message = f"{node} stays as it was traced: no copy has {strides}"
    return Remark(
        NAME,
        "declined",
        "unrestorable-strides",
        message,
        node=node.name,
        location=location_of(node),
        stage="check",
        graph=context.path,
    )


def _done(plan: LayoutPlan, context: GraphContext) -> Remark:
    if plan.decision != "as-stock":
        return applied(plan, context.path)
    message = f"{DECISIONS['as-stock']}: {plan.foregone * 1e3:.3f} ± {plan.uncertainty * 1e3:.3f} ms"
    return remark("declined", "not-certain", message, context)


def _unsafe(context: GraphContext, assignment: Assignment) -> tuple[Remark, ...]:
    unsafe = assignment.network.unsafe
    return tuple(unsafe_remark(node, reason, context.path) for node, reason in unsafe.items())


def unsafe_remark(node: Node, reason: str, path: str = "") -> Remark:
    """The remark of an operator that stays contiguous because its channels-last kernel is wrong."""
    message = f"{node} stays contiguous: {reason}"
    return Remark(
        NAME,
        "declined",
        "unsafe-kernel",
        message,
        node=node.name,
        location=location_of(node),
        stage="check",
        graph=path,
    )


def applied(plan: LayoutPlan, path: str = "") -> Remark:
    """The remark of a plan that was carried out."""
    message = (
        f"{plan.converted} of {len(plan.labels)} tensors in another layout, {plan.copies} copies; predicted "
        f"{plan.seconds * 1e3:.3f} ms, all contiguous {plan.contiguous_seconds * 1e3:.3f} ms, "
        f"all channels_last {plan.channels_last_seconds * 1e3:.3f} ms"
    )
    return Remark(NAME, "applied", "applied", message, node="", stage="applied", graph=path)


def remark(status: Literal["declined", "failed"], code: str, message: str, context: GraphContext) -> Remark:
    """A remark about a whole graph."""
    return Remark(NAME, status, code, message, node="", stage="check", graph=context.path)


LAYOUT = GraphPass(NAME, run, last=True)
