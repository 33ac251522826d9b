"""The functions behind the public names: `optimize` for graphs that you hold, `explain` for a dry run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import GraphModule, Node

from fxpasses.backend.compilation import Compilation
from fxpasses.backend.foreseeing import Trial, attempts, foresee, trial
from fxpasses.backend.undisturbed import undisturbed
from fxpasses.errors import FxpassesError, UnknownOptionError
from fxpasses.options import Options
from fxpasses.passes.weights.baked import Constant
from fxpasses.passes.weights.baked_programs import Held, bake_module, bake_program, ready_to_bake
from fxpasses.pipeline import run_passes
from fxpasses.report import counters
from fxpasses.report.report import Report
from fxpasses.torch_internals.dynamo import fresh_call


@dataclass(frozen=True)
class Optimized:
    """What `optimize` returns.

    Attributes:
        graph_module: the rewritten graph; for an exported program, the one inside it.
        exported_program: the rewritten program, or None where a plain graph module was given.
        report: what was applied, what was not, and why.
    """

    graph_module: GraphModule
    exported_program: ExportedProgram | None
    report: Report


def optimize(
    program: GraphModule | ExportedProgram,
    example_inputs: Sequence[Any] | None = None,
    options: Options | Mapping[str, Any] | None = None,
) -> Optimized:
    """Runs the passes over a graph from make_fx, symbolic_trace or torch.export. Nothing given is changed.

    The cost model takes it that the result runs in eager mode, one kernel per operator. Autograd counts as
    recording if it does so now: call under `torch.no_grad()` for inference. With ``weights="baked"`` it is
    for inference anyway: what depends on parameters and buffers alone is computed and stored in the result.

    Args:
        program: a graph module, or an exported program.
        example_inputs: one value per placeholder; needed where the graph carries no metadata.
        options: fields of `fxpasses.Options`, or `Options`.

    Raises:
        MissingMetadataError: the graph carries no metadata and no example inputs were given.
        UnknownOptionError, UnknownRuleError: the options name something that does not exist, or that a plain
            graph module cannot do.
        FxpassesError: ``weights="baked"``, and the program writes to its parameters or buffers, gives a loss
            or gradients, or has no values for what is to be computed.
    """
    chosen = Options.of(options)
    if chosen.weights == "cached":
        raise UnknownOptionError(
            "weights='cached' needs something to keep them, which a plain graph module is not; use "
            "torch.compile(model, backend='fxpasses', options={'weights': 'cached'})."
        )
    result = _optimize(program, example_inputs, chosen)
    counters.record(result.report)
    return result


def _optimize(
    program: GraphModule | ExportedProgram, example_inputs: Sequence[Any] | None, options: Options
) -> Optimized:
    if not isinstance(program, (GraphModule, ExportedProgram)):
        raise FxpassesError(
            f"optimize takes a torch.fx.GraphModule or an ExportedProgram, not a {type(program).__name__}. "
            "Trace the module first (torch.export.export, make_fx, torch.fx.symbolic_trace), or use "
            "torch.compile(model, backend='fxpasses')."
        )
    bakes = options.weights == "baked"
    graph_module = program if isinstance(program, GraphModule) else program.graph_module
    if bakes:
        graph_module = ready_to_bake(program)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not bakes):
        if isinstance(program, ExportedProgram):
            return _optimize_exported(program, graph_module, options)
        graph_module, report = run_passes(
            graph_module, example_inputs, options, executor="eager", keeps_weights=bakes
        )
        if bakes:
            graph_module, constants = bake_module(graph_module)
            report = _with_constants(report, constants)
    return Optimized(graph_module, None, report)


def _optimize_exported(program: ExportedProgram, graph_module: GraphModule, options: Options) -> Optimized:
    """The program with its graph optimised, which may have been made ready for that."""
    held = Held.of(program)
    tensors = held.by_placeholder()
    bakes = options.weights == "baked"
    graph_module, report = run_passes(
        graph_module,
        None,
        options,
        executor="eager",
        trainable=frozenset(name for name, tensor in tensors.items() if tensor.requires_grad),
        keeps_weights=bakes,
        held=tensors if bakes else None,
        parameters=frozenset(tensors),
        results=_results_of(program),
    )
    held = dataclasses.replace(held, signature=_signature_of(program, graph_module))
    if bakes:
        held, constants = bake_program(graph_module, held)
        report = _with_constants(report, constants)
    rewritten = ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=held.signature,
        state_dict=dict(held.state_dict) if bakes else program.state_dict,
        range_constraints=dict(program.range_constraints),
        module_call_graph=list(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=dict(held.constants) if bakes else program.constants,
        verifiers=program.verifiers,
    )
    return Optimized(rewritten.graph_module, rewritten, report)


def _with_constants(report: Report, constants: Sequence[Constant]) -> Report:
    """A report that says what was baked."""
    return dataclasses.replace(
        report,
        kept_tensors=len(constants),
        kept_bytes=sum(constant.value.nbytes for constant in constants),
    )


def _results_of(program: ExportedProgram) -> frozenset[int]:
    """Which outputs of a program's graph are results, and not new values of buffers, or gradients."""
    specs = program.graph_signature.output_specs
    return frozenset(at for at, spec in enumerate(specs) if spec.kind is OutputKind.USER_OUTPUT)


def _signature_of(program: ExportedProgram, graph_module: GraphModule) -> Any:
    """The program's signature, with its outputs under the names that their nodes have now.

    A replacement has its result's name; a rule may also return a node that was there before.
    """
    outputs = []
    nodes = cast("Sequence[object]", graph_module.graph.output_node().args[0])
    for spec, node in zip(program.graph_signature.output_specs, nodes, strict=True):
        arg = spec.arg
        if isinstance(node, Node) and node.name != arg.name:
            arg = dataclasses.replace(arg, name=node.name)
        outputs.append(dataclasses.replace(spec, arg=arg))
    return dataclasses.replace(
        program.graph_signature, input_specs=list(program.graph_signature.input_specs), output_specs=outputs
    )


def explain(
    model: torch.nn.Module | Callable[..., Any] | GraphModule | ExportedProgram,
    *example_inputs: Any,
    options: Options | Mapping[str, Any] | None = None,
) -> Report:
    """A dry run: what would fire, what would not and why. Inductor is not called and nothing is counted.

    Options that would apply more, by the table of reason codes, are tried, and `Report.tried` has what came
    of it. What happens inside inductor alone is not foretold (`fxpasses.backend.foreseeing`).

    A module or function is traced with Dynamo and run once, in eager mode; its buffers and the state of
    the random generators are put back afterwards. Grad mode is the caller's.

    Args:
        model: a module, a function, a graph module or an exported program.
        example_inputs: the arguments of one call.
        options: fields of `fxpasses.Options`, or `Options`; `inner` only tells the cost model who runs it.

    Raises:
        FxpassesError: bad options, or a graph without metadata and without example inputs.
    """
    given = Options.of(options)
    chosen = dataclasses.replace(given, tune_seconds=0)  # nothing is measured
    if isinstance(model, (GraphModule, ExportedProgram)):
        return _explain_graph(model, example_inputs, chosen)
    return _explain_with_dynamo(model, example_inputs, chosen, measures=given.tune_seconds > 0)


def _explain_graph(
    program: GraphModule | ExportedProgram, inputs: tuple[Any, ...], options: Options
) -> Report:
    def run(chosen: Options) -> Trial:
        if chosen.weights == "cached":
            return Trial(Report())  # nothing keeps weights between the calls of a graph module
        return Trial(_optimize(program, inputs or None, chosen).report)

    report = _optimize(program, inputs or None, options).report
    return dataclasses.replace(report, dry_run=True, tried=attempts(report, options, run))


def _explain_with_dynamo(
    model: Callable[..., Any], inputs: tuple[Any, ...], options: Options, *, measures: bool
) -> Report:
    reports: list[Report] = []
    errors: list[FxpassesError] = []

    def trace_only(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(chosen: Options) -> Trial:
            return trial(Compilation(gm, example_inputs, chosen))

        try:
            report = foresee(Compilation(gm, example_inputs, options), measures=measures)
            reports.append(dataclasses.replace(report, tried=attempts(report, options, run)))
        except FxpassesError as error:
            errors.append(error)
        return gm.forward

    with undisturbed(model):
        torch.compile(fresh_call(), backend=trace_only)(model, inputs)
    if errors:
        raise errors[0]
    return dataclasses.replace(Report.merge(reports), dry_run=True)
