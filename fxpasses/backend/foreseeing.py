"""A dry run: what compiling a graph would do, as far as that can be told without compiling or measuring.

The rules run as they would, and of the steps those that decide whether there is a layout plan. What happens
inside inductor alone is not foretold: masks of activations, which kernel a packed weight gets, and the plan
of a backward pass (a plan is made for the forward one).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from fxpasses.backend.compilation import Compilation
from fxpasses.backend.rewriting import executor_of, rewrite
from fxpasses.backend.steps.weights import KeptWeights, PackedWeights, packs
from fxpasses.devices.sizes import ConvolutionSizes
from fxpasses.graph.context import GraphContext
from fxpasses.graph.modes import Modes
from fxpasses.graph.names import base_name
from fxpasses.kernels.choice import KernelTiming, known
from fxpasses.kernels.convolution import Sizes
from fxpasses.options import Options
from fxpasses.passes.layout.convolutions import is_weight_of, read_convolution
from fxpasses.passes.layout.joint import foreseen
from fxpasses.report.codes import CODES
from fxpasses.report.data import Attempt
from fxpasses.report.grouping import added
from fxpasses.report.report import Report
from fxpasses.torch_internals.aot_autograd import is_module_tensor
from fxpasses.torch_internals.sizes import size_hint


def foresee(compilation: Compilation, *, measures: bool) -> Report:
    """The report that compiling would give, but for what only inductor knows.

    Args:
        compilation: a graph on its way; its options must not let anything be measured.
        measures: whether compiling would measure what the layout plan lacks.
    """
    rewrite(compilation)
    compilation.own_kernels = "never"  # choosing between kernels is timing them
    packed, kept = PackedWeights(compilation), KeptWeights(compilation)
    compilation.take(packed, ())
    compilation.take(kept, (PackedWeights,))
    report, graph_module = compilation.report, compilation.graph_module
    for step in (packed, kept):
        if compilation.takes(type(step)):
            work = step.work
            report = replace(report, kept_tensors=len(work.examples), kept_bytes=work.kept_bytes)
            graph_module = work.main
            _read_kept_weights(graph_module)
    if compilation.takes(PackedWeights):
        return report
    context = _context(graph_module, compilation)
    shared = compilation.shares_results
    return foreseen(context, compilation.options, report, shared=shared, measures=measures)


def _read_kept_weights(graph_module: GraphModule) -> None:
    """Has convolutions read kept weights as they lie, as `raw_memory.read_kept_weights` does in inductor."""
    for copy in list(graph_module.graph.nodes):
        if base_name(copy) != "clone" or not all(is_weight_of(copy, reader) for reader in copy.users):
            continue
        kept = copy.args[0]
        if isinstance(kept, Node) and kept.op == "placeholder" and is_module_tensor(kept):
            copy.replace_all_uses_with(kept)
            graph_module.graph.erase_node(copy)


def _context(graph_module: GraphModule, compilation: Compilation) -> GraphContext:
    modes = Modes(grad=torch.is_grad_enabled())
    return GraphContext(graph_module, modes, executor=executor_of(compilation.options))


class Trial(NamedTuple):
    """A dry run under other options.

    Attributes:
        report: what came of it.
        seconds: what its convolutions take together; None where that is not known.
    """

    report: Report
    seconds: float | None = None


def trial(compilation: Compilation) -> Trial:
    """Rewrites a graph, as a dry run under other options."""
    rewrite(compilation)
    return Trial(compilation.report, _kept_seconds(compilation) if packs(compilation) else None)


def _kept_seconds(compilation: Compilation) -> float | None:
    """What convolutions over kept weights take, as the device's store has it; None if one is not there."""
    total = 0.0
    for node in compilation.graph_module.graph.nodes:
        found = read_convolution(node)
        if found is None:
            continue
        timing = _known_timing(found.sizes) if found.dtype == torch.float32 else None
        if timing is None:
            return None
        total += timing.seconds if timing.pays else timing.theirs
    return total


def _known_timing(found: ConvolutionSizes) -> KernelTiming | None:
    stride, padding, dilation, transposed, _, groups = found.arguments
    if transposed or len(found.input) != 4:
        return None
    space = (_pair(given) for given in (found.weight[2:], stride, padding, dilation))
    count, channels, height, width = map(size_hint, found.input)
    sizes = Sizes(channels, size_hint(found.weight[0]), groups, *space)
    return known(sizes, (count, channels, height, width))


def _pair(given: Sequence[Any]) -> tuple[int, int]:
    height, width = map(size_hint, given)
    return height, width


def attempts(report: Report, options: Options, run: Callable[[Options], Trial]) -> tuple[Attempt, ...]:
    """The options that the table of reason codes would change, each tried; those that apply more are told.

    Args:
        report: what the options as they are give.
        options: what the user chose.
        run: a dry run of the rules under other options.
    """
    codes = dict.fromkeys(remark.code for remark in report.declined if remark.code in CODES)
    changes = {repr(change): change for code in codes for change in CODES[code].tries}
    found = []
    for change in changes.values():
        chosen = replace(options, **change)
        if chosen == options:
            continue
        tried = run(replace(chosen, verify="off", keep_repro=False))
        attempt = _attempt(report, tried.report)
        plan = report.layout
        now = plan.seconds_of_convolutions if plan is not None and plan.is_in_force else None
        if tried.seconds is not None and now is not None:
            attempt = replace(attempt, seconds=tried.seconds, otherwise_seconds=now)
        if attempt.gained:
            found.append(replace(attempt, options=change))
    return tuple(found)


def _attempt(report: Report, other: Report) -> Attempt:
    """What another report has applied more."""
    done, found = (
        {(each.rule, each.graph, each.node): each for each in either.remarks if each.status == "applied"}
        for either in (report, other)
    )
    more = [remark for site, remark in found.items() if site not in done]
    return Attempt({}, Counter(remark.rule for remark in more), added(remark.figures for remark in more))
