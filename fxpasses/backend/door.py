"""The door that torch.compile knocks on: `torch.compile(model, backend="fxpasses")`.

Dynamo hands over a graph and example inputs. The passes run over a copy (Dynamo builds its calling
convention from the original afterwards), and the copy goes to the inner backend, which is inductor unless
the options say otherwise. `mode=` and inductor's own settings reach inductor as they would without us.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fxpasses.backend import stock_conv_bn
from fxpasses.backend.memory import arrange_memory, exceeds_reuse
from fxpasses.errors import UnknownOptionError
from fxpasses.graph.context import Executor, GraphContext
from fxpasses.graph.decline import Decline
from fxpasses.graph.metadata import tensor
from fxpasses.graph.modes import Modes
from fxpasses.graph.strides import memory_order
from fxpasses.kernels.convolution import Sizes
from fxpasses.kernels.kernel import Kernel
from fxpasses.options import Options
from fxpasses.passes.layout import raw_memory
from fxpasses.passes.layout.joint import (
    graph_key_of,
    joint_layout,
    results_share_memory,
    without_unsafe_kernels,
)
from fxpasses.passes.training import input_strides
from fxpasses.passes.training.activation_masks import JointMasks, joint_masks
from fxpasses.passes.weights.kept import KeptWeights
from fxpasses.passes.weights.packed import OwnKernels, WeightPacking, own_kernel_of_linear
from fxpasses.passes.weights.parameter_work import PacksLinear, ParameterWork, split_parameter_work
from fxpasses.pipeline import keeps_weights, run_passes
from fxpasses.report import counters
from fxpasses.report.data import Remark
from fxpasses.report.report import Report
from fxpasses.rewrite.registry import REGISTRY
from fxpasses.torch_internals.aot_autograd import guessed_tangents
from fxpasses.torch_internals.dynamo import lookup_backend
from fxpasses.torch_internals.inductor import (
    compile_with_inductor,
    failed_on_symbols,
    inductor_mode_options,
)

_Patches = Callable[[Mapping[str, Any]], dict[str, Any]]
"""From inductor's settings to the same with some of ours."""

_EAGER = ("eager", "aot_eager", "eager_noexcept", "aot_eager_decomp_partition", "pre_dispatch_eager")


def backend(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Options | Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Optimises a graph from Dynamo and compiles it with the inner backend.

    Args:
        gm: the graph that Dynamo traced; it is not changed.
        example_inputs: one (fake) value per placeholder.
        options: fields of `fxpasses.Options`, or `Options`.
        mode: a mode of torch.compile, such as ``"max-autotune"``; it reaches inductor.

    Raises:
        UnknownOptionError: an option or mode that does not exist, or that the inner backend cannot take.
        MissingCompilerError: inductor needs a C++ compiler and found none.
    """
    chosen = Options.of(options)
    _inner(chosen, mode, None)  # a mode or setting that does not exist is refused before any work
    try:
        compiled, report = _compile(gm, example_inputs, chosen, mode)
    except Exception as error:
        if chosen.inner != "inductor" or not failed_on_symbols(error):
            raise
        operator_by_operator = replace(chosen, inner="aot_eager", inductor={})
        compiled, report = _compile(gm, example_inputs, operator_by_operator, None)
        report = replace(report, remarks=(*report.remarks, _CANNOT_COMPARE))
    # Counted last: a graph that the inner backend refused was not optimised.
    counters.record(report)
    return compiled


_CANNOT_COMPARE = Remark(
    "inductor",
    "declined",
    "symbolic-strides",
    'inductor failed to compare strides that are symbols ("Invalid ranges"), so that the graph runs operator '
    "by operator, as under inner='aot_eager'. Inductor compiles it for static sizes (dynamic=False)",
    node="",
    stage="check",
)


def _compile(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], chosen: Options, mode: str | None
) -> tuple[Callable[..., Any], Report]:
    rewritten, report = rewrite(gm, example_inputs, chosen)
    if stock_conv_bn.taken_over(chosen):
        chosen = replace(chosen, inductor={**chosen.inductor, stock_conv_bn.SETTING: False})
    if "cpu" in _devices(example_inputs):
        arrange_memory(chosen.memory, much=torch.is_grad_enabled() or exceeds_reuse(rewritten.graph))
    # Packed convolutions work in channels-last, no slower than what a plan would choose from.
    packs = _packs(example_inputs, chosen)
    shared = torch.is_grad_enabled() and results_share_memory(gm)
    plan = functools.partial(joint_layout, rewritten, example_inputs, chosen, shared=shared)
    layout = None if packs else plan()
    work = _parameter_work(rewritten, example_inputs, chosen, packs=packs)
    if isinstance(work, Decline):
        remark = Remark("kept_weights", "declined", work.code, work.message, node="", stage="check")
        report = replace(report, remarks=(*report.remarks, remark))
        layout = plan() if packs else layout
    masks = _joint_masks(rewritten, example_inputs, chosen)
    kept_weights = isinstance(work, ParameterWork)
    seen = functools.partial(raw_memory.patches, kept_weights=kept_weights)
    steps: list[_Patches] = [seen, *(each.patches for each in (masks, layout) if each is not None)]
    if layout is None and _folds_while_training(report, example_inputs, chosen):
        steps.append(input_strides.patches)
    unsafe = without_unsafe_kernels(rewritten, chosen, shared=shared) if layout is None else ()
    if unsafe:
        report = replace(report, remarks=(*report.remarks, *unsafe))
        steps.append(lambda given: {**given, "layout_optimization": False})
    patches = _in_turn(steps)
    with guessed_tangents(as_outputs=not _gives_overlapping(rewritten)):
        if isinstance(work, ParameterWork):
            compiled, report = _compile_with_kept_weights(
                work, example_inputs, chosen, mode, patches, report, packs=packs
            )
        else:
            compiled = _inner(chosen, mode, patches)(rewritten, example_inputs)
    for each in (masks, layout):
        report = each.completed(report) if each is not None else report
    return compiled, report


def rewrite(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[torch.fx.GraphModule, Report]:
    """Runs the passes as they run before the inner backend, in place of what inductor would do itself."""
    wanted = stock_conv_bn.taken_over(options)
    executor = executor_of(options)
    rewritten, report = run_passes(gm, example_inputs, options, executor=executor, wanted=wanted)
    if wanted:
        report = replace(report, remarks=(*report.remarks, *stock_conv_bn.remarks_on(report)))
    return rewritten, report


def _gives_overlapping(graph_module: torch.fx.GraphModule) -> bool:
    """Whether elements of a result that takes a gradient may overlap in memory, as of `unfold`.

    AOTAutograd (2.11 to 2.15) copies the gradient into the same strides, in which elements overwrite others;
    where they are symbols, it only asks for a format.
    """
    (output,) = graph_module.graph.find_nodes(op="output")
    results = [
        each for each in map(tensor, output.all_input_nodes) if each is not None and each.requires_grad
    ]
    return any(
        all(type(stride) is int for stride in each.stride()) and memory_order(each) is None
        for each in results
    )


def _devices(inputs: Sequence[Any]) -> set[str]:
    """The types of the devices on which the inputs are."""
    return {each.device.type for each in inputs if isinstance(each, torch.Tensor)}


def _joint_masks(
    rewritten: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> JointMasks | None:
    selected = [each.name for each in REGISTRY.pipeline(options)]
    return joint_masks(rewritten, options, lambda: graph_key_of(rewritten, example_inputs), selected)


def _folds_while_training(report: Report, inputs: Sequence[Any], options: Options) -> bool:
    """Whether weights are folded on the fly on a CPU, where inductor would keep copies of the raw ones."""
    on_cpu = _devices(inputs) <= {"cpu"}
    folded = any(rule in report.applied for rule in _FOLDING)
    return torch.is_grad_enabled() and on_cpu and folded and options.layout == "auto"


_FOLDING = ("efficient_conv_bn_eval", "conv_affine", "affine_across_views", "parallel_conv_merge")


def _in_turn(steps: Iterable[_Patches]) -> _Patches:
    """Adds the settings of each in turn."""
    order = tuple(steps)
    return lambda given: functools.reduce(lambda patches, step: step(patches), order, dict(given))


def _parameter_work(
    rewritten: torch.fx.GraphModule, inputs: Sequence[Any], options: Options, *, packs: bool
) -> ParameterWork | Decline | None:
    """The graph in two parts, or why it cannot be split; None where weights are not to be kept."""
    if options.weights != "cached":
        return None
    if not keeps_weights(options):
        return Decline("grad-mode", "gradients are on, and kept weights would cut them off")
    for_cpu = options.inner == "inductor" and _devices(inputs) <= {"cpu"}
    context = GraphContext(module=rewritten, initial_modes=Modes(grad=False))
    packs_linear = _packs_linear(options) if packs else None
    return split_parameter_work(context, for_cpu=for_cpu, packs_linear=packs_linear)


def _packs_linear(options: Options) -> PacksLinear:
    own = _OWN_KERNELS[options.profit]
    return lambda channels, filters, given: isinstance(
        own_kernel_of_linear(own, Sizes.of_linear(channels, filters), given), Kernel
    )


def _packs(inputs: Sequence[Any], options: Options) -> bool:
    """Whether weights are kept and packed for oneDNN, unless the user asked for a layout."""
    on_cpu = _devices(inputs) <= {"cpu"}
    return keeps_weights(options) and on_cpu and options.inner == "inductor" and options.layout in _PACKED


_PACKED = ("auto", "off")


def _compile_with_kept_weights(
    work: ParameterWork,
    example_inputs: Sequence[Any],
    options: Options,
    mode: str | None,
    patches: _Patches,
    report: Report,
    *,
    packs: bool,
) -> tuple[Callable[..., Any], Report]:
    """Compiles the graph less what depends on parameters alone, which is kept."""
    inputs = [*(example_inputs[position] for position in work.inputs), *work.examples]
    kept = replace(report, kept_tensors=len(work.examples), kept_bytes=work.kept_bytes)
    if not packs:
        return KeptWeights(_inner(options, mode, patches)(work.main, inputs), work), kept
    packing = WeightPacking(inputs, len(work.examples), _OWN_KERNELS[options.profit])
    with packing.constants_allowed:
        compiled = _inner(options, mode, _in_turn([patches, packing.patches]))(work.main, inputs)
    kept = replace(
        kept,
        remarks=(*report.remarks, *packing.remarks),
        packed_tensors=len(packing.packed),
    )
    return KeptWeights(compiled, work, packing.packed, packing.husks), kept


_OWN_KERNELS: dict[str, OwnKernels] = {"model": "measured", "always": "always"}


def executor_of(options: Options) -> Executor:
    """Whether the inner backend runs one kernel per operator or fuses them."""
    return "eager" if options.inner in _EAGER else "fused"


def _inner(options: Options, mode: str | None, own: _Patches | None) -> Callable[..., Any]:
    """The inner backend, with its mode and settings bound.

    Args:
        options: what the user chose.
        mode: a mode of torch.compile.
        own: adds settings of ours to inductor's.
    """
    if options.inner == "inductor":
        patches = {**(inductor_mode_options(mode) if mode else {}), **options.inductor}
        patches = own(patches) if own is not None else patches
        return lambda gm, inputs: compile_with_inductor(gm, inputs, patches)
    if mode is not None or options.inductor:
        given = f"mode={mode!r}" if mode is not None else "options={'inductor': ...}"
        raise UnknownOptionError(f"{given} is for inductor, and inner={options.inner!r}. Drop one of them.")
    return lookup_backend(options.inner) if isinstance(options.inner, str) else options.inner
