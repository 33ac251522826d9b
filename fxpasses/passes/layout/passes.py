"""The pass `layout` over graphs that are run as they are: plan, then copies in the graph.

With ``layout="auto"`` a plan is carried out only where at least half of the graph's convolutions have been
measured on the device: a roofline is good for a prediction, which is reported, but does not justify a change.
Graphs for inductor are planned later, on its joint graph, where forward and backward are seen together
(`inductor`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch.fx import Node

from fxpasses.devices import store
from fxpasses.devices.profile import DeviceProfile
from fxpasses.graph.context import GraphContext
from fxpasses.graph.locations import location_of
from fxpasses.options import Options
from fxpasses.passes.layout.assign import Assignment, Goal, assign, device_of
from fxpasses.passes.layout.edits import NotMaterialisedError
from fxpasses.passes.layout.materialise import materialise
from fxpasses.passes.layout.network import UnplannableError
from fxpasses.passes.layout.stock import stock_plan
from fxpasses.report.data import Remark
from fxpasses.report.layout_plan import LayoutPlan
from fxpasses.rewrite.graph_pass import GraphPass, Outcome

NAME = "layout"


def run(context: GraphContext, options: Options) -> Outcome:
    """The pass, on a graph that is run as it is."""
    if options.layout == "off" or (context.executor == "fused" and options.inner == "inductor"):
        return Outcome()
    return plan_and_carry_out(context, options.layout, profile_for(device_of(context), options))


def profile_for(device: torch.device, options: Options) -> DeviceProfile | None:
    """What was measured on a device: in the file that the user names, else as `store.find` says."""
    name = store.device_name(device)
    if options.layout_profile is not None:
        return store.load(options.layout_profile, device=name)
    return store.find(name)


def plan_and_carry_out(
    context: GraphContext,
    goal: Goal,
    profile: DeviceProfile | None,
    names: Mapping[str, str] | None = None,
    *,
    dry_run: bool = False,
    for_inductor: bool = False,
) -> Outcome:
    """Plans the layouts of one graph, and carries the plan out where it pays.

    Args:
        context: the graph; it is changed in place.
        goal: as in `assign`, as are the other two.
        profile: what was measured on the device, or None.
        names: what the user calls the graph's inputs.
        dry_run: whether to leave the graph as it is, whatever pays.
        for_inductor: whether the plan is to be compared with what inductor would do by itself.
    """
    try:
        assignment = assign(context, goal, profile, names)
    except UnplannableError as error:
        return Outcome((remark("declined", "shared-storage", str(error), context),))
    plan = assignment.plan
    if not plan.convolutions:
        return Outcome()
    if plan.is_contiguous and not plan.cut_edges:
        return Outcome(layout=replace(plan, decision="no-gain"))
    if goal == "auto" and profile is None:
        return Outcome(layout=replace(plan, decision="no-profile"))
    if goal == "auto" and not enough(plan.measured, len(plan.convolutions)):
        return Outcome(layout=replace(plan, decision="not-measured"))
    if for_inductor:
        plan = replace(plan, stock=stock_plan(context, assignment))
        assignment = replace(assignment, plan=plan)
    if dry_run:
        return Outcome((applied(plan, context.path), *_unsafe(context, assignment)), layout=plan)
    return _carry_out(context, assignment)


def enough(measured: int, convolutions: int) -> bool:
    """Whether so many measured convolutions, of so many, justify a change."""
    return 2 * measured >= convolutions


def _carry_out(context: GraphContext, assignment: Assignment) -> Outcome:
    plan = assignment.plan
    try:
        carried = materialise(context, assignment)
    except NotMaterialisedError as error:
        failed = remark("failed", "rewrite-error", str(error), context)
        return Outcome((failed,), layout=replace(plan, decision="failed"))
    plan = replace(plan, copies=carried.copies, repairs=carried.repairs)
    remarks = (applied(plan, context.path), *_unsafe(context, assignment))
    return Outcome(remarks, changed=True, layout=plan)


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


LAYOUT = GraphPass(NAME, run, after=("efficient_conv_bn_eval",))
