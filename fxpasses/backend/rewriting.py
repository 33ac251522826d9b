"""A graph from Dynamo is rewritten, as it is before the inner backend and in a dry run."""

from __future__ import annotations

from dataclasses import replace

from fxpasses.backend import stock_conv_bn
from fxpasses.backend.compilation import Compilation
from fxpasses.graph.context import Executor
from fxpasses.options import Options
from fxpasses.pipeline import run_passes

_EAGER = ("eager", "aot_eager", "eager_noexcept", "aot_eager_decomp_partition", "pre_dispatch_eager")


def rewrite(compilation: Compilation) -> None:
    """Runs the passes over a copy of the graph, in place of what inductor would do itself."""
    options = compilation.options
    wanted = stock_conv_bn.taken_over(options)
    compilation.graph_module, compilation.report = run_passes(
        compilation.graph_module,
        compilation.inputs,
        options,
        executor=executor_of(options),
        wanted=wanted,
        keeps_weights=compilation.keeps_weights,
    )
    if wanted:
        compilation.remark(*stock_conv_bn.remarks_on(compilation.report))
        inductor = {**options.inductor, stock_conv_bn.SETTING: False}
        compilation.options = replace(options, inductor=inductor)


def executor_of(options: Options) -> Executor:
    """Whether the inner backend runs one kernel per operator or fuses them."""
    return "eager" if options.inner in _EAGER else "fused"
