"""Measuring ahead of compiling: all that the layout plans of a model depend on, on this device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from fxpasses.backend.compilation import Compilation
from fxpasses.backend.rewriting import rewrite
from fxpasses.backend.undisturbed import undisturbed
from fxpasses.devices.own import own_store
from fxpasses.options import Options
from fxpasses.passes.layout.assign import device_of
from fxpasses.passes.layout.boundary import boundary_of, joint_context
from fxpasses.passes.layout.passes import plan_and_carry_out
from fxpasses.passes.layout.sources import CostSource
from fxpasses.passes.layout.tuning import Tuner
from fxpasses.report.report import Report
from fxpasses.torch_internals.aot_autograd import see_joint_graph
from fxpasses.torch_internals.dynamo import fresh_call


def tune(
    model: Callable[..., Any],
    inputs: Sequence[Any],
    options: Options,
    seconds: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Measures what the layout plans of a model depend on, and adds it to the device's store.

    The model is traced by Dynamo and AOTAutograd, and run once; nothing is compiled. Buffers and the state of
    the random generators are put back afterwards. Gradients count as wanted if they are on.

    Args:
        model: a module or function.
        inputs: the arguments of one call.
        options: what the user chose.
        seconds: how long to measure, for each of the model's graphs.
        progress: is told how many measurements are done, and how many there will be at most.

    Returns:
        A report with the plans that compiling would now make.
    """
    reports: list[Report] = []

    def measured(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compilation = Compilation(gm, example_inputs, options)
        rewrite(compilation)

        def see(joint: GraphModule) -> None:
            context = joint_context(joint.graph)
            own = own_store(device_of(context))
            tuner = Tuner(own, device_of(context), seconds, thorough=True, progress=progress)
            source = CostSource(own.profile(), tuner)
            boundary = boundary_of(context, frees=options.io == "any")
            outcome = plan_and_carry_out(
                context, "auto", source, boundary=boundary, dry_run=True, for_inductor=True
            )
            reports.append(Report(remarks=outcome.remarks, layout=outcome.layout, dry_run=True))

        see_joint_graph(compilation.graph_module, example_inputs, see)
        return gm.forward

    with undisturbed(model):
        torch.compile(fresh_call(), backend=measured)(model, tuple(inputs))
    return replace(Report.merge(reports), dry_run=True)
